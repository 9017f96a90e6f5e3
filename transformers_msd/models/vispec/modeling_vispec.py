"""The ViSpec draft: one decoder layer on the target's features, to which a picture is a few learned rows."""

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import initialization as init

from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.vispec.configuration_vispec import ViSpecConfig
from transformers_msd.trees.masks import take_rows


class ImageAdaptor(nn.Module):
    """
    Learned queries that look at the embeddings of a picture.

    Args:
        config ([`ViSpecConfig`]):
            Config of the draft.
    """

    def __init__(self, config: ViSpecConfig) -> None:
        super().__init__()
        text_config = config.get_text_config()
        size, num_heads = text_config.hidden_size, text_config.num_attention_heads
        width = size // num_heads
        self.q = nn.Parameter(torch.zeros(config.num_queries, num_heads, width))
        self.k_proj = nn.Linear(size, num_heads * width, bias=config.adaptor_bias)
        self.v_proj = nn.Linear(size, num_heads * width, bias=config.adaptor_bias)
        self.o_proj = nn.Linear(num_heads * width, size, bias=False)

    def forward(self, inputs_embeds: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """
        Say what each query finds in each picture.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
                Embeddings.
            pictures (`torch.Tensor` of shape `(batch_size, num_pictures, num_rows)`):
                Which rows each picture has; one that has none is any.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_pictures, num_queries, hidden_size)`.
        """
        batch_size, num_pictures, _ = pictures.shape
        num_queries, num_heads, width = self.q.shape
        # (batch_size, num_heads, rows, width)
        queries = self.q.repeat(num_pictures, 1, 1).transpose(0, 1).expand(batch_size, -1, -1, -1)
        keys, values = (
            project(inputs_embeds).unflatten(-1, (num_heads, width)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        seen = pictures | ~pictures.any(-1, keepdim=True)
        seen = seen.repeat_interleave(num_queries, dim=1)[:, None]
        found = scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.o_proj(found.transpose(1, 2).flatten(2)).unflatten(1, (num_pictures, num_queries))


class ViSpecDraftModel(MSDDraftModel):
    """
    Draft model of ViSpec (arXiv 2509.15235): learned queries look at each picture, that is, a run of visual tokens.
    What they find stands in place of its last rows, and what the last query finds is read with every feature behind
    the picture, up to the next.
    """

    config: ViSpecConfig
    config_class = ViSpecConfig

    def __init__(self, config: ViSpecConfig) -> None:
        super().__init__(config)
        size = config.get_text_config().hidden_size
        self.adaptor = ImageAdaptor(config)
        self.image_fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageAdaptor):
            init.normal_(module.q, std=module.q.shape[-1] ** -0.5)

    @property
    def pools(self) -> bool:
        return True

    def pool(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        visual_mask: torch.Tensor,
        real: torch.Tensor,
        context: torch.Tensor | None,
        begins_visual: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        batch_size, num_rows, size = inputs_embeds.shape
        is_last = real & ~pad(real[:, 1:], (0, 1))
        visual = visual_mask & real & ~is_last
        # Of each row, the picture that it stands in or behind; 0 before the first.
        numbers = (visual & ~pad(visual[:, :-1], (1, 0))).cumsum(-1)
        context = inputs_embeds.new_zeros(batch_size, size) if context is None else context
        num_pictures, kept_rows = int(numbers.max()), visual
        contexts = context[:, None]
        if num_pictures:
            pictures = numbers[:, None] == torch.arange(1, num_pictures + 1, device=real.device)[:, None]
            device = self.fc.weight.device
            found = self.adaptor(inputs_embeds.to(device, self.dtype), (pictures & visual[:, None]).to(device))
            found = found.to(inputs_embeds)
            contexts = torch.cat([contexts, found[:, :, -1]], dim=1)
            # How far before the last row of its picture a row stands.
            rows = torch.arange(num_rows, device=real.device)
            ends = torch.where(visual & ~pad(visual[:, 1:], (0, 1)), rows, num_rows)
            distances = ends.flip(1).cummin(-1).values.flip(1) - rows
            num_kept = self.config.num_queries - 1
            kept_rows = visual & (distances < num_kept)
            places = (numbers - 1) * self.config.num_queries + num_kept - 1 - distances
            ours = take_rows(found.flatten(1, 2), places.where(kept_rows, 0))
            inputs_embeds = torch.where(kept_rows[..., None], ours, inputs_embeds)
        features = torch.cat([features, take_rows(contexts, numbers)], dim=-1)
        changed = {"inputs_embeds": inputs_embeds, "features": features}
        return changed, real & (~visual | kept_rows), take_rows(contexts, numbers[:, -1:])[:, 0]

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        return self.image_fc(features)

    def deepen(self, features: torch.Tensor, depth: int) -> torch.Tensor:
        return self.image_fc(features)


__all__ = ["ImageAdaptor", "ViSpecDraftModel"]
