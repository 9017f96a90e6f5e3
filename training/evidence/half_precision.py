"""
How exact is half precision? Drafted answers beside plain ones, and plain ones beside each other.

    python -m training.evidence.half_precision --target HuggingFaceTB/SmolLM2-135M-Instruct --prompts mt_bench.jsonl

In bfloat16 and float16 each prompt is answered greedily by plain `generate`; then again, on a static cache, in a batch
of two, and drafted in trees of two sizes. Told is how many answers differ from the first, where first, and by how much
plain's logit of its own token exceeded the other's there. The draft is simulated and four times in five right at each
level, so that the rows that stand were verified in trees, as with a trained one.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.bench.assistants import Simulated
from transformers_msd.bench.divergence import find_divergences
from transformers_msd.drafters.msd import MSDDrafter


DOCS = Path(__file__).parents[2] / "docs"
DTYPES = ("bfloat16", "float16")
TREES = {"drafted, 24 nodes": TreeConfig(24, 6, 4, gate=False), "drafted, 59 nodes": TreeConfig(59, 6, 10, gate=False)}
RIGHT = 0.8


def tokens_of(target: PreTrainedModel, inputs: dict[str, torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
    """Generate, and return the new tokens."""
    return target.generate(**inputs, **call)[:, inputs["input_ids"].shape[1] :]


def measure(
    target: PreTrainedModel, prompts: list[dict[str, torch.Tensor]], pairs: list[dict[str, torch.Tensor]], call: dict
) -> dict[str, dict[str, Any]]:
    """Answer all prompts by all methods, and tell where they differ from plain decoding."""
    torch.manual_seed(0)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).to(target.dtype).eval()
    found: dict[str, list] = {}
    for number, inputs in enumerate(prompts):
        plain = tokens_of(target, inputs, call)
        answers = {
            "plain, again": tokens_of(target, inputs, call),
            "plain, static cache": tokens_of(target, inputs, call | {"cache_implementation": "static"}),
            "plain, in a batch of 2": tokens_of(target, pairs[number], call)[:1],
        }
        for name, tree in TREES.items():
            assistant = Simulated(MSDDrafter(draft, tree), RIGHT)
            assistant.continuation, assistant.seed = plain, number
            answers[name] = tokens_of(target, inputs, call | {"assistant_model": assistant})
        for name, tokens in answers.items():
            found.setdefault(name, []).extend(find_divergences(target, inputs, call, 0, plain, tokens))
        print(f"prompt {number + 1} of {len(prompts)}, {plain.shape[1]} tokens", flush=True)
    return {
        name: {
            "answers": len(prompts),
            "differ": len(differing),
            "median_first_place": median([one.step for one in differing]) if differing else None,
            "largest_gap": max((one.logit_gap or 0.0 for one in differing), default=None),
            "all": [asdict(one) for one in differing],
        }
        for name, differing in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or repository")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of `turns`, as EAGLE's and Spec-Bench's")
    parser.add_argument("--num_prompts", type=int, default=10)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=DOCS / "half_precision.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, padding_side="left")
    asked = [json.loads(line)["turns"][0] for line in arguments.prompts.read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)
        for said in asked[: arguments.num_prompts + 1]
    ]
    prompts = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    # Each prompt with the next: of one length no longer, so the shorter is padded.
    pairs = [dict(tokenizer(texts[i : i + 2], return_tensors="pt", padding=True)) for i in range(len(texts) - 1)]
    call = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens, "disable_compile": True}
    results = {}
    for dtype in DTYPES:
        target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=getattr(torch, dtype)).eval()
        results[dtype] = measure(target, prompts[:-1], pairs, call)
        print(f"\n| {dtype} | answers that differ | median first place | largest gap of logits |\n|---|---|---|---|")
        for name, row in results[dtype].items():
            cells = (name, f"{row['differ']} of {row['answers']}", row["median_first_place"], row["largest_gap"])
            print(f"| {' | '.join(map(str, cells))} |")
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
