"""Does the decoder feed a draft what training fed it? Where it doesn't, acceptance is low though the losses are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.drafters.msd_candidates import MSDCandidateGenerator
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import TOKEN_TYPES, Target
from transformers_msd.trainer.data import RowCollator, target_rows
from transformers_msd.trainer.health import check_trainable
from transformers_msd.traits.tokens import visual_token_ids


@dataclass(frozen=True)
class Parity:
    """
    How far the rows that a draft reads in decoding differ from those that it reads in training.

    Args:
        num_rows (`int`):
            Rows compared: of the prompts, visual ones pooled as the draft has it, and of what was generated.
        num_visual_rows (`int`):
            Visual ones among them.
        num_generated_rows (`int`):
            Rows that were committed by rounds.
        max_embedding_difference (`float`):
            Largest difference of an embedding.
        max_feature_difference (`float`):
            Largest difference of a feature that the draft reads; where it is decoupled, those of visual rows are not.
        equal_masks (`bool`):
            Whether the same rows count as visual.
        equal_positions (`bool`):
            Whether all rows have the same positions.
    """

    num_rows: int
    num_visual_rows: int
    num_generated_rows: int
    max_embedding_difference: float
    max_feature_difference: float
    equal_masks: bool
    equal_positions: bool

    def holds(self, tolerance: float = 1e-3) -> bool:
        """Tell whether training and decoding agree."""
        difference = max(self.max_embedding_difference, self.max_feature_difference)
        return self.equal_masks and self.equal_positions and difference <= tolerance


class _Recorder(Ungated):
    """Keeps what a draft reads in one call."""

    def __init__(self, assistant: FeatureDraftModel) -> None:
        super().__init__(assistant)
        self.read: list[Committed] = []

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        assert isinstance(candidates, MSDCandidateGenerator)
        read = candidates.reader.read

        def recorded(committed: Committed, is_prompt: bool, num_before: torch.Tensor | None) -> Committed:
            self.read.append(read(committed, is_prompt, num_before))
            return self.read[-1]

        candidates.reader.read = recorded  # lives for one call
        return candidates


def has_equal_prompt(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase, row: dict[str, Any], input_ids: torch.Tensor
) -> bool:
    """
    Tell whether a row of `messages` begins in training with the tokens that its prompt has in a user's call.

    Args:
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the target.
        row (`dict[str, Any]`):
            The row, with `images` where the target is multimodal.
        input_ids (`torch.Tensor` of shape `(1, sequence_length)`):
            Tokens of the prompt.
    """
    if isinstance(processing_class, ProcessorMixin):
        row_ids = RowCollator(DataCollatorForVisionLanguageModeling(processing_class))([row])["input_ids"]
    else:
        row_ids = processing_class.apply_chat_template(row["messages"], return_dict=True, return_tensors="pt")
        row_ids = row_ids["input_ids"]
    length = min(row_ids.shape[1], input_ids.shape[1])  # a row without an answer has no generation prompt
    return torch.equal(row_ids[:, :length], input_ids[:, :length])


@torch.no_grad()
def check_parity(
    target: PreTrainedModel,
    draft: FeatureDraftModel,
    inputs: dict[str, Any],
    max_new_tokens: int = 32,
) -> Parity:
    """
    Answer prompts with the decoder, run what came out through the training path, and compare what the draft reads.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        draft ([`FeatureDraftModel`]):
            Its draft, trained or not.
        inputs (`dict[str, Any]`):
            Prompts as for `generate`, left-padded.
        max_new_tokens (`int`, *optional*, defaults to 32):
            Length of the answers, longer than a few rounds.

    Raises:
        ValueError: If such a draft is not trained here.
    """
    check_trainable(draft)
    recorder = _Recorder(draft)
    output = target.generate(
        **inputs,
        assistant_model=recorder,
        return_dict_in_generate=True,  # rows that have ended stay
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
        do_sample=False,
        # A target of random weights would answer with pictures, of which there are no pixels.
        suppress_tokens=visual_token_ids(target.config) or None,
    )
    sequences = output.sequences
    fed = recorder.read[0].join(*recorder.read[1:])
    num_new = sequences.shape[1] - inputs["input_ids"].shape[1]
    training_inputs = {
        **inputs,
        "input_ids": sequences,
        "attention_mask": pad(inputs["attention_mask"], (0, num_new), value=1),
    }
    for name in TOKEN_TYPES:
        if name in training_inputs:
            training_inputs[name] = pad(training_inputs[name], (0, num_new))
    training_inputs["labels"] = sequences
    rows = target_rows(
        target,
        training_inputs,
        draft.config.visual_token_ids,
        feature_layers=draft.feature_layers,
        reads_placeholders=draft.reads_placeholders,
        embedding_scale=draft.embedding_scale,
    )
    rows = rows.pool(draft)

    differences = {"embeds": [0.0], "features": [0.0]}
    num_visual_rows, equal_masks, equal_positions = 0, True, True
    for sequence, length in enumerate(fed.lengths.tolist()):
        real = rows.row_mask[sequence].nonzero()[:length, 0]
        ours = slice(0, len(real))
        text = ~rows.visual_mask[sequence, real]
        embeds = fed.inputs_embeds[sequence, ours] - rows.inputs_embeds[sequence, real]
        features = fed.features[sequence, ours] - rows.features[sequence, real]
        differences["embeds"].append(embeds.abs().max().item())
        read = text if getattr(draft.config, "decoupled", False) else torch.ones_like(text)
        differences["features"].append(features[read].abs().max().item())
        num_visual_rows += int(fed.visual_mask[sequence, ours].sum())
        equal_masks &= torch.equal(fed.visual_mask[sequence, ours], ~text)
        equal_positions &= torch.equal(fed.position_ids[sequence, ours], rows.position_ids[sequence, real])
    return Parity(
        num_rows=int(fed.lengths.sum()),
        num_visual_rows=num_visual_rows,
        num_generated_rows=int((fed.lengths - recorder.read[0].lengths).sum()),
        max_embedding_difference=max(differences["embeds"]),
        max_feature_difference=max(differences["features"]),
        equal_masks=equal_masks,
        equal_positions=equal_positions,
    )
