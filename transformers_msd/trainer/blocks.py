"""Blocks as training sees them: begun at several tokens of each row, all of them in one forward of the draft."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.trainer.data import DraftRows
from transformers_msd.traits.scales import look_up
from transformers_msd.traits.windows import BlockWindow
from transformers_msd.trees.masks import take_rows


@dataclass(frozen=True)
class Blocks:
    """
    What is predicted of blocks. The losses look at those of all levels that a row teaches.

    Args:
        predicted (`torch.Tensor` of shape `(num_predictions, hidden_size)`):
            What a head reads.
        target_features (`torch.Tensor` of shape `(num_predictions, hidden_size)`):
            The target's features, from which it says the same tokens.
        parents (`torch.Tensor` of shape `(num_predictions,)`):
            Tokens before these.
        is_learned (`torch.Tensor` of shape `(batch_size, num_blocks, num_levels)`):
            Where in the blocks the predictions are, in their order.
        shares (`torch.Tensor` of shape `(batch_size,)`):
            Supervised tokens of each row over the blocks begun there.
    """

    predicted: torch.Tensor
    target_features: torch.Tensor
    parents: torch.Tensor
    is_learned: torch.Tensor
    shares: torch.Tensor

    @property
    def levels(self) -> torch.Tensor:
        """Level of each prediction, from 0, of shape `(num_predictions,)`."""
        return self.is_learned.nonzero()[:, 2]

    def weigh(self, of_levels: list[float], chances: torch.Tensor | None) -> torch.Tensor:
        """
        Weigh predictions, so that blocks begun at some tokens stand for blocks begun at all.

        Args:
            of_levels (`list[float]`):
                Weights of the levels.
            chances (`torch.Tensor` of shape `(num_predictions,)`, *optional*):
                Chances that each prediction is accepted, in place of the weights: a level then weighs as much as it is
                likely that those before it stand.

        Returns:
            `torch.Tensor` of shape `(num_predictions,)`.
        """
        weights = self.predicted.new_tensor(of_levels, dtype=torch.float32).expand(self.is_learned.shape)
        if chances is not None:
            stands = torch.ones_like(weights)
            stands[self.is_learned] = chances.float()
            weights = torch.cat([torch.ones_like(stands[..., :1]), stands[..., :-1].cumprod(-1)], dim=-1)
        return (weights * self.shares[:, None, None])[self.is_learned]


def predict_blocks(
    model: nn.Module,
    draft: BlockDraftModel,
    target: nn.Module,
    rows: DraftRows,
    token_ids: torch.Tensor,
    anchors: torch.Tensor,
    is_begun: torch.Tensor,
    fuse: Callable[[torch.Tensor], torch.Tensor],
) -> Blocks:
    """
    Run a draft on blocks.

    Args:
        model (`torch.nn.Module`):
            The draft, wrapped as it is trained.
        draft ([`BlockDraftModel`]):
            The draft.
        target (`torch.nn.Module`):
            The target.
        rows ([`DraftRows`]):
            The rows, those of pictures included.
        token_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Tokens `r + 1`.
        anchors, is_begun (`torch.Tensor` of shape `(batch_size, num_blocks)`):
            Rows whose tokens blocks begin with, and whether there is such a block, of [`choose_anchors`].
        fuse (`Callable`):
            `draft.fuse`, in the dtype of the run.
    """
    features, kept, num_levels = rows.features, rows.row_mask, draft.config.num_levels
    if draft.pools:
        inputs = rows.inputs_embeds, features, rows.position_ids, rows.visual_mask, kept
        changed, kept, _ = draft.pool(*inputs, None)
        features = changed.get("features", features)
    mask_embed = None
    if (mask_id := draft.config.mask_token_id) is not None:
        mask_embed = look_up(target, torch.tensor([mask_id], device=token_ids.device), draft.embedding_scale)[0]
    fused, roots = fuse(features), take_rows(rows.inputs_embeds, anchors)
    size = draft.config.block_size
    places = torch.arange(1, size + 1, device=anchors.device)
    masks = [
        block_attention_mask(kept, anchors, visible, features.dtype, window)
        for (_, window), visible in zip(draft.sights, draft.visible(size, anchors.device), strict=True)
    ]
    hidden = model(
        inputs_embeds=roots,
        attention_masks=masks,
        position_ids=(rows.position_ids.gather(1, anchors)[..., None] + places).flatten(1),
        features=fused,
        feature_positions=rows.position_ids,
        # Made inside: where weights are sharded they are whole there alone.
        block_features=take_rows(fused, anchors),
        mask_embed=mask_embed,
    ).last_hidden_state
    predicted = draft.levels(hidden.unflatten(1, (-1, size)), num_levels)
    # A level teaches where all tokens before it are the assistant's, too.
    following = anchors[..., None] + torch.arange(num_levels, device=anchors.device)
    inside = following < rows.supervised.shape[1]
    following = following.clamp(max=rows.supervised.shape[1] - 1).flatten(1)
    supervised = rows.supervised.gather(1, following).view_as(inside) & inside
    is_learned = supervised.cumprod(-1).bool() & is_begun[..., None]
    target_features = take_rows(rows.target_features, following).unflatten(1, inside.shape[1:])
    return Blocks(
        predicted=predicted[is_learned],
        target_features=target_features[is_learned],
        parents=token_ids.gather(1, following).view_as(inside)[is_learned],
        is_learned=is_learned,
        shares=rows.supervised.sum(-1) / is_begun.sum(-1).clamp(min=1),
    )


def choose_anchors(supervised: torch.Tensor, num_blocks: int, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw the tokens that blocks begin with, each sequence's from its own seed; all of them where there are no more.

    Args:
        supervised (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether the rows teach what follows their token.
        num_blocks (`int`):
            Most blocks of a sequence.
        seeds (`list[int]`):
            A seed per sequence.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Rows, ascending, and whether they are some, both of shape `(batch_size,
        most)`; the others are filler.
    """
    drawn = []
    for own, seed in zip(supervised.cpu(), seeds, strict=True):
        found = own.nonzero()[:, 0]
        if len(found) > num_blocks:
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
            found = found[order[:num_blocks].sort().values]
        drawn.append(found)
    lengths = torch.tensor([len(own) for own in drawn])
    anchors = nn.utils.rnn.pad_sequence([own if len(own) else own.new_zeros(1) for own in drawn], batch_first=True)
    is_begun = torch.arange(anchors.shape[1]) < lengths[:, None]
    return anchors.to(supervised.device), is_begun.to(supervised.device)


