"""A smaller vocabulary for a draft that is trained, chosen by what its target says, where it pays."""

import copy

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig

from transformers_msd.costs.floors import VocabularyCut
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.weights import read_head, shapes_of
from transformers_msd.trainer.dataset import answer_counts, check_messages, with_ends
from transformers_msd.trainer.loading import load_processor
from transformers_msd.traits.sizes import num_bytes_per_draft, num_bytes_per_step


def cut_vocabulary(
    draft: FeatureDraftModel,
    target_model: str,
    dataset: Dataset,
    draft_vocab_size: int,
    acceptance_length: float = 4.0,
    force: bool = False,
) -> tuple[FeatureDraftModel, VocabularyCut]:
    """
    Give a trained draft a head of its own, the rows of the target's for the tokens that answers hold most (FR-Spec,
    arXiv 2502.14856). Nothing is trained.

    Cost is counted by the weights that are read, experts that no token is sent to among them, and of the edges of a
    block, of which a few rows are read, none. What is lost is measured on one half of the rows with tokens chosen by
    the other, both ways: a little more than tokens chosen by all rows lose.

    Args:
        draft ([`MSDDraftModel`], [`BlockDraftModel`] or one of a published kind that uses its target's head):
            The draft, which stays as it is.
        target_model (`str`):
            Folder or Hub repository of the target, of which config, processor and head are read.
        dataset ([`~datasets.Dataset`]):
            Rows as [`MSDTrainer`] takes them, best with the target's own answers.
        draft_vocab_size (`int`):
            Tokens to keep.
        acceptance_length (`float`, *optional*, defaults to 4.0):
            Tokens that a round emits with the draft as it is, the bonus token included.
        force (`bool`, *optional*, defaults to `False`):
            Whether to cut where a round loses more than it saves.

    Returns:
        `tuple[FeatureDraftModel, VocabularyCut]`: The smaller draft, and what it gains.

    Raises:
        ValueError: If the draft has a head of its own, the answers do not hold so many tokens, the target's head can't
            be read, or a smaller vocabulary would be slower.
    """
    config = type(draft.config).from_dict(draft.config.to_dict() | {"draft_vocab_size": draft_vocab_size})
    text_config = config.get_text_config()
    check_uses_head(draft)
    if draft_vocab_size == text_config.vocab_size:
        raise ValueError(
            f"`draft_vocab_size` must be below the target's {text_config.vocab_size} tokens, got {draft_vocab_size}. "
            "Leave it out to draft all of them."
        )
    target = shapes_of(AutoConfig.from_pretrained(target_model), draft.dtype)
    draft.check_target(target)
    halves = _count_halves(dataset, target_model, text_config.vocab_size)
    counts = with_ends(sum(halves), text_config)
    if (num_counted := int((counts > 0).sum())) < draft_vocab_size:
        raise ValueError(
            f"`draft_vocab_size` must be at most the {num_counted} different tokens that the answers hold, got "
            f"{draft_vocab_size}. Count more rows, or choose fewer tokens."
        )
    full_head = target.get_output_embeddings().weight.nbytes
    cut = VocabularyCut(
        step=num_bytes_per_step(target),
        layers=num_bytes_per_draft(draft, target) - full_head,
        full_head=full_head,
        own_head=draft_vocab_size * text_config.hidden_size * draft.dtype.itemsize,
        depth=draft.tree_config.depth,
        num_forwards=1 if draft.most_levels else draft.tree_config.depth,
        acceptance_length=acceptance_length,
        share_outside=_share_outside(halves, text_config, draft_vocab_size),
    )
    if cut.gain < 1 and not force:
        raise ValueError(
            f"{draft_vocab_size} of {text_config.vocab_size} tokens would make drafting slower: {cut}. Choose more "
            "tokens or leave them all, or pass `force` to cut all the same."
        )
    token_ids = _most_frequent(counts, draft_vocab_size)
    smaller = type(draft)(config)
    weights = copy.deepcopy(draft).state_dict() | {
        "head.weight": read_head(target_model, target)[token_ids].to(draft.dtype),
        "draft_token_ids": token_ids,
    }
    smaller.load_state_dict(weights, assign=True)
    return smaller.eval(), cut


def check_uses_head(draft: FeatureDraftModel) -> None:
    """Refuse a draft that has no use for another head."""
    if draft.head is not None:
        raise ValueError(
            f"The draft must use the target's head, got one with a head of its own for "
            f"{draft.head.out_features} tokens. Cut the draft it was made of, or train another."
        )


def _count_halves(dataset: Dataset, target_model: str, vocab_size: int) -> list[torch.Tensor]:
    """Count the tokens of answers in every other row, and in those between."""
    check_messages(dataset)
    processor = load_processor(target_model)
    rows = [range(start, len(dataset), 2) for start in range(2)]
    halves = [answer_counts(dataset.select(half), processor, vocab_size) for half in rows]
    if not all(half.any() for half in halves):
        raise ValueError(
            "The dataset must hold answers in both of its halves, one to choose tokens by and one to try them on, got "
            f"{' and '.join(f'{half.sum()} tokens' for half in halves)} in {len(dataset)} rows. Let the target answer "
            "more: `transformers-msd generate-data`."
        )
    return halves


def _share_outside(halves: list[torch.Tensor], text_config: PreTrainedConfig, number: int) -> float:
    """Tell which share of a half's tokens is not among the most frequent of the other half."""
    outside = 0
    for chosen_by, tried_on in (halves, halves[::-1]):
        counts = with_ends(chosen_by, text_config)
        token_ids = _most_frequent(counts, number)
        known = token_ids[counts[token_ids] > 0]
        outside += int(tried_on.sum() - tried_on[known].sum())
    return outside / int(sum(halves).sum())


def _most_frequent(counts: torch.Tensor, number: int) -> torch.Tensor:
    """Return the ids of the most frequent tokens, ascending."""
    return counts.topk(number).indices.sort().values


__all__ = ["check_uses_head", "cut_vocabulary"]
