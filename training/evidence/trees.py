"""
Is a tree that follows the draft better than one of a fixed shape, and a tree better than a chain?

    python -m training.evidence.trees                                      # the shipped pair of the tiny world
    python -m training.evidence.trees --world glyphs --target T --draft D  # a pair of the glyph world
    python -m training.evidence.trees --world real --target T --draft D --draft_vlm V --prompts FOLDER  # a real LLaVA

All trees have 5 levels, and all but the chain 25 drafted nodes in the mean: EAGLE's static tree (arXiv 2401.15077),
EAGLE-2's, which takes the likeliest nodes (arXiv 2406.16858), and one cut where the draft is unsure (Spec-LLaVA, arXiv
2509.11961), its threshold searched on the first prompts so that it has as many. Beside these stands the tree that
chooses its size by what rounds were measured to cost, within the same bounds. Greedy and at temperature 1, each prompt
by plain `generate` and with every tree in turn.
"""

import argparse
import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from training.evidence.two_stages import tiny_prompts
from training.glyph_world import world as glyph_world
from training.real_llava.measure import TEXTS, asked, turn
from training.tiny_world.build.target import CHECKPOINT, encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.build.train_draft_vlm import DRAFT_VLM_CHECKPOINT
from training.tiny_world.measure.evaluate import MODES, acceptance_length, timed
from training.tiny_world.measure.measure_drafters import TOLERANCE
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.costs.calibration import save_costs
from transformers_msd.costs.provenance import hardware
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.trees.topology import EAGLE
from transformers_msd.tuning import measure_costs


DOCS = Path(__file__).parents[2] / "docs"
DEPTH, NUM_DRAFTED = 5, len(EAGLE)
LIKELIEST = "likeliest nodes (EAGLE-2), 10 choices"
TREES = {
    "chain": TreeConfig(DEPTH + 1, DEPTH, 1, gate=False, ngrams=False),
    "static (EAGLE)": TreeConfig(topology=EAGLE, gate=False),
    "likeliest nodes (EAGLE-2), 4 choices": TreeConfig(NUM_DRAFTED + 1, DEPTH, 4, gate=False, ngrams=False),
    LIKELIEST: TreeConfig(NUM_DRAFTED + 1, DEPTH, 10, gate=False, ngrams=False),
}
UNSURE_CUT = "cut where unsure (Spec-LLaVA)"
COST_AWARE = "sized by what rounds cost"


def costs_in(home: str) -> AbstractContextManager:
    """Let trees be sized by the costs that were saved in a folder."""
    return patch("transformers_msd.costs.calibration.HF_HOME", home)


def drafted_by_round(
    target: LlavaForConditionalGeneration, drafter: Any, prompts: list[BatchFeature], call: dict
) -> float:
    """Mean number of drafted nodes of a round."""
    num_drafted = num_rounds = 0
    for inputs in prompts:
        stats = timed(target, 0, **inputs, **call, assistant_model=drafter)[0].speculative_stats
        num_drafted, num_rounds = num_drafted + stats.num_drafted, num_rounds + stats.num_rounds
    return num_drafted / max(num_rounds, 1)


def cut_tree(
    target: LlavaForConditionalGeneration, drafter: Any, prompts: list[BatchFeature], call: dict
) -> TreeConfig:
    """Search the threshold at which trees have `NUM_DRAFTED` nodes in the mean."""
    low, high = 1e-6, 0.5
    for _ in range(8):
        middle = (low * high) ** 0.5
        drafter.tree_config = TreeConfig(4 * NUM_DRAFTED, DEPTH, 10, middle, gate=False, ngrams=False)
        if drafted_by_round(target, drafter, prompts, call) > NUM_DRAFTED:
            low = middle
        else:
            high = middle
    return TreeConfig(4 * NUM_DRAFTED, DEPTH, 10, (low * high) ** 0.5, gate=False, ngrams=False)


