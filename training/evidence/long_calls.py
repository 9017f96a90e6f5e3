"""
How much memory a long call takes on a target whose layers see a window, drafted and plain.

    python -m training.evidence.long_calls

Each call is made in a process of its own, 4,000 tokens by a model of random weights with windows of 512, and once by
the same with layers that see everything. Told is the most memory that the process had above what it had before the
call: 24 KiB a row of the cache.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.bench.assistants import Simulated
from transformers_msd.costs.provenance import hardware
from transformers_msd.drafters.msd import MSDDrafter


DOCS = Path(__file__).parents[2] / "docs"
WINDOW, NUM_LAYERS, WIDTH = 512, 6, 512
CALLS = ("plain, window", "drafted, window", "plain, all", "drafted, all")
TREE = TreeConfig(16, 5, 4, gate=False, ngrams=False)


def call(name: str, num_tokens: int, folder: Path) -> dict[str, float | bool]:
    """Make one call; return the MiB it took, and whether a drafted one has plain's tokens, which stand in a folder."""
    kind, sees = name.split(", ")
    said = folder / f"{sees}.pt"
    config = MistralConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        sliding_window=WINDOW if sees == "window" else None,
        max_position_embeddings=2 * num_tokens,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    target = MistralForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    settings = {"do_sample": False, "max_new_tokens": num_tokens}
    assistant = None
    if kind == "drafted":
        draft = MSDDraftModel(MSDConfig.from_target(config)).eval()
        assistant = Simulated(MSDDrafter(draft, TREE), 0.8)
        assistant.continuation = torch.load(said)[:, 8:]
    target.generate(**inputs, **settings | {"max_new_tokens": 8}, assistant_model=assistant)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = target.generate(**inputs, **settings, assistant_model=assistant)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"mib": round((after - before) / 1024, 1)}
    if kind == "drafted":
        return found | {"equal": torch.equal(tokens, torch.load(said))}
    torch.save(tokens, said)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", choices=CALLS, help="one of them, printed")
    parser.add_argument("--num_tokens", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path("/tmp/long_calls"))
    parser.add_argument("--output", type=Path, default=DOCS / "long_calls.json")
    arguments = parser.parse_args()
    if arguments.call:
        print(json.dumps(call(arguments.call, arguments.num_tokens, arguments.work)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    for name in CALLS:
        command = [sys.executable, "-m", "training.evidence.long_calls", "--call", name]
        command += ["--num_tokens", str(arguments.num_tokens), "--work", str(arguments.work)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = json.loads(said.splitlines()[-1])
        print(name, results[name], flush=True)
    results["machine"] = hardware(torch.device("cpu"))
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
