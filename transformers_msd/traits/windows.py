"""Layers whose attention sees a part of the sequence: which they are, and how far they see."""

import inspect
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs


@dataclass(frozen=True)
class Window:
    """
    What a layer's attention sees of the sequence before a row.

    Args:
        size (`int`):
            Columns that a row sees at most, its own among them.
        is_chunked (`bool`, *optional*, defaults to `False`):
            Whether the sequence is cut into chunks of this size, whose rows see none of another; otherwise each row
            sees the last ones.
    """

    size: int
    is_chunked: bool = False

    def sees(
        self, places: torch.Tensor, visible: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Tell what the rows of a tree see, were they all there is behind the settled columns.

        Args:
            places (`torch.Tensor` of shape `(num_columns,)`):
                Columns of the cache.
            visible (`torch.Tensor` of shape `(batch_size, num_rows, num_unsettled)`):
                Which of the unsettled rows each row sees: those of its path, itself the last.
            lengths (`torch.Tensor` of shape `(batch_size,)`):
                Settled columns of each sequence.
            padding (`torch.Tensor` of shape `(batch_size,)`):
                Columns before its first token.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Whether each row is near enough to each of the columns, of shape
            `(batch_size, num_rows, num_columns)`, and to each unsettled row of its path, of the shape of `visible`.
        """
        # How many rows of a path lie behind each of its rows, and the column that each row stands for.
        behind = visible.long().flip(-1).cumsum(-1).flip(-1) - 1
        own = (lengths[:, None] + behind[..., 0])[..., None]
        if not self.is_chunked:
            return places > own - self.size, behind < self.size
        before = padding[:, None, None]
        chunk = (own - before) // self.size
        return (places - before) // self.size == chunk, (own - behind - before) // self.size == chunk


@dataclass(frozen=True)
class BlockWindow(Window):
    """What a layer sees of the sequence around a row of a block: as many columns behind it as before it."""

    def sees(
        self, places: torch.Tensor, visible: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(visible.shape[1], device=lengths.device)
        seen = places > (lengths[:, None] + rows)[..., None] - self.size
        return seen, visible & ((rows[:, None] - rows).abs() < self.size)


def layer_windows(config: PreTrainedConfig) -> list[tuple[str, Window | None]]:
    """Return the type of each layer of a model, and its window; `None` where it sees all."""
    layer_types, settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [
        (name, Window(own["sliding_window"], name == "chunked_attention") if own.get("sliding_window") else None)
        for name, own in zip(layer_types, settings, strict=True)
    ]


def takes_masks_by_type(model: PreTrainedModel) -> bool:
    """Tell whether a model, or one inside it, takes a mask for each type of its layers: it asks for a `dict`."""
    classes = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}
    codes = [inspect.unwrap(one.forward).__code__ for one in classes]
    return any({"attention_mask", "dict", "isinstance"} <= {*code.co_names, *code.co_varnames} for code in codes)
