"""Masks that lay trees flat behind a cache, and rows of tensors."""

import torch


ALIGNMENT = 8


def tree_attention_mask(columns: torch.Tensor, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Lay tree nodes flat behind a cache: an additive mask by which each node sees the cache and its own ancestors.

    Args:
        columns (`torch.Tensor` of shape `(batch_size, nodes or 1, past_length)`):
            Whether each node sees each column of the cache.
        visible (`torch.Tensor` of shape `(batch_size, nodes, rows)`):
            Whether each node sees each of the rows behind the cache.
        dtype (`torch.dtype`):
            Dtype of the model.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, nodes, past_length + rows)`.
    """
    seen = torch.cat([columns.expand(-1, visible.shape[1], -1), visible], dim=-1)
    # Not a bool mask: eager attention adds it to the scores as it is.
    mask = aligned_mask((len(seen), 1, *seen.shape[1:]), dtype, seen.device)
    return mask.zero_().masked_fill_(~seen[:, None], torch.finfo(dtype).min)


def aligned_mask(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make an empty mask whose rows start at multiples of 8 values: attention on a GPU copies any other."""
    wide = torch.empty(*shape[:-1], shape[-1] + -shape[-1] % ALIGNMENT, dtype=dtype, device=device)
    return wide[..., : shape[-1]]


def causal_mask(batch_size: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Let each row see itself and those before it: a mask of shape `(batch_size, num_rows, num_rows)`."""
    rows = torch.arange(num_rows, device=device)
    return (rows <= rows[:, None]).expand(batch_size, -1, -1)


def take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Take rows `(batch_size, k)` of dimension 1 of a tensor `(batch_size, n, m)`."""
    return tensor.gather(1, rows[..., None].expand(-1, -1, tensor.shape[-1]))
