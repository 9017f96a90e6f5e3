"""
What do cheaper drafts lose and gain in the tiny world: `python -m training.tiny_world.measure.cheaper_drafts`.

Drafts that average or leave out visual rows, or that know a part of the vocabulary, are trained on from the shipped
draft, all on the same rows, and so is one that changes nothing. Then each held-out prompt is answered by plain
`generate` and with all of them in turn, in one process. Last, a prompt with so many pictures as make the visual rows
of one picture of LLaVA-1.5 tells what drafting on it costs; that many pictures nobody was trained on.
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import (
    BATCH_SIZE,
    COMMON_SETTINGS,
    DRAFT_CHECKPOINT,
    NUM_UNROLL_STEPS,
    training_batches,
)
from training.tiny_world.measure.evaluate import MODES, acceptance_length, timed
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDConfig, MSDDraftModel
from transformers_msd.bench.assistants import PhaseTimer
from transformers_msd.costs.provenance import commit, hardware
from transformers_msd.trainer import MSDTrainer, MSDTrainingConfig


CONTROL = "all rows, all tokens"
# Settings by name.
VARIANTS: dict[str, dict[str, int]] = {
    CONTROL: {},
    "visual rows averaged by 4": {"visual_pool_size": 4},
    "visual rows left out": {"visual_pool_size": 0},
    "512 of 1024 tokens": {"draft_vocab_size": 512},
    "256 of 1024 tokens": {"draft_vocab_size": 256},
}
KINDS = ("text", "pictures")
MANY_PICTURES = 16  # of 36 rows


def train(
    settings: dict[str, int],
    target: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Dataset,
    num_steps: int,
    output: Path,
) -> None:
    """Train a draft of some settings from the shipped weights on, and save it."""
    shipped = MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)
    torch.manual_seed(0)
    draft = MSDDraftModel(MSDConfig.from_dict(shipped.config.to_dict() | settings))
    # The shipped draft has no head: the trainer gives a smaller vocabulary the target's.
    draft.load_state_dict(shipped.state_dict(), strict=False)
    args = MSDTrainingConfig(
        output_dir=str(output),
        stage="multimodal",
        max_steps=num_steps,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        feature_noise=0.0,
        num_unroll_steps=NUM_UNROLL_STEPS,
        logging_steps=25,
        save_strategy="no",
        **COMMON_SETTINGS,
    )
    MSDTrainer(model=draft, target=target, args=args, train_dataset=rows, processing_class=processor).train()
    draft.save_pretrained(output)


@dataclass
class Tally:
    """What was measured of one draft, or of plain decoding, at one temperature."""

    lengths: dict[str, list[list[int]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    num_equal: int = 0
    # Of whole calls.
    num_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    # Of drafting: in the first rounds on prompts with pictures, and in all later rounds.
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def figures(self, control: "Tally") -> dict[str, Any]:
        ratios = [theirs / ours for theirs, ours in zip(control.seconds, self.seconds, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        figures: dict[str, Any] = {
            "tokens_per_second": self.num_tokens / sum(self.seconds),
            "speed": {"median": middle, "low": low, "high": high},
        }
        if not self.later:
            return figures
        return figures | {
            "tau": {kind: acceptance_length(lengths) for kind, lengths in self.lengths.items()},
            "equal": self.num_equal,
            "answers": sum(map(len, self.lengths.values())),
            "first_draft_ms": median(self.first) * 1e3,
            "later_draft_ms": median(self.later) * 1e3,
        }


def measure(
    target: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    drafts: dict[str, MSDDraftModel],
    num_per_group: int,
    repeats: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Answer held-out prompts without a draft and with each in turn; return figures by temperature and draft."""
    encoded = [
        (KINDS[bool(prompt["images"])], encode_prompts(processor, [prompt]))
        for prompt in evaluation_prompts(num_per_group)
    ]
    timers = {name: PhaseTimer(draft) for name, draft in drafts.items()}
    names, results = ["plain", *timers], {}
    for mode, settings in MODES.items():
        settings = settings | {"max_new_tokens": 160}
        for _, inputs in encoded[::8]:  # warm up
            for name in names:
                timed(target, 0, **inputs, **settings, assistant_model=timers.get(name))
        tallies = {name: Tally() for name in names}
        for repeat in range(repeats):
            for number, (kind, inputs) in enumerate(encoded):
                outputs, start = {}, number % len(names)
                for name in names[start:] + names[:start]:  # each is first in its turn
                    seed = repeat * len(encoded) + number
                    output, seconds = timed(target, seed, **inputs, **settings, assistant_model=timers.get(name))
                    outputs[name], tally = output, tallies[name]
                    tally.num_tokens += output.sequences.shape[1] - inputs["input_ids"].shape[1]
                    tally.seconds.append(seconds)
                    if name in timers:
                        tally.lengths[kind].append(output.speculative_stats.acceptance_lengths[:, 0].tolist())
                        drafting = [length for phase, _, length in timers[name].notes if phase == "draft"]
                        tally.first += drafting[:1] if kind == "pictures" else []
                        tally.later += drafting[1:]
                for name in timers:
                    tallies[name].num_equal += torch.equal(outputs[name].sequences, outputs["plain"].sequences)
        results[mode] = {name: tally.figures(tallies[CONTROL]) for name, tally in tallies.items()}
    return results


