"""
What rounds cost on a recurrent target, whose accepted tokens run again where a round was not accepted whole.

    python -m training.evidence.recurrent

A text model of Qwen3.5's kind and random weights, three of four layers recurrent, and chains of simulated drafts, so
many of which are right. Repeated tokens run at the head of the next forward, as they do by default, or alone at once.
Told is what a round costs in plain steps, and what comes of it. Without the kernels of `flash-linear-attention` a
forward over several tokens goes through PyTorch's reference of them, which pads them to 64.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.utils import logging

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.bench.assistants import Simulated
from transformers_msd.compat import CACHE
from transformers_msd.costs.provenance import hardware
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.target import stateful


DOCS = Path(__file__).parents[2] / "docs"
WIDTH, NUM_LAYERS = 1024, 8
WAYS = {"with the next": stateful.MOST_BEHIND, "alone": 0}
DEPTHS, RIGHT = (4, 6), (0.6, 0.8, 1.0)


def make_target() -> Qwen3_5ForCausalLM:
    config = Qwen3_5TextConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    target = Qwen3_5ForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    return target


@torch.no_grad()
def forward_seconds(target: Qwen3_5ForCausalLM, num_rows: int, repeats: int = 20) -> float:
    """Time a forward of some rows behind 64 others."""
    seconds = []
    for _ in range(repeats):
        cache = target(input_ids=torch.arange(64)[None], use_cache=True)[CACHE]
        start = time.perf_counter()
        target(input_ids=torch.arange(num_rows)[None], **{CACHE: cache})
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=DOCS / "recurrent.json")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    target = make_target()
    inputs = {"input_ids": torch.arange(16)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    settings = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "return_dict_in_generate": True}

    def call(assistant: Any = None) -> tuple[Any, float]:
        """Answer some times; return the output, and the median of the seconds."""
        seconds = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            output = target.generate(**inputs, **settings, assistant_model=assistant)
            seconds.append(time.perf_counter() - start)
        return output, median(seconds)

    call()
    plain, plain_seconds = call()
    step = plain_seconds / arguments.max_new_tokens
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    results: dict[str, Any] = {
        "hardware": hardware(target.device),
        "plain_tokens_per_second": 1 / step,
        "forward_in_steps": {rows: forward_seconds(target, rows) / forward_seconds(target, 1) for rows in (5, 7, 16)},
        "rounds": [],
    }
    for depth in DEPTHS:
        for right in RIGHT:
            for way, most in WAYS.items():
                stateful.MOST_BEHIND = most
                chain = TreeConfig(num_nodes=depth + 1, depth=depth, top_k=1, gate=False, ngrams=False)
                assistant = Simulated(MSDDrafter(draft, chain), right)
                assistant.continuation = plain.sequences[:, 16:]
                drafted, seconds = call(assistant)
                stats = drafted.speculative_stats
                row = {
                    "depth": depth,
                    "right": right,
                    "repeated": way,
                    "tau": stats.mean_acceptance_length,
                    "repeated_per_round": stats.num_repeated / stats.num_rounds,
                    "round_in_steps": seconds / stats.num_rounds / step,
                    "speedup": plain_seconds / seconds,
                    "equal": torch.equal(drafted.sequences, plain.sequences),
                }
                results["rounds"].append(row)
                print(row, flush=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({name: value for name, value in results.items() if name != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
