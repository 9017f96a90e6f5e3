"""Layers of block drafts: attention over what is known and a block, and convolutions along the block (DFlash 2)."""

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache

from transformers_msd.compat import CACHE
from transformers_msd.models.block.configuration_block import BlockDraftConfig


class BlockLayer(nn.Module):
    """
    A decoder layer of a block draft.

    Args:
        layer (`torch.nn.Module`):
            The layer that it is made of, of Qwen3's or Llama's.
        config ([`BlockDraftConfig`]):
            Config of the draft.
    """

    def __init__(self, layer: nn.Module, config: BlockDraftConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention_conv = BlockConvolution(config) if config.conv_kernel_size else None
        self.mlp_conv = BlockConvolution(config) if config.conv_kernel_size else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache,
        size: int,
    ) -> torch.Tensor:
        """
        Run the layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
                Rows of blocks, one block behind the other.
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, num_rows, past_length + num_rows)`):
                Additive float mask.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`):
                Cosines and sines of their places.
            cache (`Cache`):
                The cache.
            size (`int`):
                Rows of a block.
        """
        attending = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, CACHE: cache}
        rows, mixing = self.input_layernorm(hidden_states), None
        if self.attention_conv is not None:
            rows, mixing = self.attention_conv.before(rows, size)
        rows = self.self_attn(hidden_states=rows, **attending)[0]
        if mixing is not None:
            rows = self.attention_conv.behind(rows, mixing, size)
        hidden_states = hidden_states + rows
        rows = self.post_attention_layernorm(hidden_states)
        if self.mlp_conv is not None:
            rows, mixing = self.mlp_conv.before(rows, size)
        rows = self.mlp(rows)
        if mixing is not None:
            rows = self.mlp_conv.behind(rows, mixing, size)
        return hidden_states + rows


class BlockConvolution(nn.Module):
    """
    Mixes each row of a block with those right before it, by weights of which a part is the same for all rows and a
    part chosen by the row: once before a part of a layer, and once behind it (DFlash 2, github.com/z-lab/dflash).

    Args:
        config ([`BlockDraftConfig`]):
            Config of the draft.
    """

    def __init__(self, config: BlockDraftConfig) -> None:
        super().__init__()
        size, num_taps = config.get_text_config().hidden_size, config.conv_kernel_size
        self.shape = (2, num_taps, size // config.conv_group_size)
        self.base_kernel = nn.Parameter(torch.empty(2, num_taps, size))
        self.kernel_projection = nn.Linear(size, 2 * num_taps * self.shape[-1], bias=False)

    def before(self, rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mix what goes into a part of a layer.

        Args:
            rows (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
                Rows of blocks.
            size (`int`):
                Rows of a block.

        Returns:
            The rows, and the weights for what comes out, of shape `(batch_size, num_rows, num_taps, num_groups)`.
        """
        chosen = self.kernel_projection(rows).unflatten(-1, self.shape)
        return self._mix(rows, chosen[..., 0, :, :], self.base_kernel[0], size), chosen[..., 1, :, :]

    def behind(self, rows: torch.Tensor, mixing: torch.Tensor, size: int) -> torch.Tensor:
        """Mix what comes out of a part of a layer, by the weights that [`BlockConvolution.before`] has returned."""
        return self._mix(rows, mixing, self.base_kernel[1], size)

    def _mix(self, rows: torch.Tensor, chosen: torch.Tensor, base: torch.Tensor, size: int) -> torch.Tensor:
        num_taps, num_groups = self.shape[1:]
        blocks = rows.unflatten(1, (-1, size))
        mixed = torch.zeros_like(rows)
        for tap in range(num_taps):
            earlier = pad(blocks, (0, 0, tap, 0))[:, :, :size].flatten(1, 2)
            weights = base[tap].view(num_groups, -1).to(rows) + chosen[..., tap, :, None]
            mixed = mixed + earlier * weights.flatten(-2)
        return mixed
