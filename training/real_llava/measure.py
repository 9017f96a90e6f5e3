"""
What drafts of the real LLaVA are worth, by kind of prompt.

    python -m training.real_llava.measure --target LLAVA --drafts MSD MSD_8K DRAFT_VLM --prompts FOLDER

FOLDER holds prompts as EAGLE and Spec-Bench have them, JSONL files of `turns`: mt_bench, gsm8k, humaneval, qa, sum.
Beside these stand prompts of the tiny world with one picture and with two, and second turns of both. Each prompt is
answered in turn by plain `generate`, prompt lookup, Transformers' assisted generation and every draft, greedily and at
temperature 1. Trees are of 16 nodes, or as `--trees` says, and drafted whole in every round, so that τ is the draft's.
`--gated` answers as a call does by default, too, where trees are as large as pays and drafting rests where none does,
and `--ngrams` with n-gram branches in the trees, in turn. A run that is broken off goes on where it stopped.
"""

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BatchFeature, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from training.evidence.runs import collect
from training.tiny_world.build.target import encode_prompts
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import VLMDrafter
from transformers_msd.bench.measure import Runs, run_method
from transformers_msd.bench.methods import Method, make_methods
from transformers_msd.bench.models import load_model
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.bench.summary import summarize
from transformers_msd.compat import CACHE
from transformers_msd.costs.floors import round_floor
from transformers_msd.costs.provenance import hardware
from transformers_msd.drafters.base import models_of
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer.loading import load_processor
from transformers_msd.traits.sizes import num_bytes_per_draft, num_bytes_per_step


DOCS = Path(__file__).parents[2] / "docs"
TEXTS = ("mt_bench", "gsm8k", "humaneval", "qa", "sum")
PICTURES = {"one picture": "image", "two pictures": "images", "second turn on a picture": "second turn"}
SECOND_TURN = "second turn of text"
MODES = {"greedy": {"do_sample": False}, "T=1": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}}
TREE = "16,5,4"
ROWS = (1, 8, 16, 24)  # of one forward
MOST_CHARACTERS = 1500


def asked(folder: Path, kind: str, num_prompts: int) -> list[list[str]]:
    """Return the turns of the first prompts of a file that are not too long for a small model."""
    lines = (folder / f"{kind}.jsonl").read_text().splitlines()
    turns = (json.loads(line)["turns"] for line in lines)
    return [own for own in turns if sum(map(len, own)) <= MOST_CHARACTERS][:num_prompts]


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def prompts_of(
    kind: str,
    folder: Path,
    num_prompts: int,
    target: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    max_new_tokens: int,
) -> list[BatchFeature]:
    """Encode the prompts of a kind; first turns of text are answered by the target."""
    if kind in PICTURES:
        rows = [row for row in evaluation_prompts(num_prompts) if row["group"] == PICTURES[kind]]
    elif kind == SECOND_TURN:
        rows = []
        for first, second, *_ in asked(folder, "mt_bench", num_prompts):
            inputs = encode_prompts(processor, [{"messages": [turn("user", first)], "images": []}])
            said = target.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            text = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages = [turn("user", first), turn("assistant", text), turn("user", second)]
            rows.append({"messages": messages, "images": []})
    else:
        rows = [{"messages": [turn("user", turns[0])], "images": []} for turns in asked(folder, kind, num_prompts)]
    return [encode_prompts(processor, [row]) for row in rows]


def variant(method: Method, name: str, **tree: bool) -> Method:
    """Make a way that differs in the tree's settings."""
    assistant = copy.copy(method.call["assistant_model"])
    assistant.tree_config = replace(assistant.tree_config, **tree)
    return replace(method, name=f"{method.name}, {name}", call=method.call | {"assistant_model": assistant})


def measure(
    target: PreTrainedModel, methods: list[Method], prompts: list[BatchFeature], settings: dict[str, Any]
) -> dict[str, Any]:
    """Answer each prompt by all methods in turn, after a short answer to warm up."""
    for method in methods:
        run_method(target, prompts[0], method, settings | {"max_new_tokens": 8}, 0)
    results = {method.name: Runs(method, passes=[[]], split=[[]]) for method in methods}
    for seed, inputs in enumerate(prompts):
        for method in methods:
            results[method.name].passes[0].append(run_method(target, inputs, method, settings, seed))
    plain = results[methods[0].name]
    found = {}
    for name, runs in results.items():
        row = summarize(runs, plain)
        pairs = zip(runs.passes[0], plain.passes[0], strict=True)
        found[name] = {
            "tau": row["acceptance_length"],
            "by_depth": row["acceptance_by_depth"],
            "round_cost": row["round_cost"],
            "decode": row["decode"]["speedup"],
            "end_to_end": row["end_to_end"]["speedup"],
            "tokens_per_second": row["decode"]["tokens_per_second"],
            "equal": sum(torch.equal(own.tokens, other.tokens) for own, other in pairs),
            "prompts": len(prompts),
        }
    return found


