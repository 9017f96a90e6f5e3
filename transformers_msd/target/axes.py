"""Positions of targets that count on several axes, time, height and width, of tokens by their places in a sequence."""

import torch


def axis_positions(position_ids: torch.Tensor, is_real: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """
    Look up positions of a prompt, and count on behind it: what is generated is text, and goes on on all axes alike.

    Args:
        position_ids (`torch.Tensor` of shape `(1, 3 or 4, batch_size, num_columns)`, or without the first):
            Positions of the columns of the prompt, padding among them; of four the first counts text alone.
        is_real (`torch.Tensor` of shape `(batch_size, num_columns)`):
            Which columns are no padding.
        places (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Places of tokens among the real ones of their sequence.

    Returns:
        `torch.Tensor` of shape `(3, batch_size, num_rows)`.
    """
    device = places.device
    position_ids = position_ids[None] if position_ids.ndim == 2 else position_ids
    axes = position_ids[-3:].to(device).expand(3, -1, -1)
    num_real = is_real.sum(-1, keepdim=True).to(device)
    columns = (~is_real).int().sort(dim=1, stable=True).indices.to(device)
    columns = columns.gather(1, torch.minimum(places, num_real - 1).clamp(min=0))  # fillers may lie before the first
    return axes.gather(2, columns.expand(3, -1, -1)) + (places - num_real + 1).clamp(min=0)
