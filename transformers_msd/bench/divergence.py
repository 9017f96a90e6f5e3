"""Where tokens differ from plain's, and how near a tie it was there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """
    The first token of a row that differs from plain's.

    Args:
        row (`int`):
            Row of the batch.
        step (`int`):
            Tokens generated before it.
        plain_token_id (`int`):
            Token of plain `generate`.
        token_id (`int`):
            Token of the other method; -1 where it had ended.
        logit_gap (`float`, *optional*):
            By how much plain's logit of its own token exceeds that of the other. None where there is no other token.
    """

    row: int
    step: int
    plain_token_id: int
    token_id: int
    logit_gap: float | None


@torch.no_grad()
def find_divergences(
    target: PreTrainedModel,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
    plain_tokens: torch.Tensor,
    tokens: torch.Tensor,
) -> list[Divergence]:
    """
    Compare the tokens of a method with plain's, row by row. Where they differ, plain `generate` runs once more for its
    logits.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        inputs (`dict[str, Any]`):
            The batch of prompts.
        settings (`dict[str, Any]`):
            Arguments of `generate`.
        seed (`int`):
            Seed of sampling.
        plain_tokens (`torch.Tensor` of shape `(batch_size, num_steps)`):
            What plain `generate` generated.
        tokens (`torch.Tensor` of shape `(batch_size, num_steps)`):
            What the method generated, perhaps in another number of steps.
    """
    num_steps = max(plain_tokens.shape[1], tokens.shape[1])
    plain_tokens, tokens = (pad(ids, (0, num_steps - ids.shape[1]), value=-1) for ids in (plain_tokens, tokens))
    differs = plain_tokens != tokens
    if not differs.any():
        return []
    torch.manual_seed(seed)
    logits = target.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True).logits
    divergences = []
    for row in differs.any(-1).nonzero()[:, 0].tolist():
        step = int(differs[row].int().argmax())
        plain_id, token_id = int(plain_tokens[row, step]), int(tokens[row, step])
        gap = None
        if min(plain_id, token_id) >= 0:
            gap = float(logits[step][row, plain_id] - logits[step][row, token_id])
        divergences.append(Divergence(row, step, plain_id, token_id, gap))
    return divergences
