"""The MSD draft: one decoder layer on the target's features, text and visual tokens decoupled."""

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformers_msd.compat import CACHE, cache_of
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.traits.decoders import make_decoder


def pool_visual_rows(
    config: MSDConfig,
    inputs_embeds: torch.Tensor,
    features: torch.Tensor,
    visual_mask: torch.Tensor,
    real: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Average visual rows of a prompt, or leave them out, as `config.visual_pool_size` has it.

    Every run of visual rows is divided from its start on into groups of that size, the last of which may be smaller.
    The last row of a group becomes the average and is kept with its position, the others are not. So is the last row
    of a sequence, visual or not, from which the draft goes on, as it is.

    Args:
        config ([`MSDConfig`]):
            Config of the draft.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Input embeddings of tokens `r + 1`.
        features (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Features at tokens `r`. They are averaged only where the draft reads those of visual rows.
        visual_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether tokens `r + 1` are visual.
        real (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Which rows are real, without a gap in a sequence; the others are padding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Embeddings, features, and which rows are kept, of shape
        `(batch_size, num_rows)`.
    """
    rows = torch.arange(real.shape[1], device=real.device)
    is_last = real & ~pad(real[:, 1:], (0, 1))
    visual = visual_mask & real & ~is_last
    if config.visual_pool_size == 0:
        return inputs_embeds, features, real & ~visual
    starts = torch.where(visual & ~pad(visual[:, :-1], (1, 0)), rows, 0).cummax(-1).values
    places = (rows - starts) % config.visual_pool_size
    ends = visual & ((places == config.visual_pool_size - 1) | ~pad(visual[:, 1:], (0, 1)))
    sizes = torch.where(ends, places + 1, 1)
    inputs_embeds = _average(inputs_embeds, sizes)
    if not config.decoupled:
        features = _average(features, sizes)
    return inputs_embeds, features, real & (~visual | ends)


def _average(states: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Average each row of `states` `(batch_size, n, m)` with the rows before it, `sizes` `(batch_size, n)` in all."""
    total = states.float()
    # Not a matrix of weights: rows that stand alone must stay as they are, and padding may hold anything.
    for place in range(1, int(sizes.max())):
        total = torch.where((sizes > place)[..., None], total + states.roll(place, dims=1), total)
    return (total / sizes[..., None]).to(states.dtype)


class MSDDraftModel(FeatureDraftModel):
    """
    Draft model of MSD (arXiv 2505.14260): predicts the target's next feature from a token and the feature before it.

    A visual token enters as its embedding alone, any other as the fusion of its embedding with the target's feature
    at the token before. Embeddings are the target's and are not stored here, and so is the head, unless
    `config.draft_vocab_size` asks for a smaller one.
    """

    config: MSDConfig
    config_class = MSDConfig
    base_model_prefix = "model"
    method = "The method is MSD (arXiv 2505.14260), the tree EAGLE-2 (arXiv 2406.16858)."
    tag = "msd"
    supports_gradient_checkpointing = True

    def __init__(self, config: MSDConfig) -> None:
        super().__init__(config)
        text_config = config.get_text_config()
        self.model = make_decoder(text_config, keeps_first_norm=config.input_layernorm)
        self.fc = nn.Linear(2 * text_config.hidden_size, text_config.hidden_size, bias=config.fc_bias)
        self.head = None
        if config.draft_vocab_size is not None:
            self.head = nn.Linear(text_config.hidden_size, config.draft_vocab_size, bias=False)
            # Ids of the tokens it knows; -1 until they are chosen.
            self.register_buffer("draft_token_ids", torch.full((config.draft_vocab_size,), -1))
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        # Layers may keep some weights in float32.
        dtype = self.fc.weight.dtype
        return dtype if dtype.is_floating_point else super().dtype

    def get_input_embeddings(self) -> None:
        """None: they are the target's."""

    @property
    def pools(self) -> bool:
        return self.config.visual_pool_size != 1

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
        inputs_embeds, features, kept = pool_visual_rows(self.config, inputs_embeds, features, visual_mask, real)
        return {"inputs_embeds": inputs_embeds, "features": features}, kept, context

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        visual_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
    ) -> BaseModelOutputWithPast:
        """
        Predict the target's features, each of which its head turns into logits.

        Row `r` pairs token `r + 1` with the feature at token `r`, predicts the feature at token `r + 1`, and so the
        logits of token `r + 2`. Its position is `r`.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Input embeddings of tokens `r + 1` in the target, visual features merged in.
            features (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Last hidden states of the target at tokens `r`, after its final norm, or the draft's own predictions.
            visual_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Whether tokens `r + 1` are visual. None is when it is not given.
            attention_mask (`torch.Tensor`, *optional*):
                Either 1 for real and 0 for padding, of shape `(batch_size, past_length + sequence_length)`, or an
                additive float mask of shape `(batch_size, 1, sequence_length, past_length + sequence_length)`.
            position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions; targets with several position axes get the same on each. They continue the cache when not
                given.
            past_key_values (`Cache`, *optional*):
                Cache of the rows before.
            use_cache (`bool`, *optional*):
                Whether to make a cache when none is given.
            cache (`Cache`, *optional*):
                The same as `past_key_values`, which is its older name. Both at once raise a `ValueError`.
        """
        self._check_inputs(inputs_embeds, features, visual_mask, attention_mask)
        cache = cache_of({"past_key_values": past_key_values, "cache": cache})
        hidden_states = self._join(inputs_embeds, features)
        if visual_mask is not None and self.config.decoupled:
            hidden_states = torch.where(visual_mask[..., None], inputs_embeds, hidden_states)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_length
            position_ids = position_ids.expand(hidden_states.shape[:2])
        return self.model(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
        )

    def _join(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([inputs_embeds, features], dim=-1))

    def _check_inputs(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        visual_mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        hidden_size = self.fc.out_features
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != hidden_size:
            raise ValueError(
                f"`inputs_embeds` must have shape `(batch_size, sequence_length, {hidden_size})`, got "
                f"{tuple(inputs_embeds.shape)}. Pass the embeddings of the target this draft was made for."
            )
        if features.shape != inputs_embeds.shape:
            raise ValueError(
                f"`features` must have the shape of `inputs_embeds`, {tuple(inputs_embeds.shape)}, got "
                f"{tuple(features.shape)}. Pair each embedding with the feature at the token before it."
            )
        if visual_mask is not None and visual_mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"`visual_mask` must have shape {tuple(inputs_embeds.shape[:2])}, one value per embedding, got "
                f"{tuple(visual_mask.shape)}. Cut it to the same rows as `inputs_embeds`."
            )
        if attention_mask is not None and attention_mask.ndim == 4 and not attention_mask.is_floating_point():
            raise ValueError(
                f"A 4-D `attention_mask` must be an additive float mask, got {attention_mask.dtype}. Use 0 where a "
                "row may look and the lowest value of the dtype elsewhere."
            )


__all__ = ["MSDDraftModel", "pool_visual_rows"]
