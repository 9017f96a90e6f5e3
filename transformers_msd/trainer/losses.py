"""Losses of a draft, one value per row."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def feature_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compare predicted features with the target's: smooth L1, a mean over the hidden size. Returns `(num_rows,)`."""
    return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)


def token_loss(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Compare the draft's distributions with the target's: soft cross-entropy. Returns `(num_rows,)`."""
    target_probabilities = target_logits.float().softmax(-1)
    return -(target_probabilities * logits.float().log_softmax(-1)).sum(-1)


def top_k_loss(logits: torch.Tensor, target_logits: torch.Tensor, top_k: int = 10) -> torch.Tensor:
    """
    Compare distributions where the target's is largest: the part of the soft cross-entropy that its `top_k` likeliest
    tokens have, their probabilities as they are (HASS, arXiv 2408.15766, section 3.1). Returns `(num_rows,)`.
    """
    probabilities, tokens = target_logits.float().softmax(-1).topk(min(top_k, target_logits.shape[-1]))
    return -(probabilities * logits.float().log_softmax(-1).gather(-1, tokens)).sum(-1)


def probability_loss(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """
    Compare distributions by the distance of their probabilities, L1 summed over the vocabulary (ViSpec, arXiv
    2509.15235): twice the probability that a sampled token of the draft is rejected. Returns `(num_rows,)`.
    """
    return (logits.float().softmax(-1) - target_logits.float().softmax(-1)).abs().sum(-1)


def chunked_token_losses(
    predicted: torch.Tensor,
    target: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int,
    losses: list[TokenLoss],
    draft_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    draft_token_ids: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Compute losses on tokens through the target's head, the logits of one chunk in memory at a time.

    Args:
        predicted (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Features the draft predicts.
        target (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Features of the target.
        head (`Callable`):
            Turns features into the target's logits.
        chunk_size (`int`):
            Rows per chunk.
        losses (`list[TokenLoss]`):
            Functions of the draft's and the target's logits.
        draft_head (`Callable`, *optional*):
            Head of the draft, where it has one of its own.
        draft_token_ids (`torch.Tensor` of shape `(draft_vocab_size,)`, *optional*):
            Tokens of that head, where they are some of the target's. Losses then compare the distributions among them.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: The losses, and whether the most likely tokens agree, all of shape
        `(num_rows,)`.
    """

    def chunk_losses(predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = (draft_head or head)(predicted)
        with torch.no_grad():
            target_logits = head(target)
        first, target_first = logits.max(-1).indices, target_logits.max(-1).indices  # sooner than `argmax`
        if draft_token_ids is not None:
            first, target_logits = draft_token_ids[first], target_logits[..., draft_token_ids]
        agrees = first == target_first
        return *(loss(logits, target_logits) for loss in losses), agrees

    chunks = zip(predicted.split(chunk_size), target.split(chunk_size), strict=True)
    values = zip(*(checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks), strict=True)
    *values, agrees = (torch.cat(parts) for parts in values)
    return values, agrees
