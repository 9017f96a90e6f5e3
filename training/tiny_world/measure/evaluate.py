"""
Measure the shipped pair on the 100 held-out prompts: `python -m training.tiny_world.measure.evaluate`.

Greedy and at temperature 1, each prompt is answered by plain `generate` and with the draft in turn, in one process:
the acceptance length, the speed-up, and whether all tokens are equal. Then the draft alone is given the visual rows of
another picture, and none, with target and output unchanged.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import ModelOutput, logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import AutoDraftModel, CallInputs, Committed, Target, TreeCandidateGenerator, TreeConfig
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer import AcceptanceLength, ExactMatch


MODES = {"greedy": {"do_sample": False}, "T=1": {"do_sample": True, "temperature": 1.0, "top_k": 0}}
PICTURES = ("its own", "another", "none")


class Blinkered(Ungated):
    """
    A draft that is shown other visual rows, embeddings and features, than the target's.

    Args:
        draft ([`FeatureDraftModel`]):
            The draft.
        picture (`str`):
            One of `PICTURES`.
    """

    def __init__(self, draft: FeatureDraftModel, picture: str) -> None:
        super().__init__(draft)
        self.picture = picture
        # Visual rows of earlier prompts by their number, from which the next prompt gets its other picture.
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        draft = candidates.draft
        candidates.draft = lambda committed: draft(self.show(committed))
        return candidates

    def show(self, committed: Committed) -> Committed:
        """Put what the draft is shown in the place of the visual rows."""
        visual = committed.visual_mask
        if self.picture == "none":
            return committed.pack(~visual)
        # The target's features at a picture tell what it shows, too.
        rows = committed.inputs_embeds[visual], committed.features[visual]
        shown = self.seen.get(len(rows[0]), rows) if self.picture == "another" else rows
        self.seen[len(rows[0])] = rows
        inputs_embeds, features = (
            states.masked_scatter(visual[..., None], other)
            for states, other in zip((committed.inputs_embeds, committed.features), shown, strict=True)
        )
        return replace(committed, inputs_embeds=inputs_embeds, features=features)


@dataclass(frozen=True)
class Answer:
    """One prompt answered without and with the draft."""

    group: str
    text: str
    reference: str
    equal: bool
    num_tokens: int
    plain_seconds: float
    seconds: float
    acceptance_lengths: list[int]


def timed(target: LlavaForConditionalGeneration, seed: int, **call: Any) -> tuple[ModelOutput, float]:
    """Generate from a seed; return the output and the seconds it took."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(**{"return_dict_in_generate": True} | call)
    return output, time.perf_counter() - start