@torch.no_grad()
def forward_seconds(target: PreTrainedModel, num_cached: int = 200, repeats: int = 9) -> dict[str, float]:
    """Time forwards of some rows behind a filled cache."""
    ids = torch.arange(5, 5 + num_cached + max(ROWS))[None]
    cache = target(input_ids=ids[:, :num_cached], use_cache=True)[CACHE]
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(repeats + 1):
        for rows in ROWS:
            start = time.perf_counter()
            target(input_ids=ids[:, num_cached : num_cached + rows], **{CACHE: cache})
            seconds[rows].append(time.perf_counter() - start)
            cache.crop(-rows)
    return {str(rows): median(own[1:]) for rows, own in seconds.items()}


def floor(target: PreTrainedModel, drafter: MSDDrafter | VLMDrafter) -> float:
    """
    Steps that a round takes at least where reading weights takes all the time: a draft is read at each level, a block
    once.
    """
    (draft,) = models_of(drafter)
    num_forwards = drafter.tree_config.depth
    if isinstance(draft, FeatureDraftModel):
        read = num_bytes_per_draft(draft, target)
        num_forwards = 1 if draft.most_levels else num_forwards
    else:
        read = num_bytes_per_step(draft)
    return round_floor(num_bytes_per_step(target), num_forwards * read)


def table(results: dict[str, Any], mode: str, kinds: list[str], cell: str) -> str:
    """Write one figure of every method by kind as Markdown."""
    names = list(results[f"{mode} | {kinds[0]}"])
    lines = [f"| {mode} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        cells = [cell.format(**results[f"{mode} | {kind}"][name]) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafts", nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num_prompts", type=int, default=5, help="of each kind")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trees", nargs="+", default=[TREE], help="nodes,depth,top_k")
    parser.add_argument("--gated", action="store_true", help="also with trees as large as pays, and rests")
    parser.add_argument("--ngrams", action="store_true", help="also with n-gram branches in the trees")
    parser.add_argument("--kinds", nargs="+", default=[*TEXTS, SECOND_TURN, *PICTURES])
    parser.add_argument("--modes", nargs="+", default=[*MODES])
    parser.add_argument("--output", type=Path, help="docs/real_llava_DTYPE.json by default")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    output = arguments.output or DOCS / f"real_llava_{arguments.dtype}.json"
    settings = BenchArguments(
        target_model=arguments.target,
        draft_models=arguments.drafts,
        baselines=["assisted", "prompt_lookup"],
        trees=arguments.trees,
        dtype=arguments.dtype,
    )
    target = load_model(arguments.target, arguments.dtype, "cpu")
    processor = load_processor(arguments.target)
    drafts = {Path(path).name: load_model(path, arguments.dtype, "cpu") for path in arguments.drafts}
    methods, _ = make_methods(settings, target, drafts)
    ours = [method for method in methods if method.drafts_trees]
    for assistant in (method.call["assistant_model"] for method in ours):
        assistant.tree_config = replace(assistant.tree_config, gate=False, ngrams=False)
    more = [variant(method, "gated", gate=True) for method in ours] if arguments.gated else []
    if arguments.ngrams:
        more += [variant(method, "n-grams", ngrams=True) for method in (*ours, *more)]
    methods += more

    def run(mode: str, kind: str) -> dict[str, Any]:
        prompts = prompts_of(
            kind, arguments.prompts, arguments.num_prompts, target, processor, arguments.max_new_tokens
        )
        return measure(target, methods, prompts, MODES[mode] | {"max_new_tokens": arguments.max_new_tokens})

    kinds = arguments.kinds
    results = collect(output, [(mode, kind) for mode in arguments.modes for kind in kinds], run)
    if "machine" not in results:
        results["machine"] = {
            "hardware": hardware(target.device),
            "forward_seconds": forward_seconds(target),
            "floors": {method.name: floor(target, method.call["assistant_model"]) for method in ours},
        }
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["machine"], indent=1))
    for mode in arguments.modes:
        for cell in ("{tau:.2f}", "{decode:.2f}x"):
            print("\n" + table(results, mode, kinds, cell))


if __name__ == "__main__":
    main()
