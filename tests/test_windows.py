"""Layers that see a window or a chunk of the sequence: tokens and caches are plain's, whatever the cache holds."""

import copy
import itertools
from typing import Any

import pytest
import torch
from oracle import Oracle
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)
from zoo import TEXT, VOCAB_SIZE, make_inputs

from transformers_msd import StaticRuntime, TreeConfig, VLMDrafter
from transformers_msd.caches.blocks import Block
from transformers_msd.compat import CACHE
from transformers_msd.traits.windows import Window, layer_windows


FIELDS = TEXT | {"num_hidden_layers": 3, "tie_word_embeddings": False}  # tied, each token is followed by itself
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# One of each kind: all layers with one window, some of them, some in chunks, such whose experts see what they see.
CONFIGS = {
    "mistral": lambda size: MistralConfig(**FIELDS, sliding_window=size),
    "qwen2": lambda size: Qwen2Config(**FIELDS, sliding_window=size, use_sliding_window=True, max_window_layers=1),
    "gemma2": lambda size: Gemma2Config(**FIELDS, sliding_window=size, head_dim=8, query_pre_attn_scalar=8),
    "gemma3_text": lambda size: Gemma3TextConfig(
        **FIELDS, sliding_window=size, layer_types=MIXED, head_dim=8, query_pre_attn_scalar=8
    ),
    "cohere2": lambda size: Cohere2Config(**FIELDS, sliding_window=size, layer_types=MIXED),
    "gpt_oss": lambda size: GptOssConfig(
        **FIELDS, sliding_window=size, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "llama4_text": lambda size: Llama4TextConfig(
        **FIELDS,
        attention_chunk_size=size,
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        no_rope_layers=[1, 1, 0],
    ),
}
CHAIN = TreeConfig(num_nodes=7, depth=6, top_k=1, gate=False, ngrams=False)
NUM_TOKENS = 24
# Name, size, lengths, whether to sample, cache. As on the fields of one colour of a chessboard of four colours any two
# of these meet in each run; the other fields are slow.
VALUES = [*CONFIGS], [6, 8, 20], [(12,), (16, 9)], [False, True], ["dynamic", "static"]
STEPS = (3, 3, 3, 3, 2)


def is_in_each_run(cell: tuple[Any, ...]) -> bool:
    places = map(list.index, VALUES, cell)
    return sum(step * place for step, place in zip(STEPS, places, strict=True)) % 4 == 0


CELLS = [
    pytest.param(*cell, marks=() if is_in_each_run(cell) else pytest.mark.slow) for cell in itertools.product(*VALUES)
]


def make(name: str, size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(CONFIGS[name](size)).eval()
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


def generate(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True, "disable_compile": True}
    return target.generate(**inputs, **settings | kwargs)


def assert_same_cache(cache: Any, plain: Any) -> None:
    for layer, plain_layer in zip(cache.layers, plain.layers, strict=True):
        assert type(layer) is type(plain_layer)
        assert int(layer.get_seq_length()) == int(plain_layer.get_seq_length())
        torch.testing.assert_close(layer.keys, plain_layer.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, plain_layer.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "size", "lengths", "do_sample", "cache"), CELLS)
def test_tokens_and_caches_are_plain_s(
    name: str, size: int, lengths: tuple[int, ...], do_sample: bool, cache: str
) -> None:
    target = make(name, size)
    inputs = make_inputs("llama", (0,) * len(lengths), lengths=lengths)
    plain = generate(target, inputs, do_sample=do_sample)
    truth = plain.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(truth.unique()) > 6
    call = {"do_sample": do_sample} | ({"cache_implementation": "static"} if cache == "static" else {})
    own = VLMDrafter(target, tree_config=CHAIN)
    tree = VLMDrafter(target, tree_config=TreeConfig(num_nodes=12, depth=4, top_k=3, gate=False))
    for assistant in (Oracle(truth, VOCAB_SIZE), own, tree, StaticRuntime(tree)):
        drafted = generate(target, inputs, **call, assistant_model=assistant)
        assert torch.equal(drafted.sequences, plain.sequences)
        if cache == "dynamic":
            assert_same_cache(drafted[CACHE], plain[CACHE])
        if assistant is own:  # the target drafts for itself, and is always right
            rounds = drafted.speculative_stats.acceptance_lengths
            assert rounds[:-1].eq(7).all()
            assert len(rounds) == 4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama4_text"])
def test_a_second_turn_goes_on_from_a_full_window(name: str, cache: str) -> None:
    target = make(name, 8)
    inputs = make_inputs("llama", (0, 0), lengths=(12, 15))
    answers, caches = [], []
    for assistant in ({}, {"assistant_model": VLMDrafter(target, tree_config=CHAIN)}):
        held = DynamicCache(config=target.config) if cache == "dynamic" else StaticCache(target.config, 128)
        first = generate(target, inputs, **assistant, **{CACHE: held})
        ids = torch.cat([first.sequences, torch.full((2, 5), 17)], dim=1)
        seen = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
        turn = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], seen], 1)}
        # A copy is a cache like any other; of static ones Transformers makes none that works.
        held = copy.deepcopy(first[CACHE]) if cache == "dynamic" else first[CACHE]
        second = generate(target, turn, **assistant, **{CACHE: held})
        answers.append(second.sequences)
        caches.append(second[CACHE])
    assert torch.equal(*answers)
    assert_same_cache(*caches)


