"""Trains a draft on the features of a frozen target, computed in the same step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.trainer.base import DraftTrainer
from transformers_msd.trainer.blocks import choose_anchors, predict_blocks
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.data import DraftRows, feature_noise, target_rows, unroll_attention_mask
from transformers_msd.trainer.dataset import token_counts
from transformers_msd.trainer.health import check_trainable
from transformers_msd.trainer.losses import feature_loss
from transformers_msd.traits.scales import logits_of, scales_of


class MSDTrainer(DraftTrainer):
    """
    Trainer of drafts that read the target's features: [`MSDDraftModel`], [`Eagle3DraftModel`],
    [`BlockDraftModel`].

    Features are computed in the same step and not kept.

    Args:
        model ([`FeatureDraftModel`]):
            Draft to train.
        target, args, train_dataset, processing_class, kwargs:
            As [`DraftTrainer`] has them.

    Raises:
        ValueError: If the draft doesn't fit the target, or the losses the draft, or the dataset has no rows to learn
            from at this stage.
    """

    _name = "MSD"
    _card = {
        "imports": "from transformers_msd import {draft_class}",
        "loading": '{draft_class}.from_pretrained("{name}", dtype=target.dtype, device_map=target.device)',
        "relation": "adapter",  # it has no embeddings of its own, and runs beside its target alone
    }

    def __init__(
        self,
        model: FeatureDraftModel,
        target: PreTrainedModel,
        args: MSDTrainingConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        check_trainable(model)
        model.check_target(target)
        check_draft_settings(type(model), args)
        self._tag_names = ["transformers-msd", model.tag, "speculative-decoding", "draft-model"]
        self._card = self._card | {"method": model.method}
        # TRL writes special token ids there, and a model that can't generate has none.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        if model.needs_tokens:
            counts = token_counts(train_dataset, processing_class, model.config.get_text_config())
            model.choose_tokens(counts, target.get_output_embeddings())
        super().__init__(model, target, args, train_dataset, processing_class, **kwargs)
        if model.head is not None and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "A draft with a head of its own can't be sharded by FSDP, got a "
                f"{type(model).__name__} with one of {model.head.out_features} tokens. "
                "Use `ddp.yaml`, `zero2.yaml` or `zero3.yaml`."
            )

    def assistant(self) -> FeatureDraftModel:
        return self.accelerator.unwrap_model(self.model)

    def loss_sum(
        self, model: FeatureDraftModel, inputs: dict[str, torch.Tensor], row_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        draft = self.assistant()
        rows = target_rows(
            self.target,
            inputs,
            draft.config.visual_token_ids,
            draft.dtype,
            draft.feature_layers,
            draft.reads_placeholders,
            draft.embedding_scale,
        )
        # What is drawn for a row is another in each epoch, and the same whenever it is evaluated.
        epoch = int(self.state.epoch or 0) if self.model.training else 0
        seeds = [hash((self.args.seed, epoch, row)) for row in row_ids]
        if self.model.training and self.args.feature_noise:
            noise = feature_noise(rows.features, rows.row_mask, seeds, self.args.feature_noise)
            rows = replace(rows, features=rows.features + noise)
        if isinstance(draft, BlockDraftModel):
            return self._block_loss_sum(model, draft, rows, inputs["input_ids"][:, 1:], seeds)
        rows = rows.pool(draft)
        features, supervised = self.accelerator.autocast()(draft.fuse)(rows.features), rows.supervised
        cache = DynamicCache() if self.args.num_unroll_steps > 1 else None
        target_features = rows.target_features[rows.supervised]
        steps, counted, loss = {}, {}, 0.0
        for step in range(self.args.num_unroll_steps):
            predicted = model(
                inputs_embeds=rows.inputs_embeds,
                features=features,
                visual_mask=rows.visual_mask,
                attention_mask=rows.row_mask
                if cache is None
                else unroll_attention_mask(rows.row_mask, step, features.dtype),
                position_ids=rows.position_ids,
                cache=cache,
                use_cache=False,
            ).last_hidden_state
            suffix = f"_{step + 1}"
            steps[suffix], counted[suffix] = predicted[rows.supervised], supervised[rows.supervised]
            if draft.predicts_features:
                of_features = feature_loss(steps[suffix], target_features)[counted[suffix]]
                self.count({"feature_loss": of_features.sum()}, len(of_features), suffix)
                loss = loss + self.args.step_weights[step] * self.args.feature_loss_weight * of_features.sum()
            # Row r goes on from what row r - 1 predicted, in the chain of a supervised row.
            features = pad(predicted[:, :-1], (0, 0, 1, 0))
            supervised = supervised & pad(supervised[:, :-1], (1, 0), value=False)
        loss = loss + self.token_loss_sum(steps, target_features, counted, *self._own_head(draft))
        return loss, rows.supervised.sum()

    def _block_loss_sum(
        self,
        model: nn.Module,
        draft: BlockDraftModel,
        rows: DraftRows,
        token_ids: torch.Tensor,
        seeds: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        anchors, is_begun = choose_anchors(rows.supervised, self.args.num_blocks, seeds)
        fuse = self.accelerator.autocast()(draft.fuse)
        blocks = predict_blocks(model, draft, self.target, rows, token_ids, anchors, is_begun, fuse)
        predicted, head = blocks.predicted, self._own_head(draft)
        if draft.edge_from is not None:
            edges = draft.edges_from(blocks.parents, predicted)
            predicted = torch.cat([predicted, edges.to(predicted)], dim=-1)
            head = self._head_with_edges(draft)
        losses, agrees = self.token_losses([predicted], blocks.target_features, *head)
        # Half of the distance is the chance that a sampled token is rejected.
        chances = 1 - losses["probability_loss"][0].detach() / 2 if self.args.prefix_weights else None
        of_levels = [self.args.unroll_decay**level for level in range(draft.config.num_levels)]
        weights = blocks.weigh([weight / sum(of_levels) for weight in of_levels], chances)
        levels = blocks.levels
        for level in range(draft.config.num_levels):
            own = levels == level
            sums = {name: loss[0, own].sum() for name, loss in losses.items()}
            self.count(sums | {"agreement": agrees[0, own].float().sum()}, int(own.sum()), f"_{level + 1}")
        total = sum(weight * (weights * losses[name][0]).sum() for name, (_, weight) in self._token_losses.items())
        return total, rows.supervised.sum()

    def _head_with_edges(
        self, draft: BlockDraftModel
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        """Return what turns rows, and vectors of the tokens before behind them, into logits, and its tokens."""
        head, token_ids = self._own_head(draft) or (None, None)
        size = draft.config.get_text_config().hidden_size

        def with_edges(rows: torch.Tensor) -> torch.Tensor:
            own = rows[..., :size]
            logits = logits_of(self.target, own.to(self.target.dtype)) if head is None else head(own)
            edges = draft.edge_to(rows[..., size:])
            return logits + (edges if token_ids is None else edges[..., token_ids])

        return with_edges, token_ids

    def _own_head(
        self, draft: FeatureDraftModel
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None] | tuple[()]:
        """Return the head of a draft that has its own, and its tokens where they are not all."""
        scales = draft.logit_scales or scales_of(self.target)
        if draft.head is None:
            of_target = self.target.get_output_embeddings()
            named = draft.logit_scales is not None
            return (lambda rows: scales.of_logits(of_target(rows.to(self.target.dtype))), None) if named else ()
        token_ids = None if draft.config.draft_vocab_size is None else draft.draft_token_ids
        return lambda rows: scales.of_logits(draft.own_logits(rows)), token_ids


def check_draft_settings(draft_class: type[FeatureDraftModel], args: MSDTrainingConfig) -> None:
    """Raise a `ValueError` if settings are none for drafts of a class."""
    if not issubclass(draft_class, BlockDraftModel):
        if args.prefix_weights:
            raise ValueError(
                f"`prefix_weights` weighs the levels of a `BlockDraftModel`, got {draft_class.__name__}. Leave it out."
            )
    elif args.num_unroll_steps > 1 or args.activation_checkpointing:
        raise ValueError(
            "A `BlockDraftModel` says all levels in one forward, and reads the target in a cache, got "
            f"`num_unroll_steps={args.num_unroll_steps}` and `activation_checkpointing="
            f"{args.activation_checkpointing}`. Leave them out; `unroll_decay` weighs levels."
        )
    elif args.prefix_weights and args.unroll_decay != 1:
        raise ValueError(
            f"`prefix_weights` takes the place of `unroll_decay`, got both ({args.unroll_decay}). Leave one out."
        )
    if args.feature_loss_weight and not draft_class.predicts_features:
        raise ValueError(
            f"{draft_class.__name__} does not predict the target's features, got `feature_loss_weight="
            f"{args.feature_loss_weight}`. Set it to 0, and `token_loss_weight` to 1."
        )
