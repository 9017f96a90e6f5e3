"""Attention by groups: while trees are drafted and verified, queries that share keys read them where they lie."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_msd.trees.masks import aligned_mask


NAME = "sdpa"
# What else Transformers' function may be given: it is left to it.
OTHERS = ("softcap", "position_bias", "cache")
# Elsewhere Transformers leaves groups to PyTorch, masks or not.
_DEVICES = ("cpu", "cuda")

# More rows are a prompt: what is copied for them would be masks, not keys.
_MOST_ROWS = 256

_lock = threading.Lock()
_num_calls = 0
# Whether this thread, or task, is inside of such a context: others attend as ever.
_is_inside: ContextVar[bool] = ContextVar("transformers_msd_by_groups", default=False)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Transformers' attention by PyTorch's `scaled_dot_product_attention`, and what it returns. Of several rows with a
    mask it copies keys and values for every head of a group; here the heads of a group are further rows.

    Args:
        module (`torch.nn.Module`):
            The layer, which knows how many heads a group has.
        query (`torch.Tensor` of shape `(batch_size, num_heads, num_rows, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch_size, num_heads / heads of a group, num_columns, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(batch_size, num_heads / heads of a group, num_columns, value_dim)`):
            Values.
        attention_mask (`torch.Tensor` of shape `(batch_size, 1, num_rows, num_columns)`, *optional*):
            What is seen, as any mask of that function.
        dropout (`float`, *optional*, defaults to 0.0):
            Chance that a weight is dropped.
        scaling (`float`, *optional*):
            Factor of the products.
    """
    num_heads, num_rows = query.shape[1:3]
    if num_rows == 1:  # a plain step, of which each layer must cost no more than without us
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    group = getattr(module, "num_key_value_groups", 1)
    is_shared = group > 1 and num_rows <= _MOST_ROWS and group * key.shape[1] == num_heads
    is_plain = is_shared and not any(kwargs.get(name) is not None for name in OTHERS)
    is_masked = attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] == 1
    is_ours = not torch.compiler.is_compiling() and _is_inside.get()
    if not (is_ours and is_plain and is_masked and query.device.type in _DEVICES):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query = query.unflatten(1, (-1, group)).flatten(2, 3)
    shape = (len(attention_mask), 1, group, *attention_mask.shape[2:])
    mask = aligned_mask(shape, attention_mask.dtype, attention_mask.device)
    mask = mask.copy_(attention_mask[:, :, None]).flatten(2, 3)
    output = scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    output = output.unflatten(2, (group, num_rows)).flatten(1, 2)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def by_groups() -> Iterator[None]:
    """Let all models attend so inside, unless somebody else has replaced the function; compiled code does not."""
    global _num_calls
    token = _is_inside.set(True)
    with _lock:
        _num_calls += 1
        if ALL_ATTENTION_FUNCTIONS[NAME] is sdpa_attention_forward:
            ALL_ATTENTION_FUNCTIONS[NAME] = attend
    try:
        yield
    finally:
        _is_inside.reset(token)
        with _lock:
            _num_calls -= 1
            if not _num_calls and ALL_ATTENTION_FUNCTIONS[NAME] is attend:
                del ALL_ATTENTION_FUNCTIONS[NAME]