def measure_long_prompt(
    target: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    drafts: dict[str, MSDDraftModel],
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Answer a prompt of many pictures with each draft in turn; return milliseconds of drafting."""
    pictures = [picture for prompt in evaluation_prompts() for picture in prompt["images"]][:MANY_PICTURES]
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "Describe the picture."}]
    inputs = encode_prompts(processor, [{"messages": [{"role": "user", "content": content}], "images": pictures}])
    timers = {name: PhaseTimer(draft) for name, draft in drafts.items()}
    tallies = {name: Tally() for name in timers}
    for repeat in range(repeats + 1):  # the first one warms up
        names, start = list(timers), repeat % len(timers)
        for name in names[start:] + names[:start]:
            timer = timers[name]
            timer.tree_config = replace(timer.tree_config, gate=False, ngrams=False)
            timed(target, 0, **inputs, do_sample=False, min_new_tokens=24, max_new_tokens=24, assistant_model=timer)
            drafting = [length for phase, _, length in timer.notes if phase == "draft"]
            if repeat:
                tallies[name].first.append(drafting[0])
                tallies[name].later += drafting[1:]
    return {
        name: {"first_draft_ms": median(tally.first) * 1e3, "later_draft_ms": median(tally.later) * 1e3}
        for name, tally in tallies.items()
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write the figures of one temperature as Markdown; speeds are medians over calls, with the quartiles."""
    lines = [
        "| the draft has | τ, text | τ, pictures | first draft, ms | later drafts, ms | tokens/s | speed | equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        speed = row["speed"]
        times = f"{row['tokens_per_second']:.1f} | "
        times += f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"
        if "tau" in row:
            taus = " | ".join(f"{row['tau'][kind]:.2f}" for kind in KINDS)
            drafting = f"{row['first_draft_ms']:.2f} | {row['later_draft_ms']:.2f}"
            lines.append(f"| {name} | {taus} | {drafting} | {times} | {row['equal']} of {row['answers']} |")
        else:
            lines.append(f"| no draft | | | | | {times} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_world/cheaper_drafts"), help="trained drafts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num-per-group", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5, help="how often each prompt is answered")
    parser.add_argument("--long-prompt-only", action="store_true", help="measure the long prompt alone")
    parser.add_argument("--output", type=Path, help="where the figures are saved as JSON, beside those that are there")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    target, processor = load_target()
    rows = training_batches("multimodal", arguments.steps, BATCH_SIZE, seed=22)
    drafts = {}
    for number, (name, settings) in enumerate(VARIANTS.items()):
        folder = arguments.work / str(number)
        if not (folder / "config.json").exists():
            train(settings, target, processor, rows, arguments.steps, folder)
        drafts[name] = MSDDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
    about = {
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "repeats": arguments.repeats,
        "hardware": hardware(target.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    results: dict[str, Any] = {}
    if not arguments.long_prompt_only:
        num_prompts = len(evaluation_prompts(arguments.num_per_group))
        figures = measure(target, processor, drafts, arguments.num_per_group, arguments.repeats)
        results["prompts"] = about | {"num_prompts": num_prompts} | figures
        for mode, of_mode in figures.items():
            print(f"\n{mode}\n\n{table(of_mode)}")
    long_prompt = measure_long_prompt(target, processor, drafts, 10 * arguments.repeats)
    results["long prompt"] = about | {"pictures": MANY_PICTURES, "repeats": 10 * arguments.repeats} | long_prompt
    print(f"\n| {MANY_PICTURES} pictures | first draft, ms | later drafts, ms |\n|---|---|---|")
    for name, row in long_prompt.items():
        print(f"| {name} | {row['first_draft_ms']:.2f} | {row['later_draft_ms']:.2f} |")
    if arguments.output:
        before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        arguments.output.write_text(json.dumps(before | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
