"""Draft rows as training sees them: tokens paired with features, and what each unrolled step may look at."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from transformers_msd.compat import encode_pictures
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.capturing import capturing
from transformers_msd.target.recording import side_by_side, with_layers
from transformers_msd.target.target import TOKEN_TYPES
from transformers_msd.traits.scales import find_scales, look_up, wants_scales
from transformers_msd.traits.tokens import visual_token_mask


# For a model's `forward`, whose features are what is wanted. `1` would do, but of a batch it leaves rows that are not
# contiguous, for each of which PyTorch copies the head on a CPU.
NO_LOGITS = {"logits_to_keep": torch.empty(0, dtype=torch.long)}


@dataclass(frozen=True)
class RowCollator:
    """
    Collates rows with another collator, begins them as a user's call of the processor does, and keeps their numbers in
    the dataset.

    Args:
        collator (`Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]`):
            Collator of all else.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    COLUMN = "row_id"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        row_ids = [row.get(self.COLUMN, -1) for row in rows]
        batch = self.collator([{name: row[name] for name in row if name != self.COLUMN} for row in rows])
        if isinstance(self.collator, DataCollatorForVisionLanguageModeling):
            batch = add_bos(batch, self.collator.processor, self.collator.max_length)
        return {**batch, self.COLUMN: torch.tensor(row_ids)}


def add_bos(
    batch: dict[str, torch.Tensor], processor: ProcessorMixin, max_length: int | None
) -> dict[str, torch.Tensor]:
    """
    Put the bos token in front of rows where a user's call has it from the tokenizer, not from the chat template.

    TRL's collator lets a processor add no special token.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Inputs and labels, padded on the right.
        processor ([`~transformers.ProcessorMixin`]):
            The processor that made them.
        max_length (`int`, *optional*):
            Length that rows are cut to.
    """
    bos_token_id = processor.tokenizer.bos_token_id
    if bos_token_id is None or batch["input_ids"][0, 0] == bos_token_id:
        return batch
    if processor(text=["a"])["input_ids"][0][0] != bos_token_id:
        return batch
    values = {"input_ids": bos_token_id, "attention_mask": 1, "labels": -100} | dict.fromkeys(TOKEN_TYPES, 0)
    return {
        name: pad(value, (1, 0), value=values[name])[:, :max_length] if name in values else value
        for name, value in batch.items()
    }


@dataclass(frozen=True)
class DraftRows:
    """
    Inputs and targets of the draft. Row `r` holds token `r + 1` and the feature at token `r`.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Embeddings of tokens `r + 1`.
        features (`torch.Tensor` of shape `(batch_size, num_rows, num_layers * hidden_size)`):
            What the draft reads of the target at tokens `r`: its features, or hidden states of several layers.
        target_features (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            The target's features at tokens `r + 1`, which the draft predicts.
        visual_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether tokens `r + 1` are visual.
        row_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether the rows are real; the others are padding.
        supervised (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether the tokens the rows predict, `r + 2`, are the assistant's.
        position_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Positions, which count real rows.
    """

    inputs_embeds: torch.Tensor
    features: torch.Tensor
    target_features: torch.Tensor
    visual_mask: torch.Tensor
    row_mask: torch.Tensor
    supervised: torch.Tensor
    position_ids: torch.Tensor

    def pool(self, draft: FeatureDraftModel) -> "DraftRows":
        """Pool visual rows as a draft does in decoding, and pack those that are kept to the left."""
        if not draft.pools:
            return self
        changed, kept, _ = draft.pool(
            self.inputs_embeds, self.features, self.position_ids, self.visual_mask, self.row_mask, None
        )
        pooled = replace(self, **changed, row_mask=kept, supervised=self.supervised & kept)
        order = (~kept).int().sort(dim=1, stable=True).indices[:, : int(kept.sum(-1).max())]
        sequences = torch.arange(len(order), device=order.device)[:, None]
        return DraftRows(**{field.name: getattr(pooled, field.name)[sequences, order] for field in fields(self)})


def pair_rows(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor,
    inputs_embeds: torch.Tensor,
    features: torch.Tensor,
    visual_token_ids: list[int],
    target_features: torch.Tensor | None = None,
) -> DraftRows:
    """Pair every token with what is read of the target at the token before it, by default its features."""
    target_features = features if target_features is None else target_features
    attention_mask = attention_mask.bool()
    row_mask = attention_mask[:, :-1] & attention_mask[:, 1:]
    return DraftRows(
        inputs_embeds=inputs_embeds[:, 1:],
        features=features[:, :-1],
        target_features=target_features[:, 1:],
        visual_mask=visual_token_mask(input_ids[:, 1:], visual_token_ids),
        row_mask=row_mask,
        # The token after the last one is unknown.
        supervised=pad(labels[:, 2:] != -100, (0, 1), value=False) & row_mask,
        position_ids=(row_mask.cumsum(-1) - 1).clamp(min=0),
    )


