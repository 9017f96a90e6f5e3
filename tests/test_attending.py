"""Attention by groups: what Transformers' own gives, without copies of keys, and nothing is left behind."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import TEXT, make_inputs

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.target import attending
from transformers_msd.target.attending import attend, by_groups
from transformers_msd.trees.masks import tree_attention_mask


SHAPES = {
    "of 24 rows": (1, 8, 2, 24, 300, torch.float32),
    "of two rows": (1, 4, 1, 2, 17, torch.float32),
    "in a batch": (3, 6, 3, 5, 33, torch.float32),
    "in half precision": (2, 8, 4, 16, 64, torch.bfloat16),
}


def make_layer(group: int) -> nn.Module:
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = group, True
    return layer


def make_rows(
    batch_size: int, num_heads: int, num_shared: int, num_rows: int, num_columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query = torch.randn(batch_size, num_heads, num_rows, 16, dtype=dtype)
    key, value = torch.randn(2, batch_size, num_shared, num_columns, 16, dtype=dtype)
    seen = torch.rand(batch_size, 1, num_rows, num_columns) < 0.7
    seen[..., 0] = True
    return query, key, value, torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the keys that were attended to by groups."""
    shapes: list[tuple[int, ...]] = []
    own = attending.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(key.shape))
        return own(query, key, *args, **kwargs)

    monkeypatch.setattr(attending, "scaled_dot_product_attention", noted)
    return shapes


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_groups_are_as_rows_of_copies(name: str, kernels: list[tuple[int, ...]]) -> None:
    query, key, value, mask = make_rows(*SHAPES[name])
    layer = make_layer(query.shape[1] // key.shape[1])
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    with by_groups():
        found, weights = attend(layer, query, key, value, mask, scaling=0.3)
    assert kernels == [tuple(key.shape)]
    assert weights is None
    assert found.is_contiguous()
    tolerance = 1e-6 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


LEFT_TO_TRANSFORMERS = {
    "one row": ({"num_rows": 1}, {}),
    "a prompt": ({"num_rows": 257, "num_columns": 260}, {}),
    "no groups": ({"num_shared": 4}, {}),
    "no mask": ({}, {"attention_mask": None}),
    "a bias of positions": ({}, {"position_bias": torch.ones(1, 4, 3, 20)}),
    "masks of heads": ({}, {"attention_mask": torch.zeros(1, 4, 3, 20)}),
}


@pytest.mark.parametrize("name", LEFT_TO_TRANSFORMERS)
def test_other_attention_is_left_to_transformers(name: str, kernels: list[tuple[int, ...]]) -> None:
    sizes, arguments = LEFT_TO_TRANSFORMERS[name]
    sizes = {"batch_size": 1, "num_heads": 4, "num_shared": 2, "num_rows": 3, "num_columns": 20} | sizes
    query, key, value, mask = make_rows(*sizes.values(), torch.float32)
    layer = make_layer(4 // key.shape[1])
    arguments = {"attention_mask": mask} | arguments
    expected, _ = sdpa_attention_forward(layer, query, key, value, **arguments)
    with by_groups():
        assert torch.equal(attend(layer, query, key, value, **arguments)[0], expected)
    assert not kernels


def test_other_threads_attend_as_ever(kernels: list[tuple[int, ...]]) -> None:
    query, key, value, mask = make_rows(*SHAPES["of 24 rows"])
    layer = make_layer(4)
    with by_groups(), ThreadPoolExecutor(1) as other:
        other.submit(attend, layer, query, key, value, mask).result()
        assert not kernels
        attend(layer, query, key, value, mask)
    assert len(kernels) == 1


def test_contexts_end_with_the_last(kernels: list[tuple[int, ...]]) -> None:
    with by_groups():
        with pytest.raises(RuntimeError, match="ended early"), by_groups():
            raise RuntimeError("ended early")
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_a_function_of_somebody_else_stays() -> None:
    theirs = lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs)  # noqa: E731
    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        with by_groups():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_calls_draft_and_verify_by_groups(kernels: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2})).eval()
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=2, gate=False)
    inputs = make_inputs("llama", (0, 0), lengths=(12, 9))
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert not kernels
    assert torch.equal(target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=draft), plain)
    # The drafted levels have two rows, the trees eight.
    assert len(kernels) > 2 * target.config.num_hidden_layers
    assert {shape[1] for shape in kernels} == {2}
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_masks_begin_where_kernels_read_them_in_place() -> None:
    columns, visible = torch.rand(2, 1, 13) < 0.5, torch.rand(2, 4, 6) < 0.5
    mask = tree_attention_mask(columns, visible, torch.float16)
    seen = torch.cat([columns.expand(-1, 4, -1), visible], dim=-1)
    assert torch.equal(mask[:, 0] == 0, seen)
    assert (mask[:, 0][~seen] == torch.finfo(torch.float16).min).all()
    assert [stride % 8 for stride in mask.stride()] == [0, 0, 0, 1]
