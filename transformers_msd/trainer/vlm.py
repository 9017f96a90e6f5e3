"""Distils a small VLM, or language model, from the target it will draft for."""

from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from transformers_msd.drafters.vlm import VLMDrafter
from transformers_msd.trainer.base import DraftTrainer
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.data import NO_LOGITS, hidden_states
from transformers_msd.traits.scales import logits_of, wants_scales
from transformers_msd.traits.tokens import visual_token_ids


_OF_FEATURES = (
    "feature_loss_weight",
    "feature_noise",
    "num_blocks",
    "num_unroll_steps",
    "prefix_weights",
    "unroll_decay",
)


class VLMDraftTrainer(DraftTrainer):
    """
    Trainer of the small model of a [`VLMDrafter`]: the cross-entropy between its distributions and the target's on
    the assistant's tokens, which is their Kullback-Leibler divergence up to a constant.

    Train it on answers in the target's own words (`transformers-msd generate-data`).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The small model, which reads what the target's processor makes of a prompt.
        args ([`MSDTrainingConfig`]):
            Settings. There is no loss on features: `feature_loss_weight`, `feature_noise` and `num_unroll_steps` must
            be left as they are.
        target, train_dataset, processing_class, kwargs:
            As [`DraftTrainer`] has them.

    Raises:
        ValueError: If the vocabularies differ, a setting is of MSD's features, no loss on tokens is left, or FSDP or
            DeepSpeed is used.
    """

    _tag_names = ["transformers-msd", "speculative-decoding", "draft-model"]
    _name = "draft VLM"
    _card = {
        "imports": "from transformers import {draft_class}\nfrom transformers_msd import VLMDrafter",
        "loading": 'VLMDrafter({draft_class}.from_pretrained("{name}", dtype=target.dtype, device_map=target.device))',
        "method": "The draft is a model of its own (Spec-LLaVA, arXiv 2509.11961), distilled from its target.",
        "relation": "",  # it is a model of its own
    }

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel,
        args: MSDTrainingConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        ours, theirs = (each.config.get_text_config().vocab_size for each in (model, target))
        if ours != theirs:
            raise ValueError(
                f"The small model must have the target's vocabulary to learn its distributions, got {ours} tokens and "
                f"{theirs}. Resize its embeddings, or choose another."
            )
        check_settings(args)
        super().__init__(model, target, args, train_dataset, processing_class, **kwargs)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "A draft VLM must be trained by DDP, got FSDP or DeepSpeed, which exchange weights or gradients when "
                "they are used: processes whose rows have no pictures would not be in step. Use `ddp.yaml`."
            )

    def assistant(self) -> VLMDrafter:
        return VLMDrafter(self.accelerator.unwrap_model(self.model))

    def loss_sum(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], row_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        supervised = inputs["labels"][:, 1:] != -100
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        draft, visual = self.accelerator.unwrap_model(self.model), visual_token_ids(self.target.config)
        if wants_scales(draft):
            is_training = draft.training
            hidden_states(draft.eval(), inputs, visual)
            draft.train(is_training)
        features = hidden_states(self.target, inputs, visual)[1][:, :-1][supervised]
        # All layers: their states are kept for the gradients in any case.
        outputs = model(**inputs, output_hidden_states=True, use_cache=False, **NO_LOGITS)
        predicted = outputs.hidden_states[-1][:, :-1][supervised]
        loss = self.token_loss_sum({"": predicted}, features, draft_head=lambda rows: logits_of(draft, rows))
        # Rows without pictures leave the projector out, and the processes of a run must have the same gradients.
        nothing = sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad)
        return loss + 0 * nothing, supervised.sum()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        # Transformers saves a VLM by the names of published checkpoints, and would load those of its modules alone.
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def check_settings(args: MSDTrainingConfig) -> None:
    """Raise a `ValueError` if settings are none for a draft VLM."""
    changed = {name: getattr(args, name) for name in _OF_FEATURES if getattr(args, name) != getattr(type(args), name)}
    if changed:
        raise ValueError(
            f"{', '.join(_OF_FEATURES)} are of MSD's features, which a draft VLM has not, got {changed}. Remove them."
        )
    if not (args.token_loss_weight or args.top_k_loss_weight or args.probability_loss_weight):
        raise ValueError("A draft VLM learns from losses on tokens alone, got weights of 0 for all. Set one of them.")