@torch.no_grad()
def hidden_states(
    target: nn.Module, inputs: dict[str, torch.Tensor], visual_token_ids: list[int], layers: tuple[int, ...] = (0, -1)
) -> list[torch.Tensor]:
    """
    Run the target; return hidden states `(batch_size, num_rows, hidden_size)` of some layers, by default what its
    layers read, and its features.
    """
    # One row of logits tells what the model does to them.
    asks = wants_scales(target)
    settings = {"logits_to_keep": torch.tensor([-1])} if asks else NO_LOGITS
    with capturing(target):
        outputs = target(
            **encode_pictures(target, inputs),
            output_hidden_states=with_layers(False, layers),
            use_cache=False,
            **settings,
        )
    inputs_embeds, features = outputs.hidden_states[0], outputs.hidden_states[-1]
    if asks and inputs_embeds.shape[:-1] == inputs["input_ids"].shape:
        text = inputs["attention_mask"].bool() & ~visual_token_mask(inputs["input_ids"], visual_token_ids)
        table_rows = target.get_input_embeddings()(inputs["input_ids"][text])
        find_scales(target, table_rows, inputs_embeds[text], features[:, -1], outputs.logits[:, -1])
    return [outputs.hidden_states[layer] for layer in layers]


@torch.no_grad()
def target_rows(
    target: nn.Module,
    inputs: dict[str, torch.Tensor],
    visual_token_ids: list[int],
    dtype: torch.dtype | None = None,
    feature_layers: tuple[int, ...] = (-1,),
    reads_placeholders: bool = False,
    embedding_scale: float | None = None,
) -> DraftRows:
    """
    Run the target, and pair its embeddings and features as the draft reads them.

    Args:
        target (`torch.nn.Module`):
            The target.
        inputs (`dict[str, torch.Tensor]`):
            Its inputs, with `attention_mask` and `labels`.
        visual_token_ids (`list[int]`):
            Ids of the placeholders, as in `MSDConfig.visual_token_ids`.
        dtype (`torch.dtype`, *optional*):
            Dtype of the draft, the target's by default.
        feature_layers (`tuple[int, ...]`, *optional*, defaults to the last):
            Hidden states that the draft reads.
        reads_placeholders (`bool`, *optional*, defaults to `False`):
            Whether it reads embeddings of placeholders, where the target reads visual features.
        embedding_scale (`float`, *optional*):
            What it multiplies the target's table by, where it reads that.
    """
    labels = inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    layers = tuple(dict.fromkeys((0, -1, *feature_layers)))  # each is converted once
    found = hidden_states(target, inputs, visual_token_ids, layers)
    states = {layer: state.to(dtype or state.dtype) for layer, state in zip(layers, found, strict=True)}
    inputs_embeds, features, read = states[0], states[-1], [states[layer] for layer in feature_layers]
    input_ids = inputs["input_ids"]
    if reads_placeholders or embedding_scale is not None:
        embeds = look_up(target, input_ids, embedding_scale).to(inputs_embeds)
        is_visual = visual_token_mask(input_ids, visual_token_ids)[..., None]
        if embedding_scale is not None:
            inputs_embeds = inputs_embeds.where(is_visual, embeds)
        if reads_placeholders:
            inputs_embeds = embeds.where(is_visual, inputs_embeds)
    return pair_rows(
        input_ids, labels, inputs["attention_mask"], inputs_embeds, side_by_side(read), visual_token_ids, features
    )


def feature_noise(features: torch.Tensor, row_mask: torch.Tensor, seeds: list[int], width: float) -> torch.Tensor:
    """
    Draw uniform noise for the target's features, each sequence's from its own seed (EAGLE, arXiv 2401.15077).

    Args:
        features (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Features, whose shape and dtype the noise has.
        row_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether the rows are real; the noise of the others is 0.
        seeds (`list[int]`):
            A seed per sequence.
        width (`float`):
            Width of the noise at 512 rows; that of longer sequences is smaller, of shorter ones larger.
    """
    noise = torch.zeros_like(features)
    for sequence, (mask, seed) in enumerate(zip(row_mask, seeds, strict=True)):
        generator = torch.Generator(features.device).manual_seed(seed)
        length = int(mask.sum())
        drawn = torch.rand(length, features.shape[-1], generator=generator, device=features.device) - 0.5
        noise[sequence, mask] = (drawn * (width * 512 / max(length, 1))).to(noise.dtype)
    return noise


def unroll_attention_mask(row_mask: torch.Tensor, step: int, dtype: torch.dtype) -> torch.Tensor:
    """
    Make the additive mask of one unrolled step over the keys of all steps so far (HASS, arXiv 2408.15766).

    In step `j` row `r` is the `j`-th node of the chain drafted from row `r - j`. As in decoding, it looks at the rows
    up to `r - j` with the target's features (the keys of step 0), then at the chain: row `r - j + i` in step `i`.

    Args:
        row_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether the rows are real.
        step (`int`):
            Step, counted from 0.
        dtype (`torch.dtype`):
            Dtype of the mask, which has shape `(batch_size, 1, num_rows, (step + 1) * num_rows)`.
    """
    num_rows = row_mask.shape[1]
    rows = torch.arange(num_rows, device=row_mask.device)
    distance = rows[:, None] - rows[None, :]  # (num_rows, num_rows): query minus key
    blocks = [(distance >= step) & row_mask[:, None, :]]
    blocks += [(distance == step - i).expand_as(blocks[0]) for i in range(1, step + 1)]
    visible = torch.cat(blocks, dim=-1)[:, None]
    return torch.zeros(visible.shape, dtype=dtype, device=row_mask.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )
