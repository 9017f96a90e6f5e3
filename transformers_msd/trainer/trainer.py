"""Trains a draft on the features of a frozen target, computed in the same step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel
from transformers_msd.trainer.base import DraftTrainer
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.data import feature_noise, target_rows, unroll_attention_mask
from transformers_msd.trainer.dataset import token_counts
from transformers_msd.trainer.losses import feature_loss
from transformers_msd.traits.scales import scales_of


class MSDTrainer(DraftTrainer):
    """
    Trainer of [`MSDDraftModel`].

    The target's features are computed in the same step and not kept.

    Args:
        model ([`MSDDraftModel`]):
            Draft to train.
        target, args, train_dataset, processing_class, kwargs:
            As [`DraftTrainer`] has them.

    Raises:
        ValueError: If the draft doesn't fit the target, or the dataset has no rows to learn from at this stage.
    """

    _tag_names = ["transformers-msd", "msd", "speculative-decoding", "draft-model"]
    _name = "MSD"
    _card = {
        "imports": "from transformers_msd import MSDDraftModel",
        "loading": 'MSDDraftModel.from_pretrained("{name}", dtype=target.dtype, device_map=target.device)',
        "method": "The method is MSD (arXiv 2505.14260), the tree EAGLE-2 (arXiv 2406.16858).",
        "relation": "adapter",  # it has no embeddings of its own, and runs beside its target alone
    }

    def __init__(
        self,
        model: MSDDraftModel,
        target: PreTrainedModel,
        args: MSDTrainingConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        if isinstance(model, HiViSDraftModel | ViSpecDraftModel):
            raise ValueError(
                f"`model` must be one that is trained here, got {type(model).__name__}, which is only loaded. Make "
                "an `MSDDraftModel(MSDConfig.from_target(target.config))`."
            )
        model.check_target(target)
        # TRL writes special token ids there, and a model that can't generate has none.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        if model.needs_tokens:
            counts = token_counts(train_dataset, processing_class, model.config.get_text_config())
            model.choose_tokens(counts, target.get_output_embeddings())
        super().__init__(model, target, args, train_dataset, processing_class, **kwargs)
        if model.head is not None and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "A draft with a head of its own can't be sharded by FSDP, got `draft_vocab_size="
                f"{model.config.draft_vocab_size}`. Use `ddp.yaml`, `zero2.yaml` or `zero3.yaml`."
            )

    def assistant(self) -> MSDDraftModel:
        return self.accelerator.unwrap_model(self.model)

    def loss_sum(
        self, model: MSDDraftModel, inputs: dict[str, torch.Tensor], row_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = target_rows(self.target, inputs, self.model.config.visual_token_ids, self.model.dtype)
        if self.model.training and self.args.feature_noise:
            seeds = [hash((self.args.seed, int(self.state.epoch or 0), row)) for row in row_ids]
            noise = feature_noise(rows.features, rows.row_mask, seeds, self.args.feature_noise)
            rows = replace(rows, features=rows.features + noise)
        rows = rows.pool(self.model.config)
        features, supervised = rows.features, rows.supervised
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
            of_features = feature_loss(steps[suffix], target_features)[counted[suffix]]
            self.count({"feature_loss": of_features.sum()}, len(of_features), suffix)
            loss = loss + self.args.feature_loss_weight * of_features.sum()
            # Row r goes on from what row r - 1 predicted, in the chain of a supervised row.
            features = pad(predicted[:, :-1], (0, 0, 1, 0))
            supervised = supervised & pad(supervised[:, :-1], (1, 0), value=False)
        loss = loss + self.token_loss_sum(steps, target_features, counted, *self._own_head())
        return loss / self.args.num_unroll_steps, rows.supervised.sum()

    def _own_head(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor] | tuple[()]:
        """Return head and tokens of a draft that has a smaller vocabulary."""
        draft = self.accelerator.unwrap_model(self.model)
        if draft.head is None:
            return ()
        return lambda rows: scales_of(self.target).of_logits(draft.head(rows)), draft.draft_token_ids
