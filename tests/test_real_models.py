"""Gemma 3 270M with real weights, whose layers see a window of 512: prompts and answers beyond it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from transformers_msd import TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE


# `google/gemma-3-270m` as a folder; it is not fetched.
FOLDER = Path(os.environ.get("GEMMA_3_270M", "/nowhere"))
WINDOW = 512
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
MODES = {"greedy": {"do_sample": False}, "sampled": SAMPLED}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.exists(), reason="set GEMMA_3_270M to its folder")]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text_ids() -> torch.Tensor:
    text = " ".join(path.read_text() for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md")))
    return AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")["input_ids"]


def generate(target: PreTrainedModel, input_ids: torch.Tensor, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 48, "eos_token_id": None, "return_dict_in_generate": True}
    return target.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings | kwargs)


@pytest.mark.parametrize("mode", MODES)
# Crossed by the answer; by the prompt, 420 and 1,200 tokens beyond.
@pytest.mark.parametrize("length", [WINDOW - 20, WINDOW + 420, WINDOW + 1200])
def test_tokens_and_second_turns_beyond_the_window_equal_plain(target, text_ids, length, mode):
    input_ids, call = text_ids[:, :length], MODES[mode]
    plain = generate(target, input_ids, **call)
    new = plain.sequences[:, length:]
    assert len(new.unique()) > 4
    drafters = {
        "itself": VLMDrafter(target, tree_config=TreeConfig(num_nodes=6, depth=3, top_k=2, gate=False)),
        "an oracle": Oracle(new, target.config.vocab_size),
    }
    more = torch.cat([plain.sequences, text_ids[:, length : length + 30]], dim=1)
    plain_again = generate(target, more, seed=1, **call, **{CACHE: plain[CACHE]})
    for name, drafter in drafters.items():
        drafted = generate(target, input_ids, **call, assistant_model=drafter)
        assert torch.equal(drafted.sequences, plain.sequences), name
        if name == "itself":
            assert drafted.speculative_stats.mean_acceptance_length > 3
            again = generate(target, more, seed=1, **call, assistant_model=drafter, **{CACHE: drafted[CACHE]})
            assert torch.equal(again.sequences, plain_again.sequences)


def test_long_answer_beyond_the_window_equals_plain(target, text_ids):
    input_ids = text_ids[:, :60]
    plain = generate(target, input_ids, max_new_tokens=WINDOW + 420, **SAMPLED)
    oracle = Oracle(plain.sequences[:, 60:], target.config.vocab_size)
    cache = DynamicCache(config=target.config)
    drafted = generate(
        target, input_ids, max_new_tokens=WINDOW + 420, **SAMPLED, assistant_model=oracle, **{CACHE: cache}
    )
    assert torch.equal(drafted.sequences, plain.sequences)
    for layer, plain_layer in zip(cache.layers, plain[CACHE].layers, strict=True):
        assert layer.keys.shape == plain_layer.keys.shape