def compare(
    target: LlavaForConditionalGeneration,
    assistant: FeatureDraftModel | Blinkered,
    processor: LlavaProcessor,
    prompts: list[tuple[dict, BatchFeature]],
    settings: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Answer every prompt without and with the draft in turn; return figures for each group and for all."""
    answers = []
    for seed, (prompt, inputs) in enumerate(prompts):
        plain, plain_seconds = timed(target, seed, **inputs, **settings)
        drafted, seconds = timed(target, seed, **inputs, **settings, assistant_model=assistant)
        equal = torch.equal(plain.sequences, drafted.sequences)
        new_tokens = drafted.sequences[0, inputs["input_ids"].shape[1] :]
        lengths = drafted.speculative_stats.acceptance_lengths[:, 0].tolist()
        text = processor.decode(new_tokens, skip_special_tokens=True)
        answer = Answer(
            prompt["group"], text, prompt["answer"], equal, len(new_tokens), plain_seconds, seconds, lengths
        )
        answers.append(answer)
    groups = dict.fromkeys([*(answer.group for answer in answers), "all"])
    return {group: summarize([answer for answer in answers if group in (answer.group, "all")]) for group in groups}


def blinker(
    target: LlavaForConditionalGeneration,
    assistant: Blinkered,
    prompts: list[tuple[dict, BatchFeature]],
    settings: dict[str, Any],
    answers: list[torch.Tensor],
) -> dict[str, float]:
    """Answer the prompts that have pictures with a draft that is shown others; count the answers that are plain's."""
    lengths, equal = [], 0
    for seed, ((_, inputs), plain) in enumerate(zip(prompts, answers, strict=True)):
        if "pixel_values" not in inputs:
            continue
        drafted, _ = timed(target, seed, **inputs, **settings, assistant_model=assistant)
        equal += torch.equal(drafted.sequences, plain)
        lengths.append(drafted.speculative_stats.acceptance_lengths[:, 0].tolist())
    return {"prompts": len(lengths), "equal": equal, "tau": acceptance_length(lengths)}


def plain_answers(
    target: LlavaForConditionalGeneration, prompts: list[tuple[dict, BatchFeature]], settings: dict[str, Any]
) -> list[torch.Tensor]:
    """Answer every prompt without a draft; return prompts and answers as tokens."""
    return [timed(target, seed, **inputs, **settings)[0].sequences for seed, (_, inputs) in enumerate(prompts)]


def acceptance_length(lengths: list[list[int]]) -> float:
    return AcceptanceLength(keep_in_memory=True).compute(predictions=lengths)["acceptance_length"]


def summarize(answers: list[Answer]) -> dict[str, float]:
    num_tokens = sum(answer.num_tokens for answer in answers)
    plain_seconds = sum(answer.plain_seconds for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    return {
        "prompts": len(answers),
        "equal": sum(answer.equal for answer in answers),
        "tokens": num_tokens,
        "tau": acceptance_length([answer.acceptance_lengths for answer in answers]),
        "exact": ExactMatch(keep_in_memory=True).compute(
            predictions=[answer.text for answer in answers], references=[answer.reference for answer in answers]
        )["exact_match"],
        "plain_tokens_per_second": num_tokens / plain_seconds,
        "tokens_per_second": num_tokens / seconds,
        "speedup": plain_seconds / seconds,
    }


def combine(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Take the medians of timed figures over several runs, and the least count of equal answers."""
    return {
        group: {
            name: min(run[group][name] for run in runs)
            if name == "equal"
            else median(run[group][name] for run in runs)
            for name in figures
        }
        for group, figures in runs[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, default=DRAFT_CHECKPOINT)
    parser.add_argument("--tree", type=int, nargs=3, metavar=("NUM_NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--num-per-group", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3, help="speed-ups are medians of so many runs")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--output", type=Path, help="where the figures are saved as JSON")
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    target, processor = load_target()
    draft = AutoDraftModel.from_pretrained(arguments.draft, dtype=torch.float32)
    if arguments.tree:
        draft.tree_config = TreeConfig(*arguments.tree)
    prompts = evaluation_prompts(arguments.num_per_group)
    encoded = [(prompt, encode_prompts(processor, [prompt])) for prompt in prompts]
    machine = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU, "
    machine += f"{torch.get_num_threads()} threads, float32"
    print(f"{machine}, {draft.tree_config}")
    results = {"machine": machine, "tree": str(draft.tree_config)}

    for mode, settings in MODES.items():
        settings = settings | {"max_new_tokens": arguments.max_new_tokens}
        compare(target, draft, processor, encoded[::10], settings)  # warm up
        results[mode] = combine(
            [compare(target, draft, processor, encoded, settings) for _ in range(arguments.repeats)]
        )
        print(f"\n| {mode} | prompts | equal | exact answers | tokens | tau | plain tok/s | tok/s | speed-up |")
        print("|---|---|---|---|---|---|---|---|---|")
        for group, row in results[mode].items():
            print(
                f"| {group} | {row['prompts']} | {row['equal']} | {row['exact']:.0%} | {row['tokens']} "
                f"| {row['tau']:.2f} | {row['plain_tokens_per_second']:.1f} | {row['tokens_per_second']:.1f} "
                f"| {row['speedup']:.2f}x |"
            )
        results[f"{mode}, pictures"] = {}
        print(f"\n| {mode}, the draft sees | prompts | equal | tau |")
        print("|---|---|---|---|")
        answers = plain_answers(target, encoded, settings)
        for picture in PICTURES:
            row = blinker(target, Blinkered(draft, picture), encoded, settings, answers)
            results[f"{mode}, pictures"][picture] = row
            print(f"| {picture} | {row['prompts']} | {row['equal']} | {row['tau']:.2f} |")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
