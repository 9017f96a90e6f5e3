"""Losses of a draft, one value per row."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformers_msd.trainer.configuration import MSDTrainingConfig


TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def feature_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compare predicted features with the target's: smooth L1, a mean over the hidden size. Returns `(num_rows,)`."""
    return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)


def token_loss(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Compare the draft's distributions with the target's: soft cross-entropy. Returns `(num_rows,)`."""
    return -(probabilities * logits.float().log_softmax(-1)).sum(-1)


def top_k_loss(logits: torch.Tensor, probabilities: torch.Tensor, top_k: int = 10) -> torch.Tensor:
    """
    Compare distributions where the target's is largest: the part of the soft cross-entropy that its `top_k` likeliest
    tokens have, their probabilities as they are (HASS, arXiv 2408.15766, section 3.1). Returns `(num_rows,)`.
    """
    probabilities, tokens = probabilities.topk(min(top_k, probabilities.shape[-1]))
    return -(probabilities * logits.float().log_softmax(-1).gather(-1, tokens)).sum(-1)


def probability_loss(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """
    Compare distributions by the distance of their probabilities, L1 summed over the vocabulary (ViSpec, arXiv
    2509.15235): twice the probability that a sampled token of the draft is rejected. Returns `(num_rows,)`.
    """
    return (logits.float().softmax(-1) - probabilities).abs().sum(-1)


def token_losses_of(args: MSDTrainingConfig) -> dict[str, tuple[TokenLoss, float]]:
    """List the losses on tokens that a run learns from, by their names, with their weights."""
    losses: dict[str, tuple[TokenLoss, float]] = {
        "token_loss": (token_loss, args.token_loss_weight),
        "top_k_loss": (partial(top_k_loss, top_k=args.top_k_loss_tokens), args.top_k_loss_weight),
        "probability_loss": (probability_loss, args.probability_loss_weight),
    }
    # Levels of a block are weighed by what this one says.
    kept = "probability_loss" if args.prefix_weights else ""
    return {name: (loss, weight) for name, (loss, weight) in losses.items() if weight or name == kept}


def chunked_token_losses(
    predicted: list[torch.Tensor],
    target: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int,
    losses: list[TokenLoss],
    draft_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    draft_token_ids: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Compute losses on tokens through the target's head, the logits of one chunk in memory at a time, and the target's
    once for all steps.

    Args:
        predicted (`list[torch.Tensor]`):
            Features the draft predicts in each unrolled step, of shape `(num_rows, hidden_size)`.
        target (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Features of the target.
        head (`Callable`):
            Turns features into the target's logits.
        chunk_size (`int`):
            Rows of the draft's logits per chunk, those of all steps counted.
        losses (`list[TokenLoss]`):
            Functions of the draft's logits and the target's probabilities.
        draft_head (`Callable`, *optional*):
            Head of the draft, where it has one of its own.
        draft_token_ids (`torch.Tensor` of shape `(draft_vocab_size,)`, *optional*):
            Tokens of that head, where they are some of the target's. Losses then compare the distributions among them.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: The losses, and whether the most likely tokens agree, all of shape
        `(num_steps, num_rows)`.
    """

    def chunk_losses(target: torch.Tensor, *predicted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            target_logits = head(target)
            target_first = target_logits.max(-1).indices  # sooner than `argmax`
            if draft_token_ids is not None:
                target_logits = target_logits[..., draft_token_ids]
            probabilities = target_logits.float().softmax(-1)
        steps = [(draft_head or head)(own) for own in predicted]
        first = torch.stack([logits.max(-1).indices for logits in steps])
        agrees = (first if draft_token_ids is None else draft_token_ids[first]) == target_first
        return *(torch.stack([loss(logits, probabilities) for logits in steps]) for loss in losses), agrees

    size = max(chunk_size // len(predicted), 1)
    chunks = zip(target.split(size), *(own.split(size) for own in predicted), strict=True)
    values = zip(*(checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks), strict=True)
    *values, agrees = (torch.cat(parts, dim=1) for parts in values)
    return values, agrees
