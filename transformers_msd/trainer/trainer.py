"""Trains a draft on the features of a frozen target, computed in the same step."""

from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.utils.data import Sampler
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTTrainer

from transformers_msd.modeling_msd import MSDDraftModel
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.curriculum import RampSampler
from transformers_msd.trainer.data import DraftRows, pair_rows, unroll_attention_mask
from transformers_msd.trainer.losses import chunked_token_loss, feature_loss


class MSDTrainer(SFTTrainer):
    """
    Trainer of [`MSDDraftModel`].

    Args:
        model ([`MSDDraftModel`]):
            Draft to train.
        target ([`~transformers.PreTrainedModel`]):
            Model the draft is for. It is frozen and set to evaluation mode.
        args ([`MSDTrainingConfig`]):
            Settings.
        train_dataset ([`~datasets.Dataset`]):
            Rows of `messages` and, for a multimodal target, `images` (an empty list in text rows).
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the target.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~trl.SFTTrainer`].
    """

    _tag_names = ["transformers-msd"]
    _name = "MSD"
    # The loss is a mean over the supervised rows of a batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: MSDDraftModel,
        target: PreTrainedModel,
        args: MSDTrainingConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        # TRL writes special token ids there, and a model that can't generate has none.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        self._text_rows, self._visual_rows = split_rows(train_dataset)
        if args.stage == "text":
            train_dataset = train_dataset.select(self._text_rows)
        if (args.stage != "multimodal" and not self._text_rows) or (args.stage == "ramp" and not self._visual_rows):
            raise ValueError(
                f"`stage={args.stage!r}` needs rows without pictures, and `ramp` also some with, got "
                f"{len(self._text_rows)} without and {len(self._visual_rows)} with. Add rows or choose another stage."
            )
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        self.target = self.accelerator.prepare_model(target.eval().requires_grad_(False), evaluation_mode=True)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.stage != "ramp":
            return super()._get_train_sampler(train_dataset)
        sampler = RampSampler(self._text_rows, self._visual_rows, num_draws=1, seed=self.args.seed)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler.num_draws = (
            self.args.max_steps * rows_per_step
            if self.args.max_steps > 0
            else int(self.args.num_train_epochs * len(sampler))
        )
        return sampler

    def compute_loss(
        self,
        model: MSDDraftModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = self._target_rows(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        features, supervised = rows.features, rows.supervised
        if self.model.training:
            scale = self.args.feature_noise * 512 / features.shape[1]
            features = features + (torch.rand_like(features) - 0.5) * scale
        cache = DynamicCache() if self.args.num_unroll_steps > 1 else None
        loss = 0.0
        for step in range(self.args.num_unroll_steps):
            predicted = model(
                inputs_embeds=rows.inputs_embeds,
                features=features,
                visual_mask=rows.visual_mask,
                attention_mask=rows.row_mask
                if cache is None
                else unroll_attention_mask(rows.row_mask, step, features.dtype),
                position_ids=rows.position_ids,
                past_key_values=cache,
                use_cache=False,
            ).last_hidden_state
            step_loss, step_metrics = self._rows_loss(predicted[supervised], rows.target_features[supervised])
            loss = loss + step_loss / self.args.num_unroll_steps
            for name, value in step_metrics.items():
                metrics[f"{name}_{step + 1}"].append(value.item())
            # Row r goes on from what row r - 1 predicted, in the chain of a supervised row.
            features = pad(predicted[:, :-1], (0, 0, 1, 0))
            supervised = supervised & pad(supervised[:, :-1], (1, 0), value=False)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    @torch.no_grad()
    def _target_rows(self, inputs: dict[str, torch.Tensor]) -> DraftRows:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = self.target(**inputs, output_hidden_states=[0, -1], use_cache=False, logits_to_keep=1)
        return pair_rows(
            inputs["input_ids"],
            labels,
            inputs["attention_mask"],
            outputs.hidden_states[0].to(self.model.dtype),
            outputs.hidden_states[-1].to(self.model.dtype),
            self.model.config.visual_token_ids,
        )

    def _rows_loss(
        self, predicted: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        num_rows = max(len(predicted), 1)
        if len(predicted) == 0:
            # Keeps the graph, so that every process steps the same parameters.
            return predicted.sum(), {}
        head = self.accelerator.unwrap_model(self.target).get_output_embeddings()
        tokens, agrees = chunked_token_loss(predicted, target, head, self.args.head_chunk_size)
        features = feature_loss(predicted, target).sum() / num_rows
        tokens = tokens.sum() / num_rows
        loss = self.args.feature_loss_weight * features + self.args.token_loss_weight * tokens
        return loss, {"feature_loss": features, "token_loss": tokens, "agreement": agrees.float().mean()}


def split_rows(dataset: Dataset) -> tuple[list[int], list[int]]:
    """Tell the rows without pictures from those with, without decoding a picture."""
    if "images" not in dataset.column_names:
        return list(range(len(dataset))), []
    column = dataset.with_format("arrow")[:]["images"]
    num_images = pyarrow.compute.list_value_length(column).fill_null(0).to_pylist()
    return [i for i, num in enumerate(num_images) if num == 0], [i for i, num in enumerate(num_images) if num > 0]
