"""The EAGLE-3 draft: one decoder layer on hidden states from several layers of the target."""

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from transformers_msd.compat import CACHE, cache_of
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.eagle3.configuration_eagle3 import Eagle3Config
from transformers_msd.traits.decoders import make_decoder
from transformers_msd.traits.scales import Scales


class Eagle3RotaryEmbedding(LlamaRotaryEmbedding):
    """
    Rotary embedding of positions on three axes: time, height and width (M-RoPE, Qwen2-VL, arXiv 2409.12191).

    Args:
        config ([`Eagle3Config`]):
            Config of the draft.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config.get_text_config())
        self._sizes, self._takes_turns = config.mrope_section, config.mrope_interleaved

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cosines and sines of positions.

        Args:
            x (`torch.Tensor`):
                A tensor of the dtype wanted.
            position_ids (`torch.Tensor` of shape `(3, batch_size, sequence_length)` or without the axes):
                Positions, the same on all axes where they have none.
        """
        positions = position_ids if position_ids.ndim == 3 else position_ids.expand(3, -1, -1)
        of_axes = positions[..., None].float() * self.inv_freq.float()
        # By slices: an index of numbers would be copied to the device at every level.
        if self._takes_turns:
            angles = of_axes[0].clone()
            for axis in (1, 2):
                own = slice(axis, 3 * self._sizes[axis], 3)
                angles[..., own] = of_axes[axis, ..., own]
        else:
            parts = of_axes.split(self._sizes, dim=-1)
            angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


