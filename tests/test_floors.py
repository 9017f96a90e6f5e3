"""What rounds cost at the least comes from published sizes."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig


pytest.importorskip("trl")

from training.evidence.floors import DOCS, FEWER_TOKENS, floors_of, known_configs, table


CONFIGS = known_configs()
PROCESSORS = Path(__file__).parents[2] / "shared" / "data" / "processors"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for name, config in CONFIGS.items() for row in floors_of(name, config)]


def row_of(rows: list[dict], target: str, draft: str = "bf16", tokens: int | None = None) -> dict:
    tokens = tokens or CONFIGS[target].get_text_config().vocab_size
    (row,) = (row for row in rows if (row["target"], row["draft"], row["tokens"]) == (target, draft, tokens))
    return row


@pytest.mark.parametrize(
    ("target", "floor", "floor_with_table"),
    [("LLaVA-1.5-7B", 1.33, 1.33), ("Qwen2.5-VL-7B", 1.68, 1.64), ("Qwen3-VL-8B", 1.67, 1.62)],
)
def test_floors_of_published_sizes(target, floor, floor_with_table, rows):
    row, text_config = row_of(rows, target), CONFIGS[target].get_text_config()
    assert row["MSD"]["floor"] == pytest.approx(floor, abs=0.01)
    # Where the table of embeddings is counted as read, as some do, the step is dearer and the round seems cheaper.
    embeddings = 2 * text_config.vocab_size * text_config.hidden_size
    assert 1 + 6 * row["MSD"]["level"] / (row["step"] + embeddings) == pytest.approx(floor_with_table, abs=0.02)


def test_bytes_of_qwen_by_hand(rows):
    width, inner, tokens = 3584, 18944, 152064
    # Queries and outputs, keys and values of 4 heads of 128, biases, MLP, two norms.
    layer = 2 * width**2 + 2 * 512 * width + (width + 1024) + 3 * width * inner + 2 * width
    row = row_of(rows, "Qwen2.5-VL-7B")
    assert row["step"] == 2 * (28 * layer + width + tokens * width)
    level = layer + 2 * width**2 + width + tokens * width
    assert row["MSD"]["level"] == pytest.approx(2 * level, rel=1e-4)  # the draft's last norm is not the target's
    assert row_of(rows, "Qwen2.5-VL-7B", "int8")["MSD"]["level"] == row["MSD"]["level"] / 2
    fewer = row_of(rows, "Qwen2.5-VL-7B", tokens=FEWER_TOKENS)
    assert row["MSD"]["level"] - fewer["MSD"]["level"] == 2 * width * (tokens - FEWER_TOKENS)
    assert fewer["MSD"]["tau"] == 2 * fewer["MSD"]["floor"]
    # EAGLE-3 reads two vectors in its layer, and fuses three once; its layer has no biases, and norms besides.
    eagle3, attention = row["EAGLE-3"], 2 * width**2 + 2 * 512 * width
    wider = attention + width * (width + 1024) + 3 * width * inner + 4 * width
    assert (eagle3["once"], eagle3["level"]) == (2 * 3 * width**2, 2 * (wider + tokens * width))
    # A block's layers have norms of queries and keys; beside them are two fusions, of hidden states and of what a row
    # reads, a last norm and a mask.
    block, of_layer = row["a block, 4 layers"], attention + 3 * width * inner + 2 * width + 2 * 128
    assert (block["once"], block["level"]) == (2 * (4 * of_layer + (3 + 2) * width**2 + 3 * width + tokens * width), 0)
    assert block["floor"] == 1 + block["once"] / row["step"]


def test_fewer_tokens_are_told_where_the_vocabulary_is_larger(rows):
    assert {row["target"] for row in rows if row["tokens"] == FEWER_TOKENS} == {"Qwen2.5-VL-7B", "Qwen3-VL-8B"}
    assert len(rows) == 12


@pytest.mark.parametrize(
    ("target", "folder"), [("LLaVA-1.5-7B", "llava-1.5-7b-hf"), ("Qwen2.5-VL-7B", "qwen2.5-vl-7b-instruct")]
)
def test_published_configs_have_these_sizes(target, folder, rows):
    if not PROCESSORS.exists():
        pytest.skip(f"needs the configs in {PROCESSORS}")
    published = list(floors_of(target, AutoConfig.from_pretrained(PROCESSORS / folder)))
    assert published == [row for row in rows if row["target"] == target]


def test_the_page_shows_the_table(rows):
    assert json.loads((DOCS / "floors.json").read_text()) == rows
    assert table(rows) in (DOCS / "benchmarks.md").read_text()
