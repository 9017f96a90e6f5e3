"""Whether the target reads the picture."""

from collections import Counter

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from training.tiny_world.build.target import answer_prompts
from training.tiny_world.world.rows import attribute_questions


def swap_pictures(questions: list[dict]) -> list[dict]:
    """Give every question the picture of the next question of its kind."""
    swapped = []
    for i, question in enumerate(questions):
        others = [other for other in questions[i + 1 :] + questions[:i] if other["kind"] == question["kind"]]
        if not others:
            raise ValueError(
                f"Each question must have another of its kind, to swap pictures with, got one of {question['kind']!r} "
                f"among {len(questions)}. Ask more."
            )
        swapped.append(question | {"images": others[0]["images"]})
    return swapped


def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: list[dict], batch_size: int = 50
) -> dict[str, float]:
    """Return the share of questions answered right, by kind and over all."""
    right = Counter()
    for i in range(0, len(questions), batch_size):
        part = questions[i : i + batch_size]
        answers = answer_prompts(model, processor, part, max_new_tokens=100)
        right.update(q["kind"] for q, answer in zip(part, answers, strict=True) if answer.endswith(q["value"] + "."))
    totals = Counter(question["kind"] for question in questions)
    return {"all": right.total() / len(questions)} | {kind: right[kind] / totals[kind] for kind in totals}


def chance(questions: list[dict]) -> dict[str, float]:
    """Return the share that the commonest value to each kind of question, pictures unseen, gets right.

    Of the two shapes named in "further left" a blind guess finds one half of the time.
    """
    answers = {}
    for question in questions:
        answers.setdefault(question["kind"], Counter())[question["value"]] += 1
    shares = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    shares["further left"] = max(shares["further left"], 0.5)
    totals = Counter(question["kind"] for question in questions)
    return {"all": sum(shares[kind] * totals[kind] for kind in totals) / len(questions)} | shares


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, num_questions: int = 400
) -> dict[str, dict[str, float]]:
    """Return accuracies with the right pictures, with swapped ones, and by chance."""
    model.eval()
    questions = attribute_questions(num_questions)
    return {
        "right": accuracy(model, processor, questions),
        "swapped": accuracy(model, processor, swap_pictures(questions)),
        "chance": chance(questions),
    }