class Eagle3Layer(GradientCheckpointingLayer):
    """
    A decoder layer whose attention reads embedding and feature side by side (EAGLE-3, arXiv 2503.01840, section 3.1).

    Args:
        layer (`torch.nn.Module`):
            The layer that it is made of.
        config ([`Eagle3Config`]):
            Config of the draft.
    """

    def __init__(self, layer: nn.Module, config: Eagle3Config) -> None:
        super().__init__()
        text_config = config.get_text_config()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            own = getattr(self.self_attn, name)
            wider = nn.Linear(2 * own.in_features, own.out_features, bias=own.bias is not None)
            self.self_attn.set_submodule(name, wider)
        self.input_layernorm = layer.input_layernorm
        self.hidden_norm = LlamaRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.post_attention_layernorm = layer.post_attention_layernorm
        self._norm_before_residual = config.norm_before_residual

    def forward(self, hidden_states: torch.Tensor, **kwargs: torch.Tensor | Cache | None) -> torch.Tensor:
        """
        Run the layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, 2 * hidden_size)`):
                Embeddings, and features behind them.
            kwargs:
                As for the layer that it is made of.
        """
        inputs_embeds, features = hidden_states.chunk(2, dim=-1)
        normed = self.hidden_norm(features)
        residual = normed if self._norm_before_residual else features
        joined = torch.cat([self.input_layernorm(inputs_embeds), normed], dim=-1)
        hidden_states = residual + self.self_attn(hidden_states=joined, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Eagle3DraftModel(FeatureDraftModel):
    """
    Draft model of EAGLE-3 (arXiv 2503.01840): fuses hidden states of several of the target's layers, and says one of
    its own, often fewer, tokens. Later levels of a tree read its own predictions. Embeddings are the target's and are
    not stored here, unless `config.own_embeddings` is True.
    """

    config: Eagle3Config
    config_class = Eagle3Config
    base_model_prefix = "model"
    method = "The method is EAGLE-3 (arXiv 2503.01840), the tree EAGLE-2 (arXiv 2406.16858)."
    tag = "eagle3"
    supports_gradient_checkpointing = True
    logit_scales = Scales()  # its head was trained for logits as they are in the end
    predicts_features = False

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        text_config = config.get_text_config()
        size, theirs, num_parts = text_config.hidden_size, config.target_hidden_size, len(config.feature_layers)
        norm_of = lambda width: LlamaRMSNorm(width, eps=text_config.rms_norm_eps)  # noqa: E731
        self.model = make_decoder(text_config)
        self.model.layers[0] = Eagle3Layer(self.model.layers[0], config)
        if config.mrope_section is not None:
            self.model.rotary_emb = Eagle3RotaryEmbedding(config)
        self.embed_tokens = nn.Embedding(text_config.vocab_size, size) if config.own_embeddings else None
        self.fc = nn.Linear(num_parts * theirs, size, bias=False)
        self.fc_norm = nn.ModuleList(norm_of(theirs) for _ in range(num_parts)) if config.fc_norm else None
        self.input_norm = norm_of(num_parts * theirs) if config.norm_before_fc else None
        self.norm = norm_of(size)
        self.head = nn.Linear(size, config.draft_vocab_size or text_config.vocab_size, bias=False)
        # Ids of the tokens it knows; -1 until they are chosen.
        self.register_buffer("draft_token_ids", torch.full((self.head.out_features,), -1))
        self.post_init()

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return tuple(self.config.feature_layers)

    @property
    def reads_placeholders(self) -> bool:
        return self.config.reads_placeholders

    @property
    def reads_axes(self) -> bool:
        return self.config.mrope_section is not None

    def get_input_embeddings(self) -> nn.Embedding | None:
        """Its own embeddings, or None: they are the target's."""
        return self.embed_tokens

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        elif self.input_norm is not None:
            features = self.input_norm(features)
        return self.fc(features)

    def own_logits(self, features: torch.Tensor) -> torch.Tensor:
        return super().own_logits(features if self.config.norm_output else self.norm(features))

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
        Predict what the next level reads, and the head's norm.

        Row `r` pairs token `r + 1` with what is known at token `r`. Its position is `r`.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Embeddings of tokens `r + 1`, as [`Eagle3DraftModel.embed`] gives them.
            features (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                What [`Eagle3DraftModel.fuse`] makes of the target's hidden states at tokens `r`, or the draft's own
                predictions.
            visual_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Whether tokens `r + 1` are visual, which matters where `config.decoupled` is True.
            attention_mask (`torch.Tensor`, *optional*):
                Either 1 for real and 0 for padding, of shape `(batch_size, past_length + sequence_length)`, or an
                additive float mask of shape `(batch_size, 1, sequence_length, past_length + sequence_length)`.
            position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions, or those on three axes, of shape `(3, batch_size, sequence_length)`. They continue the cache
                when not given.
            past_key_values (`Cache`, *optional*):
                Cache of the rows before.
            use_cache (`bool`, *optional*):
                Whether to make a cache when none is given.
            cache (`Cache`, *optional*):
                The same as `past_key_values`, which is its older name. Both at once raise a `ValueError`.
        """
        size = self.config.get_text_config().hidden_size
        if features.shape != inputs_embeds.shape or features.shape[-1] != size:
            raise ValueError(
                f"`inputs_embeds` and `features` must be of one shape, `(batch_size, sequence_length, {size})`, got "
                f"{tuple(inputs_embeds.shape)} and {tuple(features.shape)}. Pass what `fuse` makes of the target's "
                "hidden states."
            )
        if visual_mask is not None and self.config.decoupled:
            features = torch.where(visual_mask[..., None], inputs_embeds, features)
        cache = cache_of({"past_key_values": past_key_values, "cache": cache})
        if cache is None and attention_mask is None and position_ids is not None and position_ids.ndim == 3:
            # Transformers would look for gaps in positions, and take them for packed sequences.
            cache = DynamicCache(config=self.config.get_text_config())
        outputs = self.model(
            inputs_embeds=torch.cat([inputs_embeds, features], dim=-1),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
        )
        if self.config.norm_output:
            outputs.last_hidden_state = self.norm(outputs.last_hidden_state)
        return outputs


__all__ = ["Eagle3DraftModel", "Eagle3Layer"]
