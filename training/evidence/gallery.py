"""
The gallery: drawn pictures, a question each, and what the shipped target says, alone and with its draft.

    python -m training.evidence.gallery  # docs/gallery.md, docs/gallery.json and docs/gallery/*.png, on a CPU
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.world.rows import attribute_questions, evaluation_prompts
from transformers_msd import MSDDraftModel
from transformers_msd.bench.prompts import draw_picture


DOCS = Path(__file__).parents[2] / "docs"
DRAFT = Path(__file__).parents[1] / "tiny_world" / "checkpoints" / "draft"
SIDE = 192  # pixels
# What is wrong with an answer, by the name of its picture.
WRONG = {
    "colours": "In the middle right there is a large green triangle, in the bottom middle a small blue cross.",
    "strange": "There are five shapes, some of a kind and all in places that it was not trained on.",
}


@dataclass(frozen=True)
class Shown:
    """One picture of the gallery: what was asked and said, and in how many forwards of the target."""

    name: str
    question: str
    answer: str
    tau: float
    plain_forwards: int
    drafted_forwards: int


def prompts() -> Iterator[tuple[str, dict]]:
    """Yield a name and a prompt for each picture: held-out ones of the tiny world, and a picture of other shapes."""
    held_out = [prompt for prompt in evaluation_prompts(8) if prompt["group"] == "image"]
    for name, number in {"details": 1, "list": 5, "story": 7, "colours": 6}.items():
        yield name, held_out[number]
    yield "left", attribute_questions(10)[9]
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Describe the picture."}]
    yield "strange", {"messages": [{"role": "user", "content": content}], "images": [draw_picture(0)]}


def show(
    target: LlavaForConditionalGeneration, processor: LlavaProcessor, draft: MSDDraftModel, name: str, prompt: dict
) -> Shown:
    """
    Answer a prompt plainly and with the draft, greedily.

    Raises:
        RuntimeError: If the answers differ.
    """
    inputs, call = encode_prompts(processor, [prompt]), {"do_sample": False, "max_new_tokens": 100}
    plain = target.generate(**inputs, **call)
    drafted = target.generate(**inputs, **call, assistant_model=draft, return_dict_in_generate=True)
    if not torch.equal(drafted.sequences, plain):
        raise RuntimeError(f"The answers to {name} differ.")
    answer = plain[0, inputs["input_ids"].shape[1] :]
    stats = drafted.speculative_stats
    return Shown(
        name=name,
        question=prompt["messages"][-1]["content"][-1]["text"],
        answer=processor.decode(answer, skip_special_tokens=True).strip(),
        tau=round(stats.mean_acceptance_length, 2),
        plain_forwards=len(answer),
        drafted_forwards=1 + stats.num_rounds,  # the prompt is one, too
    )


def measure() -> list[dict]:
    """Answer all prompts with the shipped pair."""
    target, processor = load_target()
    draft = MSDDraftModel.from_pretrained(DRAFT, dtype=torch.float32)
    return [asdict(show(target, processor, draft, name, prompt)) for name, prompt in prompts()]


def page(results: list[dict]) -> str:
    """Write the page."""
    lines = [
        "# Gallery",
        "",
        "Drawn pictures that the shipped target was not trained on, and what it says of them. With its draft it runs "
        "less often\nand says the same, the wrong words, too.",
        "",
        "Written by `python -m training.evidence.gallery` (CPU, float32, greedy, the draft's own tree). τ is the "
        "tokens that a\nround of the target emits; forwards are the target's, that over the prompt among them. A "
        "round costs more than a plain\nstep: how much sooner an answer comes is [another question](benchmarks.md).",
        "",
        "| | asked, and said | forwards, plain | forwards, drafted | τ |",
        "|---|---|---|---|---|",
    ]
    for shown in results:
        name, answer = shown["name"], shown["answer"].replace("\n", "<br>")
        said = f"**{shown['question']}**<br>{answer}"
        if name in WRONG:
            said += f"<br>*Wrong. {WRONG[name]}*"
        lines.append(
            f"| ![{name}](gallery/{name}.png) | {said} | {shown['plain_forwards']} | {shown['drafted_forwards']} | "
            f"{shown['tau']:.2f} |"
        )
    lines += [
        "",
        "The last picture is one that `transformers-msd bench` draws, all others are of the "
        "[tiny world](../training/tiny_world/README.md).\nTo try your own: "
        "[quickstart.ipynb](notebooks/quickstart.ipynb).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    logging.disable_progress_bar()
    (DOCS / "gallery").mkdir(exist_ok=True)
    for name, prompt in prompts():
        picture = prompt["images"][0]
        way = Image.Resampling.NEAREST if picture.width < SIDE else Image.Resampling.LANCZOS
        picture.resize((SIDE, SIDE), way).save(DOCS / "gallery" / f"{name}.png", optimize=True)
    results = measure()
    (DOCS / "gallery.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (DOCS / "gallery.md").write_text(page(results))


if __name__ == "__main__":
    main()
