"""Losses of a draft, one value per row."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def feature_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compare predicted features with the target's: smooth L1, a mean over the hidden size. Returns `(num_rows,)`."""
    return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)


def token_loss(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Compare the draft's distributions with the target's: soft cross-entropy. Returns `(num_rows,)`."""
    target_probabilities = target_logits.float().softmax(-1)
    return -(target_probabilities * logits.float().log_softmax(-1)).sum(-1)


def chunked_token_loss(
    predicted: torch.Tensor, target: torch.Tensor, head: nn.Module, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the token loss of features through the target's head, the logits of one chunk in memory at a time.

    Args:
        predicted (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Features the draft predicts.
        target (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Features of the target.
        head (`torch.nn.Module`):
            The target's head, frozen.
        chunk_size (`int`):
            Rows per chunk.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The losses and whether the most likely tokens agree, both `(num_rows,)`.
    """

    def chunk_loss(predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(predicted)
        with torch.no_grad():
            target_logits = head(target)
        return token_loss(logits, target_logits), logits.argmax(-1) == target_logits.argmax(-1)

    chunks = zip(predicted.split(chunk_size), target.split(chunk_size), strict=True)
    losses, agrees = zip(*(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks), strict=True)
    return torch.cat(losses), torch.cat(agrees)
