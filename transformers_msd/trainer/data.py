"""Draft rows as training sees them: tokens paired with features, and what each unrolled step may look at."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from transformers_msd.modeling_msd import visual_token_mask


@dataclass(frozen=True)
class DraftRows:
    """
    Inputs and targets of the draft. Row `r` holds token `r + 1` and the feature at token `r`.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Embeddings of tokens `r + 1`.
        features (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            The target's features at tokens `r`.
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


def pair_rows(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor,
    inputs_embeds: torch.Tensor,
    features: torch.Tensor,
    visual_token_ids: list[int],
) -> DraftRows:
    """Pair every token with the target's feature at the token before it."""
    attention_mask = attention_mask.bool()
    row_mask = attention_mask[:, :-1] & attention_mask[:, 1:]
    return DraftRows(
        inputs_embeds=inputs_embeds[:, 1:],
        features=features[:, :-1],
        target_features=features[:, 1:],
        visual_mask=visual_token_mask(input_ids[:, 1:], visual_token_ids),
        row_mask=row_mask,
        # The token after the last one is unknown.
        supervised=pad(labels[:, 2:] != -100, (0, 1), value=False) & row_mask,
        position_ids=(row_mask.cumsum(-1) - 1).clamp(min=0),
    )


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
