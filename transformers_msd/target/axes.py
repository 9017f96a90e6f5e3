"""Positions of targets that count on several axes, time, height and width, of tokens by their places in a sequence."""

from collections.abc import Callable

import torch

from transformers_msd.target.committed import Committed


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


def with_carried(
    find: Callable[[torch.Tensor], torch.Tensor], axes: torch.Tensor, carried: Committed
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Give rows that an earlier call has left the positions that they had there: a call that goes on behind a picture no
    longer knows where its tokens stood.

    Args:
        find (`Callable`):
            Looks up positions `(3, batch_size, num_rows)` of places `(batch_size, num_rows)`.
        axes (`torch.Tensor` of shape `(3, batch_size, num_carried)`):
            Positions of the rows that were left.
        carried (`Committed`):
            These rows.

    Returns:
        `Callable`: Looks up positions, those rows' among them.
    """
    starts, ends = carried.position_ids[:, :1], carried.lengths[:, None]  # of the rows nothing else is kept

    def found(places: torch.Tensor) -> torch.Tensor:
        rows = places - starts
        is_carried = (rows >= 0) & (rows < ends)
        rows = rows.clamp(min=0, max=axes.shape[2] - 1)
        return torch.where(is_carried, axes.gather(2, rows.expand(3, -1, -1)), find(places))

    return found
