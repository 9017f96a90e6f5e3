"""Masks that lay trees flat behind a cache, and rows of tensors."""

import torch


ALIGNMENT = 8


def tree_attention_mask(columns: torch.Tensor | int, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Lay tree nodes flat behind a cache: an additive mask by which each node sees the cache and its own ancestors.

    Args:
        columns (`torch.Tensor` of shape `(batch_size, nodes or 1, past_length)`, or `int`):
            Whether each node sees each column of the cache, or how many there are where all nodes see all of them.
        visible (`torch.Tensor` of shape `(batch_size, nodes, rows)`):
            Whether each node sees each of the rows behind the cache.
        dtype (`torch.dtype`):
            Dtype of the model.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, nodes, past_length + rows)`.
    """
    num_open = columns if isinstance(columns, int) else 0  # columns that need no mask
    if not isinstance(columns, int):
        visible = torch.cat([columns.expand(-1, visible.shape[1], -1), visible], dim=-1)
    batch_size, num_nodes, num_masked = visible.shape
    # Not a bool mask: eager attention adds it to the scores as it is.
    mask = aligned_mask((batch_size, 1, num_nodes, num_open + num_masked), dtype, visible.device).zero_()
    mask[..., num_open:].masked_fill_(~visible[:, None], torch.finfo(dtype).min)
    return mask


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
