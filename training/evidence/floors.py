"""
What rounds cost at the least, counted by the weights they read: from configs alone, nothing is loaded or timed.

    python -m training.evidence.floors

Text models of the published sizes, and of any other target by `--target`, beside drafts of each family. A plain step
reads the target's layers and head, a level of the tree the draft's layers and the head it uses, or all levels at once
do, in bfloat16 or, of the draft, in int8, its scales left out. Kernels, caches and arithmetic come on top.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from transformers_msd import (
    BlockDraftConfig,
    BlockDraftModel,
    Eagle3Config,
    Eagle3DraftModel,
    MSDConfig,
    MSDDraftModel,
)
from transformers_msd.bench.models import named_config
from transformers_msd.costs.floors import round_floor
from transformers_msd.drafters.loading import auto_class
from transformers_msd.traits.sizes import num_bytes_per_step


DOCS = Path(__file__).parents[2] / "docs"
DEPTH = 6
WANTED = 2.0  # times as many tokens a second
FEWER_TOKENS = 32000
DRAFT_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


def known_configs() -> dict[str, PreTrainedConfig]:
    """Make the configs of targets whose sizes are published."""
    qwen = {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    qwen3 = {"num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False}
    return {
        "LLaVA-1.5-7B": named_config("llava-1.5-7b"),
        "LLaVA-1.5-13B": named_config("llava-1.5-13b"),
        "Qwen2.5-VL-7B": Qwen2_5_VLConfig(
            text_config=qwen
            | {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            tie_word_embeddings=False,
        ),
        "Qwen3-VL-8B": Qwen3VLConfig(
            text_config=qwen3
            | {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "head_dim": 128,
            },
            tie_word_embeddings=False,
        ),
    }


def weights_of_msd(config: PreTrainedConfig, draft_vocab_size: int | None) -> tuple[int, int]:
    """Count the weights that a round reads once, and those that each level does: one layer, the fusion, and a head."""
    with torch.device("meta"):
        draft = MSDDraftModel(MSDConfig.from_target(config))
    return 0, draft.num_parameters() + _head(config, draft_vocab_size)


def weights_of_eagle3(config: PreTrainedConfig, draft_vocab_size: int | None) -> tuple[int, int]:
    """The same of EAGLE-3, which fuses what it reads of the target once, and has a head of its own."""
    with torch.device("meta"):
        draft = Eagle3DraftModel(Eagle3Config.from_target(config, draft_vocab_size=draft_vocab_size))
    fusion = draft.fc.weight.numel()
    return fusion, draft.num_parameters() - fusion


def weights_of_block(config: PreTrainedConfig, draft_vocab_size: int | None) -> tuple[int, int]:
    """The same of a block draft of four layers, which says all levels in one forward."""
    with torch.device("meta"):
        draft = BlockDraftModel(BlockDraftConfig.from_target(config, num_hidden_layers=4))
    return draft.num_parameters() + _head(config, draft_vocab_size), 0


def _head(config: PreTrainedConfig, draft_vocab_size: int | None) -> int:
    text_config = config.get_text_config()
    return (draft_vocab_size or text_config.vocab_size) * text_config.hidden_size


# A column for each family of drafts.
FAMILIES = {"MSD": weights_of_msd, "EAGLE-3": weights_of_eagle3, "a block, 4 layers": weights_of_block}


def floors_of(name: str, config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of a target: drafts of both dtypes, with all tokens and with fewer."""
    with torch.device("meta"):
        target = auto_class(config).from_config(config, dtype=torch.bfloat16)
    step, vocab_size = num_bytes_per_step(target), config.get_text_config().vocab_size
    # LLaVA-1.5 has 32,000 tokens, and 64 places.
    sizes = [None, FEWER_TOKENS] if vocab_size > 2 * FEWER_TOKENS else [None]
    for tokens in sizes:
        for dtype_name, dtype in DRAFT_DTYPES.items():
            row: dict[str, Any] = {"target": name, "draft": dtype_name, "tokens": tokens or vocab_size, "step": step}
            for family, weights_of in FAMILIES.items():
                once, level = (number * dtype.itemsize for number in weights_of(config, tokens))
                floor = round_floor(step, once + DEPTH * level)
                row[family] = {"once": once, "level": level, "floor": floor, "tau": WANTED * floor}
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    columns = ["target", "draft", "tokens drafted", "a plain step, GB"]
    for family in FAMILIES:
        columns += [f"{family}: {DEPTH} levels, GB", "a round, plain steps", f"τ for {WANTED:g}x"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["target"], row["draft"], f"{row['tokens']:,}", f"{row['step'] / 1e9:.2f}"]
        for family in FAMILIES:
            own = row[family]
            of_draft = own["once"] + DEPTH * own["level"]
            cells += [f"{of_draft / 1e9:.2f}", f"{own['floor']:.2f}", f"{own['tau']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=[], help="further targets: folders or Hub repositories")
    parser.add_argument("--output", type=Path, default=DOCS / "floors.json")
    arguments = parser.parse_args()
    configs = known_configs() | {name: AutoConfig.from_pretrained(name) for name in arguments.target}
    rows = [row for name, config in configs.items() for row in floors_of(name, config)]
    print(table(rows))
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
