"""The HiViS draft: one decoder layer on the target's features, without pictures, that knows how deep it drafts."""

import torch
from torch import nn
from torch.nn.functional import pad

from transformers_msd.models.hivis.configuration_hivis import HiViSConfig
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.trees.masks import take_rows


class HiViSDraftModel(MSDDraftModel):
    """
    Draft model of HiViS (arXiv 2509.23928): reads the text alone, whose features the target has made with the picture
    in sight. Pictures are left out before tokens are paired with features: the first token behind one goes with the
    feature of the last before it.

    The published layer also reads a learned vector of each depth; what this adds to its output is kept instead, a bias
    of each.
    """

    config: HiViSConfig
    config_class = HiViSConfig

    def __init__(self, config: HiViSConfig) -> None:
        super().__init__(config)
        # Of rows that stand, then of each level.
        self.biases = nn.Parameter(torch.zeros(config.num_biases, config.get_text_config().hidden_size))
        self.post_init()

    @property
    def pools(self) -> bool:
        return True

    @property
    def renumbers(self) -> bool:
        return self.config.renumbers

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
        num_rows = real.shape[1]
        is_last = real & ~pad(real[:, 1:], (0, 1))
        # Of all tokens, the first among them, which has no row.
        is_first = torch.zeros_like(real[:, 0]) if begins_visual is None else begins_visual
        visual = hidden = torch.cat([is_first[:, None], visual_mask & real & ~is_last], dim=1)
        for distance in range(1, self.config.tokens_before + 1):
            hidden = hidden | pad(visual, (0, distance))[:, distance:]
        for distance in range(1, self.config.tokens_behind + 1):
            hidden = hidden | pad(visual, (distance, 0))[:, : num_rows + 1]
        left = real & (~hidden[:, 1:] | is_last)
        # The row of the token before among those that are left.
        rows = torch.arange(1, num_rows + 1, device=real.device)
        before = pad(torch.where(left, rows, 0).cummax(-1).values, (1, 0))[:, :num_rows]
        changed = {"features": take_rows(features, before), "position_ids": position_ids.gather(1, before)}
        if begins_visual is None:
            return changed, left, context
        # Where token 0 is hidden, no token goes before the first that is left.
        has_before = ~hidden[:, :1] | (left.cumsum(-1) > 1)
        return changed, left & (has_before | is_last), context

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        return self._with_bias(features, 0)

    def deepen(self, features: torch.Tensor, depth: int) -> torch.Tensor:
        return self._with_bias(features, depth)

    def _with_bias(self, features: torch.Tensor, depth: int) -> torch.Tensor:
        bias = self.biases[min(depth, len(self.biases) - 1)]
        return torch.cat([features, bias.expand_as(features)], dim=-1)

    def _join(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        features, bias = features.chunk(2, dim=-1)
        return super()._join(inputs_embeds, features) + bias

    def _check_inputs(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        visual_mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        size = self.config.get_text_config().hidden_size
        if features.shape[-1] != 2 * size:
            raise ValueError(
                f"`features` must be {2 * size} wide, as `fuse` makes them of the target's hidden states and `deepen` "
                f"of the draft's own, got {features.shape[-1]}. Call one of them."
            )
        super()._check_inputs(inputs_embeds, features[..., :size], visual_mask, attention_mask)


__all__ = ["HiViSDraftModel"]