def compare(
    target: LlavaForConditionalGeneration, drafter: Any, prompts: list[BatchFeature], call: dict
) -> dict[str, dict[str, float]]:
    """Answer every prompt plainly and with each tree in turn."""
    cut = cut_tree(target, drafter, prompts[::4], call)
    trees = TREES | {UNSURE_CUT: cut, COST_AWARE: TREES[LIKELIEST]}
    home = tempfile.mkdtemp()
    with costs_in(home):
        save_costs([measure_costs(target, drafter, tolerance=TOLERANCE)], list(drafter.models), target)
    rounds: dict[str, list[list[int]]] = {name: [] for name in trees}
    totals = {name: {"seconds": 0.0, "plain": 0.0, "drafted": 0, "equal": 0} for name in trees}
    num_tokens = 0
    for seed, inputs in enumerate(prompts):
        plain, plain_seconds = timed(target, seed, **inputs, **call)
        num_tokens += plain.sequences.shape[1] - inputs["input_ids"].shape[1]
        for name, tree in trees.items():
            drafter.tree_config = tree
            with costs_in(home) if name == COST_AWARE else nullcontext():
                output, seconds = timed(target, seed, **inputs, **call, assistant_model=drafter)
            found = totals[name]
            found["seconds"] += seconds
            found["plain"] += plain_seconds
            found["drafted"] += output.speculative_stats.num_drafted
            found["equal"] += torch.equal(plain.sequences, output.sequences)
            rounds[name].append(output.speculative_stats.acceptance_lengths[:, 0].tolist())
    return {
        name: {
            "tau": acceptance_length(rounds[name]),
            "drafted": found["drafted"] / sum(map(len, rounds[name])),
            "speedup": found["plain"] / found["seconds"],
            "equal": found["equal"],
            "prompts": len(prompts),
            "min_probability": trees[name].min_probability,
            "plain_tokens_per_second": num_tokens / found["plain"],
        }
        for name, found in totals.items()
    }


def prompts_of(world: str, processor: LlavaProcessor, folder: Path | None, num_prompts: int) -> list[BatchFeature]:
    """Encode the prompts of a world, those of one kind behind those of another."""
    if world == "real":
        texts = [turns[0] for kind in TEXTS for turns in asked(folder, kind, num_prompts // len(TEXTS))]
        rows = [{"messages": [turn("user", said)], "images": []} for said in texts]
        rows += [row for row in evaluation_prompts(num_prompts) if row["group"] == "image"]
    else:
        kinds = tiny_prompts(num_prompts) if world == "tiny" else glyph_world.prompts_by_kind(num_prompts)
        rows = [row for prompts in kinds.values() for row in prompts]
    return [encode_prompts(processor, [row]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("tiny", "glyphs", "real"), default="tiny")
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--draft", type=Path, default=DRAFT_CHECKPOINT)
    parser.add_argument("--draft_vlm", type=Path, help="of the tiny world the shipped one")
    parser.add_argument("--prompts", type=Path, help="of the real LLaVA, as for `training.real_llava.measure`")
    parser.add_argument(
        "--num_prompts", type=int, default=20, help="of a kind, text and pictures; of the real LLaVA at least 5"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", type=Path, help="docs/trees_WORLD.json by default")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    target, processor = load_target(arguments.target)
    drafters: dict[str, Any] = {"MSD": MSDDrafter(MSDDraftModel.from_pretrained(arguments.draft, dtype=torch.float32))}
    draft_vlm = arguments.draft_vlm or (DRAFT_VLM_CHECKPOINT if arguments.world == "tiny" else None)
    if draft_vlm is not None:
        small = LlavaForConditionalGeneration.from_pretrained(draft_vlm, dtype=torch.float32).eval()
        drafters["a small VLM"] = VLMDrafter(small)
    prompts = prompts_of(arguments.world, processor, arguments.prompts, arguments.num_prompts)
    results: dict[str, Any] = {"hardware": hardware(target.device)}
    output = arguments.output or DOCS / f"trees_{arguments.world}.json"
    for name, drafter in drafters.items():
        for mode in arguments.modes:
            settings = MODES[mode]
            found = compare(target, drafter, prompts, settings | {"max_new_tokens": 100})
            results[f"{name}, {mode}"] = found
            output.write_text(json.dumps(results, indent=1) + "\n")
            print(f"\n| {name}, {mode} | drafted | τ | speed-up | equal |\n|---|---|---|---|---|")
            for tree, row in found.items():
                print(
                    f"| {tree} | {row['drafted']:.1f} | {row['tau']:.2f} | {row['speedup']:.2f}x "
                    f"| {row['equal']} of {row['prompts']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
