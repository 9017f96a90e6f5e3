"""Token trees as plain tensors: their settings, how they grow, and the attention mask that lays them flat."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import pad

from transformers_msd.costs import Sizing


@dataclass(frozen=True)
class TreeConfig:
    """
    Size and shape of the token tree drafted in each round (EAGLE-2, arXiv 2406.16858, section 4).

    Args:
        num_nodes (`int`, *optional*, defaults to 59):
            Most nodes of the tree, the root included. A tree that can't fill them is smaller.
        depth (`int`, *optional*, defaults to 6):
            Most drafted tokens on one path. The draft runs `depth` times a round.
        top_k (`int`, *optional*, defaults to 10):
            Children tried for each expanded node, and nodes expanded at each depth. `1` drafts a chain.

        min_probability (`float`, *optional*, defaults to 0.0):
            Probability that the draft must give the path to a node for the node to be expanded and verified, so that
            the tree is as large as the draft is sure of itself (Spec-LLaVA, arXiv 2509.11961, on probabilities in
            place of its raw logits). 0 always fills the tree.
        gate (`bool`, *optional*, defaults to `True`):
            Whether to decode plainly for a while where few drafted tokens are accepted of late.

    The defaults are MSD's (arXiv 2505.14260): its `total_token=59, depth=5, top_k=10`.
    """

    num_nodes: int = 59
    depth: int = 6
    top_k: int = 10
    min_probability: float = 0.0
    gate: bool = True

    def __post_init__(self) -> None:
        for name, least in (("num_nodes", 2), ("depth", 1), ("top_k", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`TreeConfig.{name}` must be an integer of at least {least}, got {value!r}. "
                    "The smallest tree, `TreeConfig(num_nodes=2, depth=1, top_k=1)`, drafts one token per round."
                )
        if not 0 <= self.min_probability < 1:
            raise ValueError(
                f"`TreeConfig.min_probability` must be at least 0 and less than 1, got {self.min_probability!r}. Try "
                "0.02; 0 always fills the tree."
            )


@dataclass(frozen=True)
class TokenTree:
    """
    One token tree per row of a batch. Node 0, the root, is the last token emitted; parents come before children, and
    the children of a node hold different tokens.

    Args:
        token_ids (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Token of each node.
        parents (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Index of each node's parent; -1 for the root, and for fillers of a row that has fewer nodes.
        scores (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Log-probability that the draft gives the path from the root to each node.
        depth (`int`):
            Most drafted tokens on one path.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    depth: int

    @property
    def num_nodes(self) -> int:
        return self.token_ids.shape[1]

    @cached_property
    def ancestor_mask(self) -> torch.Tensor:
        """`(batch_size, num_nodes, num_nodes)`, true where the second node is the first or one of its ancestors."""
        nodes = torch.arange(self.num_nodes, device=self.parents.device)
        reach = ((self.parents[:, :, None] == nodes) | (nodes[:, None] == nodes)).float()
        # Each squaring doubles how far up a node reaches.
        for _ in range(self.depth.bit_length()):
            reach = (reach @ reach).clamp(max=1)
        return reach.bool()

    @cached_property
    def depths(self) -> torch.Tensor:
        """`(batch_size, num_nodes)`, drafted tokens from the root to each node, this one included."""
        if self.depth == 0:
            return torch.zeros_like(self.parents)
        return self.ancestor_mask.sum(-1) - 1

    @classmethod
    def root(cls, token_ids: torch.Tensor) -> "TokenTree":
        """Make trees of a root alone from their tokens, of shape `(batch_size,)`."""
        token_ids = token_ids[:, None]
        return cls(token_ids, torch.full_like(token_ids, -1), torch.zeros_like(token_ids, dtype=torch.float32), 0)

    def widen(self, num_nodes: int) -> "TokenTree":
        """Fill the trees up to so many nodes."""
        more = num_nodes - self.num_nodes
        if not more:
            return self
        return TokenTree(
            pad(self.token_ids, (0, more)),
            pad(self.parents, (0, more), value=-1),
            pad(self.scores, (0, more)),
            self.depth,
        )

    def with_chains(self, rows: torch.Tensor, token_id: int) -> "TokenTree":
        """Replace the trees of some rows, a mask of shape `(batch_size,)`, by a chain that repeats one token."""
        nodes = torch.arange(self.num_nodes, device=rows.device)
        chain = torch.where(nodes <= self.depth, nodes - 1, -1)
        return TokenTree(
            token_ids=torch.where(rows[:, None] & (nodes > 0), token_id, self.token_ids),
            parents=torch.where(rows[:, None], chain, self.parents),
            scores=torch.where(rows[:, None], 0.0, self.scores),
            depth=self.depth,
        )


def grow_tree(
    config: TreeConfig,
    root_token_ids: torch.Tensor,
    log_probs: torch.Tensor,
    expand: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    sizing: Sizing | None = None,
    fixed: bool = False,
) -> TokenTree:
    """
    Grow a token tree breadth-first and keep its `num_nodes` most likely nodes (EAGLE-2, arXiv 2406.16858).

    Args:
        config (`TreeConfig`):
            Size and shape of the tree.
        root_token_ids (`torch.Tensor` of shape `(batch_size,)`):
            Tokens of the roots.
        log_probs (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            The draft's log-probabilities after the root.
        expand (`Callable`):
            Runs the draft on a frontier. Gets its tokens, of shape `(batch_size, frontier)`, the place of each node's
            parent in the frontier before, of the same shape, and which of the rows drafted so far, these included,
            each node sees, of shape `(batch_size, frontier, rows)`; returns log-probabilities of shape
            `(batch_size, frontier, vocab_size)`.
        sizing ([`Sizing`], *optional*):
            Chooses depth and size within the settings, for a batch of one.
        fixed (`bool`, *optional*, defaults to `False`):
            Whether the device is asked nothing and all shapes follow from the settings: every level is grown, and what
            is too unlikely to be verified becomes fillers behind the other nodes.
    """
    top_k = min(config.top_k, log_probs.shape[-1])
    scores, token_ids = log_probs.topk(top_k)  # (batch, top_k)
    # Candidates are numbered in the order they were tried; 0 is the root, so the first level starts at 1.
    parents = torch.zeros_like(token_ids)
    level = torch.arange(1, top_k + 1, device=token_ids.device).expand_as(token_ids)
    all_scores, all_token_ids, all_parents = [scores], [token_ids], [parents]
    frontier_scores, frontier_ids, frontier = scores, token_ids, level
    slots = parents
    identity = torch.eye(top_k, dtype=torch.bool, device=token_ids.device).expand(len(token_ids), -1, -1)
    visible = identity[:, :, :0]
    num_candidates = top_k
    depth = 1
    while depth < config.depth:
        if config.min_probability and not fixed:
            # The best come first: of all rows the one that is surest tells how many are open.
            width = int((frontier_scores >= math.log(config.min_probability)).sum(-1).max())
            if width == 0:
                break
            frontier_scores, frontier_ids = frontier_scores[:, :width], frontier_ids[:, :width]
            frontier, slots = frontier[:, :width], slots[:, :width]
        if sizing is not None:
            path, open_path = (scores.exp()[0].tolist() for scores in (_ranked(all_scores), frontier_scores))
            if not sizing.goes_on(path, open_path, depth, config.num_nodes - 1):
                break
        width = frontier.shape[1]
        visible = take_rows(visible, slots) if depth > 1 else visible[:, :width]
        visible = torch.cat([visible, identity[:, :width, :width]], dim=-1)
        scores, token_ids = expand(frontier_ids, slots, visible).topk(top_k)  # (batch, frontier, top_k)
        scores = (scores + frontier_scores[..., None]).flatten(1)
        token_ids = token_ids.flatten(1)
        all_scores.append(scores)
        all_token_ids.append(token_ids)
        all_parents.append(frontier.repeat_interleave(top_k, dim=1))
        best = scores.sort(descending=True, stable=True).indices[:, :top_k]
        frontier_scores, frontier_ids = scores.gather(1, best), token_ids.gather(1, best)
        frontier = best + num_candidates + 1
        slots = best // top_k
        num_candidates += scores.shape[1]
        depth += 1
    if sizing is not None:
        path = _ranked(all_scores).exp()[0].tolist()
        config = replace(config, num_nodes=sizing.settle(path, depth, config.num_nodes - 1) + 1)
    return _keep_best(
        config,
        root_token_ids,
        torch.cat(all_scores, 1),
        torch.cat(all_token_ids, 1),
        torch.cat(all_parents, 1),
        depth,
        fixed,
    )


def _ranked(scores: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(scores, dim=1).sort(descending=True).values


def _keep_best(
    config: TreeConfig,
    root_token_ids: torch.Tensor,
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    depth: int,
    fixed: bool,
) -> TokenTree:
    """Build the tree of the most likely candidates, in the order in which they were tried."""
    num_kept = min(config.num_nodes - 1, scores.shape[1])
    unsure = torch.zeros_like(scores, dtype=torch.bool)
    if config.min_probability:
        unsure = scores < math.log(config.min_probability)
        unsure.scatter_(1, scores.argmax(-1, keepdim=True), False)  # a tree holds one drafted token at least
        if not fixed:
            num_kept = min(num_kept, int((~unsure).sum(-1).max()))
    # Stable: on a tie the parent, which comes first, must win over its child.
    kept = scores.sort(descending=True, stable=True).indices[:, :num_kept].sort().values
    if config.min_probability:
        kept = kept.gather(1, unsure.gather(1, kept).int().sort(stable=True).indices)
    batch_size, num_kept = kept.shape
    nodes = torch.arange(num_kept + 1, device=kept.device).expand(batch_size, -1)
    node_of_candidate = kept.new_zeros(batch_size, scores.shape[1] + 1).scatter(1, kept + 1, nodes[:, 1:])
    root_token_ids = root_token_ids[:, None]
    # A row that is less sure than another has fillers, which no node leads to.
    kept_parents = node_of_candidate.gather(1, parents.gather(1, kept)).masked_fill(unsure.gather(1, kept), -1)
    return TokenTree(
        token_ids=torch.cat([root_token_ids, token_ids.gather(1, kept)], dim=1),
        parents=torch.cat([torch.full_like(root_token_ids, -1), kept_parents], 1),
        scores=torch.cat([scores.new_zeros(batch_size, 1), scores.gather(1, kept)], dim=1),
        depth=min(depth, num_kept),
    )


def tree_attention_mask(columns: torch.Tensor, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Lay tree nodes flat behind a cache: an additive mask by which each node sees the cache and its own ancestors.

    Args:
        columns (`torch.Tensor` of shape `(batch_size, past_length)`):
            Whether each column of the cache holds a real row.
        visible (`torch.Tensor` of shape `(batch_size, nodes, rows)`):
            Whether each node sees each of the rows behind the cache.
        dtype (`torch.dtype`):
            Dtype of the model.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, nodes, past_length + rows)`.
    """
    seen = torch.cat([columns[:, None].expand(-1, visible.shape[1], -1), visible], dim=-1)
    # Not a bool mask: eager attention adds it to the scores as it is.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def causal_mask(batch_size: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Let each row see itself and those before it: a mask of shape `(batch_size, num_rows, num_rows)`."""
    rows = torch.arange(num_rows, device=device)
    return (rows <= rows[:, None]).expand(batch_size, -1, -1)


def take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Take rows `(batch_size, k)` of dimension 1 of a tensor `(batch_size, n, m)`."""
    return tensor.gather(1, rows[..., None].expand(-1, -1, tensor.shape[-1]))