@pytest.mark.parametrize("lengths", [(12,), (16, 9)])
def test_a_cache_of_full_layers_is_masked_and_kept_whole(lengths: tuple[int, ...]) -> None:
    target = make("mistral", 6)
    inputs = make_inputs("llama", (0,) * len(lengths), lengths=lengths)
    plain = generate(target, inputs, **{CACHE: DynamicCache()})
    drafted = generate(
        target, inputs, assistant_model=VLMDrafter(target, tree_config=CHAIN), **{CACHE: DynamicCache()}
    )
    assert torch.equal(drafted.sequences, plain.sequences)
    assert_same_cache(drafted[CACHE], plain[CACHE])


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama4_text"])
def test_columns_that_no_window_reaches_are_dropped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name](8)
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.eos_token_id = None
    inputs = make_inputs("llama", (0,), lengths=(12,))
    spare, num_tokens = 64, 225  # as 256 and 900
    for module in ("blocks", "room"):
        monkeypatch.setattr(f"transformers_msd.caches.{module}.SPARE_COLUMNS", spare)
    widths: dict[Window | None, int] = {}
    forget = Block._widen

    def widen(block: Block, num_columns: int) -> None:
        forget(block, num_columns)
        widths[block.window] = max(widths.get(block.window, 0), block.keys[0].shape[2])

    monkeypatch.setattr(Block, "_widen", widen)
    call = {"max_new_tokens": num_tokens}
    plain = generate(target, inputs, **call)
    drafted = generate(target, inputs, **call, assistant_model=Oracle(plain.sequences[:, 14:], VOCAB_SIZE, depth=8))
    assert torch.equal(drafted.sequences, plain.sequences)
    assert_same_cache(drafted[CACHE], plain[CACHE])
    for window, width in widths.items():
        assert width > num_tokens if window is None else width < 3 * spare


def test_windows_are_read_off_the_types_of_layers() -> None:
    assert layer_windows(CONFIGS["mistral"](6)) == [("sliding_attention", Window(6))] * 3
    assert [window for _, window in layer_windows(CONFIGS["gemma3_text"](6))] == [Window(6), None, Window(6)]
    assert layer_windows(CONFIGS["llama4_text"](6))[0] == ("chunked_attention", Window(6, is_chunked=True))
    no_window = Qwen2Config(**FIELDS, sliding_window=6, use_sliding_window=False)
    assert {window for _, window in layer_windows(no_window)} == {None}


def test_layers_of_several_windows_that_take_one_mask_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make("gemma3_text", 8)
    monkeypatch.setattr("transformers_msd.traits.support.takes_masks_by_type", lambda model: False)
    with pytest.raises(ValueError, match="takes one mask for all of them"):
        generate(target, make_inputs("llama", (0,)), assistant_model=VLMDrafter(target))