def block_attention_mask(
    kept: torch.Tensor,
    anchors: torch.Tensor,
    visible: torch.Tensor,
    dtype: torch.dtype,
    window: BlockWindow | None = None,
) -> torch.Tensor:
    """
    Let every block see what is known at the token that it begins with, and itself.

    Args:
        kept (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Rows of the target that are read.
        anchors (`torch.Tensor` of shape `(batch_size, num_blocks)`):
            Rows that blocks begin with.
        visible (`torch.Tensor` of shape `(size, size)`):
            Which rows of its block a row sees.
        dtype (`torch.dtype`):
            Dtype of the mask.
        window ([`BlockWindow`], *optional*):
            How far a row sees.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, num_blocks * size, num_rows + num_blocks * size)`: Additive mask.
    """
    (batch_size, num_blocks), size = anchors.shape, len(visible)
    rows = torch.arange(kept.shape[1], device=kept.device)
    known = (rows <= anchors[..., None]) & kept[:, None]
    known = known.repeat_interleave(size, dim=1)
    if window is not None:
        blocks = visible.expand(batch_size * num_blocks, -1, -1)
        seen, near = window.sees(rows, blocks, anchors.flatten() + 1, anchors.flatten())
        known, visible = known & seen.view(known.shape), near[0]
    own = torch.eye(num_blocks, dtype=torch.bool, device=kept.device)
    own = torch.kron(own, visible).bool().expand(batch_size, -1, -1)
    seen = torch.cat([known, own], dim=-1)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
