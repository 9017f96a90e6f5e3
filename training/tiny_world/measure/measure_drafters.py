"""
Measure what drafters promise about time, on the tiny world: `python -m training.tiny_world.measure.measure_drafters`.

- `trees`: the cost-aware tree against fixed trees of many sizes, on prompts of each group.
- `hostile`: what drafting costs where it is of no use, against plain decoding.
- `views`: several views of a prompt in one batch, against one after another.
- `rests`: which share of the tokens the gate lets come plainly, where drafting pays and where it does not.
- `batches`: ragged batches of several sizes, against plain decoding of the same.

All runs are interleaved; ratios are medians, with the quartiles in brackets.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from transformers import BatchFeature, LlavaForConditionalGeneration
from transformers.utils import logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.build.train_draft_vlm import DRAFT_VLM_CHECKPOINT
from training.tiny_world.measure.compare_drafters import GROUPS, Captioner
from training.tiny_world.measure.evaluate import MODES, timed
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import Caption, EnsembleDrafter, MSDDraftModel, Pooled, TextOnly, TreeConfig, VLMDrafter
from transformers_msd.bench.assistants import PhaseTimer
from transformers_msd.costs.calibration import save_costs
from transformers_msd.costs.provenance import commit, hardware
from transformers_msd.costs.rounds import forward_cost
from transformers_msd.drafters.model import ModelCandidateGenerator
from transformers_msd.drafters.msd_candidates import MSDCandidateGenerator
from transformers_msd.tuning import measure_costs


# Nodes, depth, top-k.
FIXED_TREES = ((3, 2, 1), (5, 4, 1), (7, 6, 1), (8, 4, 2), (16, 5, 3), (24, 6, 4), (32, 6, 4))
BATCH_SIZES = (1, 2, 4, 8, 16)
# Of the costs by which trees are sized: on a shared machine 5 % may not be reached.
TOLERANCE = 0.3
LARGEST = TreeConfig(num_nodes=48, depth=8, top_k=4, ngrams=False)
# No draft knows what a target says at this temperature.
HOSTILE = {
    "do_sample": True,
    "temperature": 4.0,
    "top_k": 20,
    "max_new_tokens": 512,
    "eos_token_id": 10**6,  # is never said: no answer ends early
}


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median(values), "low": low, "high": high}


def show(name: str, figure: dict[str, float]) -> None:
    print(f"| {name} | {figure['median']:.2f} ({figure['low']:.2f} to {figure['high']:.2f}) |", flush=True)


class World:
    """The shipped models, and held-out prompts by their group."""

    def __init__(self, num_per_group: int) -> None:
        self.target, self.processor = load_target()
        self.msd = MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32).eval()
        self.draft_vlm = LlavaForConditionalGeneration.from_pretrained(
            DRAFT_VLM_CHECKPOINT, dtype=torch.float32
        ).eval()
        self.all_prompts: dict[str, list[BatchFeature]] = {}
        for prompt in evaluation_prompts(num_per_group):
            self.all_prompts.setdefault(prompt["group"], []).append(encode_prompts(self.processor, [prompt]))
        self.prompts = {group: self.all_prompts[group] for group in GROUPS}

    def seconds(self, prompts: list[BatchFeature], assistant: Any, **settings: Any) -> float:
        """Answer prompts; return the seconds it took."""
        settings = {"do_sample": False, "max_new_tokens": 160} | settings
        return sum(
            timed(self.target, seed, **inputs, **settings, assistant_model=assistant)[1]
            for seed, inputs in enumerate(prompts)
        )


def trees(world: World, repeats: int) -> dict[str, Any]:
    """Answer every group with fixed trees, and with trees sized by what rounds cost here, and by what is assumed."""
    results: dict[str, Any] = {}
    for name, assistant in {"draft VLM": VLMDrafter(world.draft_vlm), "MSD": world.msd}.items():
        settings = assistant.tree_config
        with tempfile.TemporaryDirectory() as home, patch("transformers_msd.costs.calibration.HF_HOME", home):
            drafts = [world.msd] if assistant is world.msd else [world.draft_vlm]
            save_costs([measure_costs(world.target, assistant, tolerance=TOLERANCE)], drafts, world.target)
            configs = {
                f"{n} nodes, depth {d}, top-k {k}": TreeConfig(n, d, k, gate=False, ngrams=False)
                for n, d, k in FIXED_TREES
            }
            configs = {"costs measured": LARGEST, "costs assumed": LARGEST} | configs
            for group, prompts in world.prompts.items():
                seconds: dict[str, list[float]] = {label: [] for label in ("plain", *configs)}
                for repeat in range(repeats + 1):  # the first one warms up
                    for label, config in {"plain": None, **configs}.items():
                        assistant.tree_config = config or settings
                        where = home if label == "costs measured" else f"{home}/nowhere"
                        with patch("transformers_msd.costs.calibration.HF_HOME", where):
                            elapsed = world.seconds(prompts, assistant if config else None)
                        if repeat:
                            seconds[label].append(elapsed)
                print(f"\n{name}, {group}: speed-up over plain\n|---|---|")
                results[f"{name}, {group}"] = speedups = {
                    label: spread([plain / own for plain, own in zip(seconds["plain"], values, strict=True)])
                    for label, values in seconds.items()
                    if label != "plain"
                }
                for label, figure in speedups.items():
                    show(label, figure)
        assistant.tree_config = settings
    return results


def hostile(world: World, repeats: int) -> dict[str, Any]:
    """Answer prompts so that no draft is of use; with costs measured here and without."""
    prompts = [inputs for group in world.prompts.values() for inputs in group]
    results: dict[str, Any] = {}
    print("\nSeconds with the drafter for each second without, where it is of no use\n|---|---|")
    ensemble = EnsembleDrafter(world.draft_vlm, ("multimodal", TextOnly()), (0.5, 0.5))
    for name, assistant in {"MSD": world.msd, "draft VLM": VLMDrafter(world.draft_vlm), "ensemble": ensemble}.items():
        with tempfile.TemporaryDirectory() as home, patch("transformers_msd.costs.calibration.HF_HOME", home):
            drafts = [world.msd] if assistant is world.msd else [world.draft_vlm]
            for label in ("not measured", "measured"):
                if label == "measured":
                    save_costs([measure_costs(world.target, assistant, tolerance=TOLERANCE)], drafts, world.target)
                ratios = []
                for repeat in range(repeats + 1):
                    for inputs in prompts if repeat else prompts[:1]:
                        plain, own = (world.seconds([inputs], each, **HOSTILE) for each in (None, assistant))
                        if repeat:
                            ratios.append(own / plain)
                results[f"{name}, costs {label}"] = spread(ratios)
                show(f"{name}, costs {label}", results[f"{name}, costs {label}"])
    return results


def rests(world: World, repeats: int) -> dict[str, Any]:
    """
    Count the tokens that come plainly since drafting rests, of prompts where it pays, and of those where it does not:
    where whole trees in every round bring fewer tokens than they are taken to cost steps. No time is measured.
    """
    results: dict[str, Any] = {}
    print("\nTokens that came plainly, of prompts where drafting pays and of those where it does not\n|---|---|")
    generators = {MSDCandidateGenerator: world.msd, ModelCandidateGenerator: VLMDrafter(world.draft_vlm)}
    for generator, assistant in generators.items():
        tree = assistant.tree_config
        cost = generator.assumed_level_cost["cpu"] * tree.depth + forward_cost(tree.num_nodes, "cpu")
        for mode, settings in MODES.items():
            for group, prompts in world.all_prompts.items():
                counts = {kind: {"prompts": 0, "tokens": 0, "plain": 0} for kind in ("pays", "does not")}
                for seed, inputs in enumerate(prompts):
                    call = {**inputs, **settings, "max_new_tokens": 100, "assistant_model": assistant}
                    gated = timed(world.target, seed, **call)[0].speculative_stats
                    assistant.tree_config = replace(tree, gate=False)
                    stats = timed(world.target, seed, **call)[0].speculative_stats
                    assistant.tree_config = tree
                    counted = counts["pays" if stats.mean_acceptance_length >= cost else "does not"]
                    counted["prompts"] += 1
                    counted["tokens"] += int(gated.acceptance_lengths.sum())
                    counted["plain"] += gated.num_plain_steps
                name = f"{'MSD' if assistant is world.msd else 'draft VLM'}, {mode}, {group}"
                results[name] = {"cost": cost} | counts
                said = (f"{own['plain']} of {own['tokens']}, {own['prompts']} prompts" for own in counts.values())
                print(f"| {name} | {' | '.join(said)} |", flush=True)
    return results


def views(world: World, repeats: int) -> dict[str, Any]:
    """Draft with four views in one batch, and with each alone."""
    text, pooled, caption = TextOnly(), Pooled(3, 3), Caption(Captioner(world.draft_vlm, world.processor))
    alone = {"multimodal": "multimodal", "text only": text, "pooled": pooled, "caption": caption}
    tree = TreeConfig(num_nodes=16, depth=5, top_k=3, gate=False, ngrams=False)

    def drafter(*chosen: Any) -> PhaseTimer:
        return PhaseTimer(EnsembleDrafter(world.draft_vlm, chosen, (1 / len(chosen),) * len(chosen), tree_config=tree))

    drafters = {name: drafter(view) for name, view in alone.items()} | {"all four": drafter(*alone.values())}
    prompts = [inputs for group in world.prompts.values() for inputs in group]
    starts: dict[str, list[float]] = {name: [] for name in drafters}
    rounds: dict[str, list[float]] = {name: [] for name in drafters}
    for repeat in range(repeats + 1):
        for seed, inputs in enumerate(prompts):
            for name, timer in drafters.items():
                timed(world.target, seed, **inputs, do_sample=False, max_new_tokens=48, assistant_model=timer)
                seconds = [length for phase, _, length in timer.notes if phase == "draft"]
                if repeat:
                    starts[name].append(seconds[0])
                    rounds[name].append(median(seconds[1:]))
    results: dict[str, Any] = {}
    print("\nDrafting, milliseconds\n|---|---|")
    for name in drafters:
        results[name] = {"first round": median(starts[name]) * 1e3, "round": median(rounds[name]) * 1e3}
        print(f"| {name} | first {results[name]['first round']:.1f}, later {results[name]['round']:.2f} |")
    for phase, seconds in (("first round", starts), ("later rounds", rounds)):
        together = seconds["all four"]
        one_by_one = [sum(values) for values in zip(*(seconds[name] for name in alone), strict=True)]
        for label, others in (("four one after another", one_by_one), ("one, multimodal", seconds["multimodal"])):
            figure = spread([own / other for own, other in zip(together, others, strict=True)])
            results[f"{phase}: all four over {label}"] = figure
            show(f"{phase}: all four over {label}", figure)
    return results


def batches(world: World, repeats: int) -> dict[str, Any]:
    """Answer batches whose rows end at different steps, the rows that end staying in the batch and leaving it."""
    prompts = evaluation_prompts()
    Random(0).shuffle(prompts)
    results: dict[str, Any] = {}
    print("\nSpeed-up over plain, end to end\n| batch size, ended rows stay or leave |  |\n|---|---|")
    for size in BATCH_SIZES:
        inputs = [encode_prompts(world.processor, prompts[start : start + size]) for start in range(0, 16, size)]
        # Where the output is returned with its cache and statistics, ended rows must stay in it.
        calls = {"plain": (None, False), "stay": (world.msd, True), "leave": (world.msd, False)}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 1):
            for name, (assistant, returns_state) in calls.items():
                elapsed = world.seconds(inputs, assistant, return_dict_in_generate=returns_state)
                if repeat:
                    seconds[name].append(elapsed)
        for name in ("stay", "leave"):
            figure = spread([plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)])
            results[f"{size}, {name}"] = figure
            show(f"{size}, {name}", figure)
    return results


MEASUREMENTS: dict[str, Callable[[World, int], dict[str, Any]]] = {
    "trees": trees,
    "hostile": hostile,
    "rests": rests,
    "views": views,
    "batches": batches,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", default=list(MEASUREMENTS), help=f"some of {list(MEASUREMENTS)}")
    parser.add_argument("--num-per-group", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where the figures are saved as JSON")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    world = World(arguments.num_per_group)
    results: dict[str, Any] = {
        "hardware": hardware(world.target.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    for name in arguments.measurements:
        results[name] = MEASUREMENTS[name](world, arguments.repeats)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
