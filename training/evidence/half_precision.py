"""
How exact is half precision? Drafted answers beside plain ones, and plain ones beside each other.

    python -m training.evidence.half_precision --target HuggingFaceTB/SmolLM2-135M-Instruct --prompts mt_bench.jsonl

In bfloat16 and float16 each prompt is answered greedily by plain `generate`; then on a static cache, in a batch of
two, and drafted in trees of two sizes. Told is how many answers differ from the first, where first, and by how much
plain's logit of its own token exceeded the other's there. The draft is simulated and four times in five right at each
level, so that the rows that stand were verified in trees, as with a trained one. A run that is broken off goes on
where it stopped.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from training.evidence.runs import collect
from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.bench.assistants import Simulated
from transformers_msd.bench.divergence import find_divergences
from transformers_msd.bench.models import load_model
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.trainer.loading import load_processor


DOCS = Path(__file__).parents[2] / "docs"
DTYPES = ("bfloat16", "float16")
TREES = {
    "drafted, 24 nodes": TreeConfig(24, 6, 4, gate=False, ngrams=False),
    "drafted, 59 nodes": TreeConfig(59, 6, 10, gate=False, ngrams=False),
}
RIGHT = 0.8


def tokens_of(target: PreTrainedModel, inputs: dict[str, torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
    """Generate, and return the new tokens."""
    return target.generate(**inputs, **call)[:, inputs["input_ids"].shape[1] :]


def answer(
    target: PreTrainedModel, inputs: dict[str, torch.Tensor], pair: dict[str, torch.Tensor], call: dict, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Answer a prompt, the first of a pair, by all methods; tell where they part from plain decoding."""
    torch.manual_seed(0)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).to(target.dtype).eval()
    plain = tokens_of(target, inputs, call)
    answers = {
        "plain, static cache": tokens_of(target, inputs, call | {"cache_implementation": "static"}),
        "plain, in a batch of 2": tokens_of(target, pair, call)[:1],
    }
    for name, tree in TREES.items():
        assistant = Simulated(MSDDrafter(draft, tree), RIGHT)
        assistant.continuation, assistant.seed = plain, seed
        answers[name] = tokens_of(target, inputs, call | {"assistant_model": assistant})
    return {
        name: [asdict(one) for one in find_divergences(target, inputs, call, 0, plain, tokens)]
        for name, tokens in answers.items()
    }


def summary(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Write how many answers part from plain decoding, by dtype and method, as Markdown."""
    lines = ["| dtype | answers | differ | median first place | largest gap of logits |", "|---" * 5 + "|"]
    groups: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    for key, found in results.items():
        for name, differing in found.items():
            groups.setdefault((key.partition(" | ")[0], name), []).append(differing)
    for (dtype, name), rows in sorted(groups.items()):
        differing = [one for row in rows for one in row]
        place = median(one["step"] for one in differing) if differing else ""
        gap = f"{max(one['logit_gap'] or 0.0 for one in differing):.3f}" if differing else ""
        lines.append(f"| {dtype} | {name} | {len(differing)} of {len(rows)} | {place} | {gap} |")
    return "\n".join(lines)


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
    # A target that sees pictures is asked in text alone.
    tokenizer.chat_template = load_processor(arguments.target).chat_template
    asked = [json.loads(line)["turns"][0] for line in arguments.prompts.read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)
        for said in asked[: arguments.num_prompts + 1]
    ]
    # Each prompt also in a batch with the next, the shorter of them padded.
    prompts = [dict(tokenizer(text, return_tensors="pt")) for text in texts[:-1]]
    pairs = [dict(tokenizer(texts[i : i + 2], return_tensors="pt", padding=True)) for i in range(len(prompts))]
    call = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens, "disable_compile": True}
    targets = {dtype: load_model(arguments.target, dtype, "cpu") for dtype in DTYPES}

    def run(dtype: str, number: str) -> dict[str, list[dict[str, Any]]]:
        i = int(number)
        return answer(targets[dtype], prompts[i], pairs[i], call, seed=i)

    runs = [(dtype, str(number)) for number in range(len(prompts)) for dtype in DTYPES]
    print(summary(collect(arguments.output, runs, run)))


if __name__ == "__main__":
    main()
