"""Distils a small VLM, or language model, from the target it will draft for."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from transformers_msd.trainer.dataset import check_answers, drop_long_rows
from transformers_msd.trainer.losses import chunked_token_losses, token_loss
from transformers_msd.trainer.parallel import prepare_target


class VLMDraftTrainer(SFTTrainer):
    """
    Trainer of the small model of a [`VLMDrafter`]: the cross-entropy between its distributions and the target's on
    the assistant's tokens, which is their Kullback-Leibler divergence up to a constant.

    Train it on answers in the target's own words (`transformers-msd generate-data`).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The small model, which reads what the target's processor makes of a prompt.
        target ([`~transformers.PreTrainedModel`]):
            Model to draft for. It is frozen and set to evaluation mode.
        args ([`~trl.SFTConfig`]):
            Settings; those that concern the loss are ignored.
        train_dataset ([`~datasets.Dataset`]):
            Rows as [`MSDTrainer`] has them.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the target.
        head_chunk_size (`int`, *optional*, defaults to 512):
            Rows whose logits are in memory at a time.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~trl.SFTTrainer`].
    """

    _tag_names = ["transformers-msd", "speculative-decoding", "draft-model"]
    _name = "draft VLM"
    # The loss is a mean over the global batch, and training divides it no further.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        head_chunk_size: int = 512,
        **kwargs: Any,
    ):
        ours, theirs = (each.config.get_text_config().vocab_size for each in (model, target))
        if ours != theirs:
            raise ValueError(
                f"The small model must have the target's vocabulary to learn its distributions, got {ours} tokens and "
                f"{theirs}. Resize its embeddings, or choose another."
            )
        check_answers(train_dataset)
        if isinstance(processing_class, ProcessorMixin) and args.max_length is not None:
            train_dataset = drop_long_rows(train_dataset, processing_class, args.max_length)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        self.model_accepts_loss_kwargs = True  # makes Transformers count the supervised tokens of the global batch
        self.head_chunk_size = head_chunk_size
        self._heads = model.get_output_embeddings(), target.get_output_embeddings()
        self.target = prepare_target(target.eval().requires_grad_(False), self.accelerator)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        supervised = inputs["labels"][:, 1:] != -100
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        settings = {"output_hidden_states": [-1], "use_cache": False, "logits_to_keep": 1}
        with torch.no_grad():
            truth = self.target(**inputs, **settings).hidden_states[-1][:, :-1][supervised]
        predicted = model(**inputs, **settings).hidden_states[-1][:, :-1][supervised]
        draft_head, head = self._heads
        [losses], agrees = chunked_token_losses(
            predicted, truth, head, self.head_chunk_size, [token_loss], draft_head=draft_head
        )
        self._metrics["train" if self.model.training else "eval"]["agreement"].append(
            agrees.float().mean().item() if len(agrees) else 0.0
        )
        if num_items_in_batch is None:
            num_items_in_batch = supervised.sum()
        elif self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = losses.sum() / max(num_items_in_batch, 1)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss
