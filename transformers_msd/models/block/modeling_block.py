"""The block draft: a few decoder layers that say all levels of a tree in one forward."""

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from transformers_msd.compat import CACHE
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.models.block.layers import BlockConvolution, BlockLayer
from transformers_msd.traits.decoders import make_decoder
from transformers_msd.traits.scales import Scales
from transformers_msd.traits.windows import BlockWindow


class BlockDraftModel(FeatureDraftModel):
    """
    Draft model whose rows are a block: the token emitted last, and masks behind it, each of which says a token
    (DFlash, arXiv 2602.06036; JetSpec, arXiv 2606.18394). Its layers look at the block, and at the target's hidden
    states, which are keys and values of every layer and nothing else. Embeddings are the target's and are not stored
    here, and so is the head, unless `config.draft_vocab_size` asks for a smaller one.
    """

    config: BlockDraftConfig
    config_class = BlockDraftConfig
    base_model_prefix = "model"
    method = "A block is drafted in one forward (DFlash, arXiv 2602.06036), and a tree grown from what it says."
    tag = "block-draft"
    predicts_features = False

    def __init__(self, config: BlockDraftConfig) -> None:
        super().__init__(config)
        text_config = config.get_text_config()
        size, vocab_size = text_config.hidden_size, text_config.vocab_size
        self.embedding_scale = config.embedding_scale
        if config.output_multiplier is not None:
            self.logit_scales = Scales(1.0, config.output_multiplier, config.final_logit_softcapping)
        norm_of = lambda: LlamaRMSNorm(size, eps=text_config.rms_norm_eps)  # noqa: E731
        self.model = make_decoder(text_config)
        self.model.layers = nn.ModuleList(BlockLayer(layer, config) for layer in self.model.layers)
        self.fc = nn.Linear(len(config.feature_layers) * size, size, bias=False)
        self.hidden_norm, self.norm = norm_of(), norm_of()
        self.visual_fc = nn.Linear(size, size, bias=False) if config.visual_rows == "decoupled" else None
        self.join = nn.Linear(2 * size, size, bias=False) if config.reads_feature else None
        # What rows of a block see, in one layer or another: those before them alone or all, and how far.
        kinds = list(dict.fromkeys(config.layer_sights))
        self.sights = [(causal, None if window is None else BlockWindow(window)) for causal, window in kinds]
        self._sight_of_layer = [kinds.index(own) for own in config.layer_sights]
        self.mask_embedding = nn.Parameter(torch.empty(size)) if config.mask_token_id is None else None
        self.edge_from = nn.Embedding(vocab_size, config.edge_rank) if config.edge_rank else None
        self.edge_to = nn.Linear(config.edge_rank, vocab_size, bias=False) if config.edge_rank else None
        self.edge_row = nn.Linear(size, config.edge_rank, bias=False) if config.edge_type == "bilinear" else None
        self.edge_gate = nn.Linear(size + config.edge_rank, config.edge_rank) if config.edge_type == "gated" else None
        self.head = None
        if config.draft_vocab_size is not None:
            self.head = nn.Linear(size, config.draft_vocab_size, bias=False)
            # Ids of the tokens it knows; -1 until they are chosen.
            self.register_buffer("draft_token_ids", torch.full((config.draft_vocab_size,), -1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.mask_embedding is not None:
            init.normal_(self.mask_embedding, std=self.config.get_text_config().initializer_range)
        if module is self.edge_to:
            init.zeros_(module.weight)  # a token adds nothing until it has learned to
        # Inside a model of its own class, which would leave them as they are.
        for own in module.modules() if module is self else ():
            if isinstance(own, BlockConvolution):  # rows are as they were until it has learned to mix them
                kernel = torch.zeros_like(own.base_kernel)
                kernel[:, 0] = 1
                init.copy_(own.base_kernel, kernel)
                init.zeros_(own.kernel_projection.weight)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return tuple(self.config.feature_layers)

    @property
    def most_levels(self) -> int:
        return self.config.num_levels

    @property
    def pools(self) -> bool:
        return self.config.visual_rows != "kept"

    def get_input_embeddings(self) -> None:
        """None: they are the target's."""

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
        # Row `r` is about token `r`, whose embedding stands in the row before. The first row is read as it is.
        is_visual = torch.zeros_like(visual_mask)
        is_visual[:, 1:] = visual_mask[:, :-1]
        if self.config.visual_rows == "dropped":
            is_last = torch.arange(real.shape[1], device=real.device) == real.sum(-1, keepdim=True) - 1
            return {}, real & (~is_visual | is_last), context
        # Behind the hidden states stand the visual feature, and whether it is to be read.
        flags = is_visual[..., None].to(features)
        visual = torch.where(is_visual[..., None], inputs_embeds.roll(1, dims=1).to(features), 0)
        context = features.new_zeros(len(features), inputs_embeds.shape[-1] + 1)
        return {"features": torch.cat([features, visual, flags], dim=-1)}, real, context

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """
        Turn hidden states of the target into what all layers read of it.

        Args:
            features (`torch.Tensor` of shape `(..., len(feature_layers) * hidden_size)`):
                Hidden states of the target, one layer behind the other, and what [`BlockDraftModel.pool`] has put
                behind them.

        Returns:
            `torch.Tensor` of shape `(..., hidden_size)`.
        """
        if self.visual_fc is None:
            return self.hidden_norm(self.fc(features))
        size = self.fc.out_features
        states, visual, flags = features.split([self.fc.in_features, size, 1], dim=-1)
        return self.hidden_norm(torch.where(flags > 0, self.visual_fc(visual), self.fc(states)))

    def block(
        self, root_embeds: torch.Tensor, features: torch.Tensor, num_levels: int, mask_embed: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Lay out what the layers read of a block.

        Args:
            root_embeds (`torch.Tensor` of shape `(..., hidden_size)`):
                Embeddings of the tokens emitted last.
            features (`torch.Tensor` of shape `(..., hidden_size)`):
                What [`BlockDraftModel.fuse`] makes of the target's hidden states at the tokens before them.
            num_levels (`int`):
                Levels that are wanted. A block of rows that see each other has its full size in any case.
            mask_embed (`torch.Tensor` of shape `(hidden_size,)`, *optional*):
                Embedding of `config.mask_token_id`, where there is one.

        Returns:
            `torch.Tensor` of shape `(..., num_rows, hidden_size)`.
        """
        num_rows = self.config.block_size
        if all(causal for causal, _ in self.sights):
            num_rows -= self.config.num_levels - num_levels
        mask = self.mask_embedding if mask_embed is None else mask_embed
        masks = mask.to(root_embeds).expand(*root_embeds.shape[:-1], num_rows - 1, -1)
        rows = torch.cat([root_embeds[..., None, :], masks], dim=-2)
        if self.join is None:
            return rows
        return self.join(torch.cat([rows, features.to(rows)[..., None, :].expand_as(rows)], dim=-1))

    def visible(self, num_rows: int, device: torch.device) -> list[torch.Tensor]:
        """Tell which rows of a block each of them sees: masks of shape `(num_rows, num_rows)`, one for each sight."""
        everything = torch.ones(num_rows, num_rows, dtype=torch.bool, device=device)
        return [everything.tril() if causal else everything for causal, _ in self.sights]

    def levels(self, hidden_states: torch.Tensor, num_levels: int) -> torch.Tensor:
        """Take of a block's rows `(..., num_rows, hidden_size)` those that say the first `num_levels` levels."""
        first = 0 if self.config.predicts_next else 1
        return hidden_states[..., first : first + num_levels, :]

    def edges_from(self, parents: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """
        Say what tokens add to the scores of those that follow them, as a vector that `edge_to` makes scores of.

        Args:
            parents (`torch.Tensor` of shape `(...)`):
                Tokens.
            rows (`torch.Tensor` of shape `(..., hidden_size)`):
                What a head reads of those that follow; dimensions before the last may be 1.

        Returns:
            `torch.Tensor` of shape `(..., edge_rank)`.
        """
        edges = self.edge_from(parents)
        if self.edge_row is not None:
            return edges * self.edge_row(rows.to(edges))
        if self.edge_gate is not None:
            rows = rows.to(edges).expand(*edges.shape[:-1], -1)
            return edges * self.edge_gate(torch.cat([rows, edges], dim=-1)).sigmoid()
        return edges

    def remember(self, features: torch.Tensor, position_ids: torch.Tensor, cache: Cache) -> None:
        """
        Add keys and values of what is known of the target to the cache of all layers.

        Args:
            features (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
                What [`BlockDraftModel.fuse`] makes of the target's hidden states.
            position_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
                Their places.
            cache (`Cache`):
                The cache.
        """
        cos, sin = (own[:, None] for own in self.model.rotary_emb(features, position_ids))
        for index, layer in enumerate(self.model.layers):
            attention = layer.self_attn
            shape = (*features.shape[:2], -1, attention.head_dim)
            keys, values = (project(features).view(shape) for project in (attention.k_proj, attention.v_proj))
            if hasattr(attention, "k_norm"):
                keys = attention.k_norm(keys)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            cache.update(keys * cos + rotate_half(keys) * sin, values, index)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_masks: list[torch.Tensor],
        position_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        feature_positions: torch.Tensor | None = None,
        cache: Cache | None = None,
        block_features: torch.Tensor | None = None,
        mask_embed: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """
        Say the tokens of blocks.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
                What [`BlockDraftModel.block`] makes, of one block; or, with `block_features`, embeddings of the tokens
                that blocks begin with, one behind the other, a row each.
            attention_masks (`list[torch.Tensor]` of shapes `(batch_size, 1, num_rows, past_length + num_rows)`):
                Additive float masks over the cache and these rows, one for each of `sights`.
            position_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
                Places of the rows.
            features (`torch.Tensor` of shape `(batch_size, num_features, hidden_size)`, *optional*):
                What is added to the cache before, as by [`BlockDraftModel.remember`].
            feature_positions (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*):
                Their places.
            cache (`Cache`, *optional*):
                What is known of the target. The rows of the blocks are added to it.
            block_features, mask_embed (`torch.Tensor`, *optional*):
                What [`BlockDraftModel.block`] makes whole blocks of with them: the other tensors are about its rows.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`]: Of each row what a head reads.
        """
        size = self.config.get_text_config().hidden_size
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != size:
            raise ValueError(
                f"`inputs_embeds` must have shape `(batch_size, num_rows, {size})`, got {tuple(inputs_embeds.shape)}. "
                "Pass what `block` makes of embeddings of the target this draft was made for."
            )
        size = inputs_embeds.shape[1]
        if block_features is not None:
            blocks = self.block(inputs_embeds, block_features, self.config.num_levels, mask_embed)
            size, inputs_embeds = blocks.shape[2], blocks.flatten(1, 2)
        cache = DynamicCache(config=self.config.get_text_config()) if cache is None else cache
        if features is not None:
            self.remember(features, feature_positions, cache)
        places = self.model.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer, sight in zip(self.model.layers, self._sight_of_layer, strict=True):
            hidden_states = layer(hidden_states, attention_masks[sight], places, cache, size)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


__all__ = ["BlockDraftModel"]
