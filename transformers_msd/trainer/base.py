"""What trainers of drafts share: the frozen target, the order of rows, the mean over a global batch, checkpoints."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTTrainer

from transformers_msd.costs.provenance import hardware
from transformers_msd.drafters.vlm import VLMDrafter
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer.checkpoints import check_checkpoint, last_checkpoint, remove_if_broken
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.curriculum import RampSampler, ShuffledSampler
from transformers_msd.trainer.data import RowCollator
from transformers_msd.trainer.dataset import rows_of_stage, usable_rows
from transformers_msd.trainer.health import UNSUPERVISED, check_means, check_weights
from transformers_msd.trainer.losses import chunked_token_losses, token_losses_of
from transformers_msd.trainer.parallel import prepare_target, reshard
from transformers_msd.trainer.report import plot_curves, write_card
from transformers_msd.traits.scales import logits_of


class DraftTrainer(SFTTrainer):
    """
    Base of the trainers of drafts, which say what drafts ([`~DraftTrainer.assistant`]) and what its loss is
    ([`~DraftTrainer.loss_sum`]).

    What is drawn at random follows from `args.seed`, the epoch and the row, and the loss is a mean over the supervised
    tokens of the global batch: neither the number of processes, nor gradient accumulation, nor an interruption changes
    the curve.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Draft to train.
        target ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model the draft is for, quantised or adapted as it will be when it generates. It is frozen and set to
            evaluation mode.
        args ([`MSDTrainingConfig`]):
            Settings.
        train_dataset ([`~datasets.Dataset`]):
            Rows of `messages`, of `prompt` and `completion` (then the completion is supervised), or of `text` or
            `input_ids` (then all of it is), and for a multimodal target of `images` (an empty list in text rows).
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the target.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~trl.SFTTrainer`], all but `compute_metrics`.

    Raises:
        ValueError: If the dataset has no rows to learn from at this stage.
    """

    # The loss is a mean over the global batch, and training divides it no further.
    loss_is_scaled_for_ga = True
    # What a model card says of the draft: `imports`, the `loading` of it, its `method`, its `relation` to the target.
    _card: dict[str, str]

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel,
        args: MSDTrainingConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "`compute_metrics` would need the logits of every prompt, which are never computed. Use a callback, "
                "such as `AcceptanceLengthCallback`."
            )
        train_dataset = usable_rows(train_dataset, processing_class, args.max_length)
        self._text_rows, self._visual_rows = rows_of_stage(train_dataset, args.stage)
        if args.stage == "text":
            train_dataset = train_dataset.select(self._text_rows)
        if "messages" not in train_dataset.column_names:
            # Completions are supervised instead, or whole texts.
            args = copy.copy(args)
            args.assistant_only_loss = False
        self._dataset_name = train_dataset.info.dataset_name or "a dataset of its own"
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        self.model_accepts_loss_kwargs = True  # makes Transformers count the supervised tokens of the global batch
        self.train_dataset = self.train_dataset.add_column(RowCollator.COLUMN, list(range(len(self.train_dataset))))
        self.data_collator = RowCollator(self.data_collator)
        self._token_losses = token_losses_of(args)
        # Sums and counts of what is logged, both over the rows of this process.
        self._totals: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._embeddings, self._head = target.get_input_embeddings(), target.get_output_embeddings()
        self.target = prepare_target(target.eval().requires_grad_(False), self.accelerator)

    def assistant(self) -> FeatureDraftModel | VLMDrafter:
        """Return what drafts with the weights as they are."""
        raise NotImplementedError

    def loss_sum(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], row_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Sum the loss over supervised tokens.

        Args:
            model (`torch.nn.Module`):
                The draft, wrapped as it is trained.
            inputs (`dict[str, torch.Tensor]`):
                Inputs of the target, with `attention_mask` and `labels`.
            row_ids (`list[int]`):
                Numbers of the rows in the dataset.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The sum, and how many tokens are supervised.
        """
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs = dict(inputs)
        row_ids = inputs.pop(RowCollator.COLUMN).tolist()
        reshard(self._head, self._embeddings)  # in all processes or in none
        is_supervised = (inputs["labels"] != -100).any(-1)
        self.count({UNSUPERVISED: (~is_supervised).sum()}, len(is_supervised))
        loss, num_supervised = self.loss_sum(model, inputs, row_ids)
        if num_items_in_batch is None:
            num_items_in_batch = num_supervised
        elif self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, each of which adds its part of the global batch.
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = loss / max(num_items_in_batch, 1)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def token_loss_sum(
        self,
        predicted: dict[str, torch.Tensor],
        features: torch.Tensor,
        counted: dict[str, torch.Tensor] | None = None,
        draft_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        draft_token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Sum the weighted losses on tokens over the weighted steps, and add them to what is logged.

        Args:
            predicted (`dict[str, torch.Tensor]`):
                Features the draft predicts, of shape `(num_rows, hidden_size)`, of each unrolled step by what the
                logged names of that step end in.
            counted (`dict[str, torch.Tensor]`, *optional*):
                Rows of each step that count, of shape `(num_rows,)`, all by default.
            features, draft_head, draft_token_ids:
                As [`chunked_token_losses`] has them.
        """
        losses, agrees = self.token_losses(list(predicted.values()), features, draft_head, draft_token_ids)
        total = 0.0
        for step, suffix in enumerate(predicted):
            rows = slice(None) if counted is None else counted[suffix]
            sums = {name: own[step, rows].sum() for name, own in losses.items()}
            of_agreement = agrees[step, rows]
            self.count(sums | {"agreement": of_agreement.float().sum()}, len(of_agreement), suffix)
            of_step = sum(weight * sums[name] for name, (_, weight) in self._token_losses.items())
            total = total + self.args.step_weights[step] * of_step
        return total

    def token_losses(
        self,
        predicted: list[torch.Tensor],
        features: torch.Tensor,
        draft_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        draft_token_ids: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """
        Compute the losses on tokens by their names, and whether the likeliest tokens agree, all of shape `(num_steps,
        num_rows)`.

        Args:
            predicted, features, draft_head, draft_token_ids:
                As [`chunked_token_losses`] has them.
        """
        own_head = None
        if draft_head is None:
            predicted = [own.to(self.target.dtype) for own in predicted]
        else:
            own_head = self.accelerator.autocast()(draft_head)
        losses, agrees = chunked_token_losses(
            predicted,
            features.to(self.target.dtype),  # what its head takes
            partial(logits_of, self.target),
            self.args.head_chunk_size,
            [loss for loss, _ in self._token_losses.values()],
            own_head,
            draft_token_ids,
        )
        return dict(zip(self._token_losses, losses, strict=True)), agrees

    def count(self, sums: dict[str, torch.Tensor], num_rows: int, suffix: str = "") -> None:
        """Add sums over rows to what is logged, as a mean over the rows of all processes."""
        totals = self._totals["train" if self.model.training else "eval"]
        for name, value in sums.items():
            total = torch.stack([value.detach().float(), value.new_tensor(num_rows, dtype=torch.float32)])
            totals[name + suffix] = totals.get(name + suffix, 0) + total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        totals, self._totals[mode] = self._totals[mode], {}
        if totals:
            sums = self.accelerator.reduce(torch.stack(list(totals.values())), reduction="sum")
            means = {name: (a / b.clamp(min=1)).item() for name, (a, b) in zip(totals, sums, strict=True)}
            check_means(means, self.state.global_step, self.args.max_length, mode == "train")
            self._metrics[mode].update({name: [mean] for name, mean in means.items()})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_weights(self.model, self.accelerator, self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if RowCollator.COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, RowCollator.COLUMN]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        args = self.args
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.stage == "ramp":
            sampler = RampSampler(self._text_rows, self._visual_rows, 1, rows_per_step, args.seed)
            sampler.num_draws = (
                args.max_steps * rows_per_step if args.max_steps > 0 else int(args.num_train_epochs * len(sampler))
            )
            return sampler
        if args.train_sampling_strategy == "random":
            return ShuffledSampler(len(train_dataset or self.train_dataset), rows_per_step, args.seed)
        return super()._get_train_sampler(train_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            # Transformers would take the newest, whole or not.
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
        if resume_from_checkpoint not in (None, False):
            check_checkpoint(resume_from_checkpoint, self.model.config)
        # Reporters close at the end of training: what other callbacks log there must come before.
        reporters = tuple(get_reporting_integration_callbacks(self.args.report_to))
        self.callback_handler.callbacks.sort(key=lambda callback: isinstance(callback, reporters))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_world_process_zero():
            plot_curves(self.state.log_history, Path(self.args.output_dir) / "training.png")
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_weights(self.model, self.accelerator, self.state.global_step)
        with remove_if_broken(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        if not self.is_world_process_zero():
            return
        args, config = self.args, self.target.config
        tags = [tags] if isinstance(tags, str) else tags or []
        datasets = [dataset_name] if isinstance(dataset_name, str) else dataset_name or [self._dataset_name]
        name = args.hub_model_id or model_name or Path(args.output_dir).name
        place = name if args.push_to_hub or args.hub_model_id else args.output_dir
        draft_class = type(self.accelerator.unwrap_model(self.model)).__name__
        values = {key: text.format(name=place, draft_class=draft_class) for key, text in self._card.items()} | {
            "target": config.name_or_path,
            "is_multimodal": isinstance(self.processing_class, ProcessorMixin),
            "target_class": (config.architectures or [type(self.target).__name__])[0],
            "tags": sorted({*self._tag_names, *tags}),
            "tree": self.assistant().tree_config,
            "hardware": hardware(self.accelerator.device, self.accelerator.num_processes),
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "datasets": datasets,
            "num_steps": self.state.global_step,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "stage": args.stage,
            "num_unroll_steps": args.num_unroll_steps,
            "learning_rate": args.learning_rate,
        }
        write_card(Path(args.output_dir) / "README.md", name, values, self.state.log_history)
