"""
What do n-grams add? Calls with and without what stood before as branches of the tree, and with nothing else.

    python -m training.evidence.ngrams                                             # the shipped pair of the tiny world
    python -m training.evidence.ngrams --compiled                                  # with compiled drafting
    python -m training.evidence.ngrams --target SMOLLM2 --prompts FOLDER           # a language model, without a draft

Each prompt is answered plainly and with every assistant in turn, several times, every other time the other way round.
Told are τ, the share of all tokens that plain steps gave because drafting rested, and the median of the speed-ups of
the passes with their range; of the draft with n-grams also its speed over that without, prompt by prompt, the median
and the quartiles. `FOLDER` holds mt_bench.jsonl, gsm8k.jsonl, and so on, with `turns`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from training.real_llava.measure import TEXTS, asked
from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.measure.evaluate import MODES, acceptance_length, timed
from training.tiny_world.measure.measure_drafters import spread
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDDraftModel, NgramDrafter, StaticRuntime
from transformers_msd.costs.provenance import hardware
from transformers_msd.drafters.msd import MSDDrafter


DOCS = Path(__file__).parents[2] / "docs"
DRAFT, BOTH = "draft", "draft and n-grams"
# Also of Transformers' own, greedily, for it draws other samples, and without pictures, for it loses them.
PROMPT_LOOKUP = "prompt lookup (Transformers)"


def compare(
    target: PreTrainedModel, assistants: dict[str, Any], prompts: list[Any], call: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Answer prompts plainly and with each assistant in turn."""
    calls = {name: {"assistant_model": assistant} for name, assistant in assistants.items()}
    if not call["do_sample"] and "pixel_values" not in prompts[0]:
        calls[PROMPT_LOOKUP] = {"prompt_lookup_num_tokens": 10}
    seconds: dict[str, list[float]] = {name: [0.0] * repeats for name in ("plain", *calls)}
    over_draft: list[float] = []
    rounds: dict[str, list[list[int]]] = {name: [] for name in calls}
    equal, num_rested, num_tokens = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0), 0
    for number in range(repeats + 1):  # the first pass warms up, over one prompt
        for seed, inputs in enumerate(prompts if number else prompts[:1]):
            plain, plain_seconds = timed(target, seed, **inputs, **call)
            order = list(calls.items())[:: -1 if number % 2 else 1]
            found = {name: timed(target, seed, **inputs, **call, **own) for name, own in order}
            if not number:
                continue
            if BOTH in found:
                over_draft.append(found[DRAFT][1] / found[BOTH][1])
            seconds["plain"][number - 1] += plain_seconds
            num_tokens += plain.sequences.shape[1] - inputs["input_ids"].shape[1]
            for name, (output, elapsed) in found.items():
                seconds[name][number - 1] += elapsed
                equal[name] += torch.equal(plain.sequences, output.sequences)
                if name != PROMPT_LOOKUP:
                    num_rested[name] += output.speculative_stats.num_plain_steps
                    rounds[name].append(output.speculative_stats.acceptance_lengths[:, 0].tolist())
    results: dict[str, Any] = {"plain step, ms": sum(seconds["plain"]) / num_tokens * 1e3}
    for name in calls:
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
        results[name] = {
            "tau": acceptance_length(rounds[name]) if rounds[name] else None,
            "rested": num_rested[name] / num_tokens if rounds[name] else None,
            "speedup": median(ratios),
            "range": [min(ratios), max(ratios)],
            "equal": f"{equal[name]} of {repeats * len(prompts)}",
        }
    if over_draft:
        results[BOTH]["over the draft"] = spread(over_draft)
    return results


def tiny_pair(num_prompts: int, is_compiled: bool) -> tuple[PreTrainedModel, dict[str, Any], dict[str, list[Any]]]:
    """Load the shipped pair, and encode held-out prompts by kind."""
    target, processor = load_target()
    draft = MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)
    tree = draft.tree_config
    assistants: dict[str, Any] = {
        DRAFT: MSDDrafter(draft, replace(tree, ngrams=False)),
        BOTH: MSDDrafter(draft, replace(tree, ngrams=True)),
    }
    if is_compiled:
        assistants = {name: StaticRuntime(assistant) for name, assistant in assistants.items()}
    assistants["n-grams"] = NgramDrafter()
    prompts: dict[str, list[Any]] = {}
    for row in evaluation_prompts(num_prompts):
        prompts.setdefault(row["group"], []).append(encode_prompts(processor, [row]))
    return target, assistants, prompts


def text_model(folder: str, prompts: Path, num_prompts: int) -> tuple[PreTrainedModel, dict, dict[str, list[Any]]]:
    """Load a language model, and encode prompts by kind."""
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode: Callable[[str], Any] = lambda said: tokenizer.apply_chat_template(  # noqa: E731
        [{"role": "user", "content": said}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    kinds = {kind: [encode(turns[0]) for turns in asked(prompts, kind, num_prompts)] for kind in TEXTS}
    return target, {"n-grams": NgramDrafter()}, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or repository of a language model; the shipped pair by default")
    parser.add_argument("--prompts", type=Path, help="folder of prompts for it")
    parser.add_argument("--num_prompts", type=int, default=8, help="prompts of a kind")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="compile what the shipped draft does")
    parser.add_argument("--output", type=Path, help="docs/ngrams_(tiny|compiled|text).json by default")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.target:
        target, assistants, kinds = text_model(arguments.target, arguments.prompts, arguments.num_prompts)
    else:
        target, assistants, kinds = tiny_pair(arguments.num_prompts, arguments.compiled)
    world = "text" if arguments.target else "compiled" if arguments.compiled else "tiny"
    output = arguments.output or DOCS / f"ngrams_{world}.json"
    results: dict[str, Any] = {"hardware": hardware(target.device)}
    for mode, settings in MODES.items():
        for kind, prompts in kinds.items():
            call = settings | {"max_new_tokens": arguments.max_new_tokens}
            results[f"{kind}, {mode}"] = found = compare(target, assistants, prompts, call, arguments.repeats)
            output.write_text(json.dumps(results, indent=1) + "\n")
            figures = {name: own for name, own in found.items() if isinstance(own, dict)}
            shown = [
                f"{name} {own['speedup']:.2f}x ({own['range'][0]:.2f} to {own['range'][1]:.2f}), {own['equal']}"
                + ("" if own["tau"] is None else f", τ {own['tau']:.2f}, rested {own['rested']:.1%}")
                + (f", {own['over the draft']['median']:.3f} of the draft's speed" if name == BOTH else "")
                for name, own in figures.items()
            ]
            print(f"{kind}, {mode} | {found['plain step, ms']:.1f} ms | " + " | ".join(shown), flush=True)


if __name__ == "__main__":
    main()
