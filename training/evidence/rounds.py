"""
What a round of several drafts costs beside a plain step, eager and compiled, and what comes of it.

    python -m training.evidence.rounds /tmp/looking_tiny/* --output docs/rounds_tiny.json

The drafts are folders, as `training.evidence.looking` leaves them. All of them and plain `generate` take turns, prompt
after prompt and pass after pass, in trees of the same size, greedily and at T = 1. Shown are the acceptance length τ,
the share of rounds that accept a token at each depth, tokens per second as the median of the passes with their range,
the speed-up over plain `generate` eager, and the cost of a round in its steps, which is τ over the speed-up. Every
answer is compared with plain decoding's. On a machine that does nothing else.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel
from transformers.utils import logging

from training.evidence.two_stages import tiny_prompts
from training.glyph_world.world import prompts_by_kind
from training.tiny_world.build.target import CHECKPOINT, encode_prompts, load_target
from transformers_msd import AutoDraftModel, StaticRuntime, TreeConfig


TREE = (24, 6, 4)  # nodes, depth, top_k
SETTINGS = {"greedy": {"do_sample": False}, "T = 1": {"do_sample": True, "top_k": 0}}
# With it a `StaticRuntime` compiles target and draft; plain `generate` compiles nothing on a CPU.
STATIC = {"cache_implementation": "static"}
NUM_TOKENS = 100
NUM_WARM = 2  # passes that compile, and are not counted


def run_call(
    target: PreTrainedModel, inputs: BatchFeature, settings: dict[str, Any], assistant: Any
) -> tuple[torch.Tensor, float, list[int]]:
    """Answer a prompt; return the answer, its seconds and the tokens of each round."""
    torch.manual_seed(0)
    call = {"max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True, "assistant_model": assistant}
    start = time.perf_counter()
    output = target.generate(**inputs, **settings, **call)
    seconds = time.perf_counter() - start
    stats = getattr(output, "speculative_stats", None)
    return output.sequences, seconds, [] if stats is None else stats.acceptance_lengths[:, 0].tolist()


def compare(
    target: PreTrainedModel, drafts: dict[str, Any], prompts: list[BatchFeature], num_passes: int, depth: int
) -> dict[str, dict[str, Any]]:
    """Answer all prompts in all ways in turn; return the figures of each."""
    ways: dict[str, tuple[Any, dict[str, Any]]] = {"plain": (None, {}), "plain, static cache": (None, STATIC)}
    for name, draft in drafts.items():
        ways |= {name: (draft, {}), f"{name}, compiled": (StaticRuntime(draft), STATIC)}
    figures: dict[str, dict[str, Any]] = {}
    for mode, sampling in SETTINGS.items():
        answers: dict[int, torch.Tensor] = {}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        lengths: dict[str, list[int]] = {way: [] for way in ways}
        for number in range(NUM_WARM + num_passes):
            spent = dict.fromkeys(ways, 0.0)
            num_tokens = 0
            for place, inputs in enumerate(prompts):
                for way, (assistant, settings) in ways.items():
                    answer, seconds, rounds = run_call(target, inputs, sampling | settings, assistant)
                    if not torch.equal(answers.setdefault(place, answer), answer):
                        raise RuntimeError(f"An answer of {way} differs from plain decoding's.")
                    spent[way] += seconds
                    lengths[way] += rounds if number == 0 else []
                num_tokens += answers[place].shape[1] - inputs["input_ids"].shape[1]
            if number >= NUM_WARM:
                for way, seconds in spent.items():
                    rates[way].append(num_tokens / seconds)
        for way, own in rates.items():
            taken = [length for length in lengths[way] if length]
            tau = sum(taken) / len(taken) if taken else 1.0
            figures[f"{way} | {mode}"] = {
                "tau": tau,
                "by_depth": [sum(n > level for n in taken) / len(taken) for level in range(1, depth + 1) if taken],
                "tokens_per_second": [median(own), min(own), max(own)],
                "speed_up": median(own) / median(rates["plain"]),
                "round": tau * median(rates["plain"]) / median(own),
            }
    return figures


def write_table(figures: dict[str, dict[str, Any]]) -> str:
    """Write the figures as Markdown."""
    lines = ["| | τ | accepted at depth 1, 2 ... | tokens/s | speed-up | round |", "|---|---|---|---|---|---|"]
    for name, own in figures.items():
        rate, low, high = own["tokens_per_second"]
        depths = " ".join(f"{share:.2f}" for share in own["by_depth"])
        lines.append(
            f"| {name.replace(' | ', ', ')} | {own['tau']:.2f} | {depths} | {rate:.0f} ({low:.0f} to {high:.0f}) "
            f"| {own['speed_up']:.2f}x | {own['round']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", type=Path, nargs="+", help="folders of drafts")
    parser.add_argument("--target", type=Path, help="of the glyph world; the tiny world's by default")
    parser.add_argument("--num_prompts", type=int, default=3, help="of a kind")
    parser.add_argument("--num_passes", type=int, default=5)
    parser.add_argument("--tree", type=int, nargs=3, default=TREE, metavar=("NUM_NODES", "DEPTH", "TOP_K"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    target, processor = load_target(arguments.target or CHECKPOINT)
    kinds = tiny_prompts() if arguments.target is None else prompts_by_kind(arguments.num_prompts)
    prompts = [encode_prompts(processor, [row]) for rows in kinds.values() for row in rows[: arguments.num_prompts]]
    drafts, tree = {}, TreeConfig(*arguments.tree, gate=False, ngrams=False)
    for folder in arguments.drafts:
        draft = AutoDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
        draft.tree_config = tree
        drafts[folder.name] = draft
    figures = compare(target, drafts, prompts, arguments.num_passes, tree.depth)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(write_table(figures))


if __name__ == "__main__":
    main()
