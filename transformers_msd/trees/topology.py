"""Trees of one shape, whatever the draft is sure of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from transformers_msd.trees.host import to_device
from transformers_msd.trees.masks import take_rows


Topology = tuple[tuple[int, ...], ...]

# The tree of EAGLE (arXiv 2401.15077, section 3.3 and published code): 25 drafted nodes in 5 levels.
EAGLE: Topology = (
    *((0,), (1,), (2,), (3,)),
    *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2)),
    *((0, 0, 0, 0, 0), (0, 0, 0, 0, 1)),
)


def read_topology(topology: Sequence[Sequence[int]], depth: int) -> Topology:
    """
    Read a shape, cut at a depth, level by level.

    Args:
        topology (`Sequence[Sequence[int]]`):
            For every drafted node, the ranks on the path that leads to it: `(0, 1)` is the draft's second choice
            after its first.
        depth (`int`):
            Most drafted tokens on one path.

    Raises:
        ValueError: If a path is no sequence of ranks, or its parent is missing.
    """
    try:
        paths = {tuple(path) for path in topology} or {()}
    except TypeError:
        paths = {()}
    for path in paths:
        if not path or any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in path):
            raise ValueError(
                f"`TreeConfig.topology` must be paths of ranks from 0 on, as `[[0], [1], [0, 0]]`, got {topology!r}."
            )
        if len(path) > 1 and path[:-1] not in paths:
            raise ValueError(
                f"`TreeConfig.topology` must hold the parent of every path, got {path} without {path[:-1]}. Add it."
            )
    return tuple(sorted((path for path in paths if len(path) <= depth), key=lambda path: (len(path), path)))


def best_tokens(log_probs: torch.Tensor, number: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Take the best tokens after nodes, and their log-probabilities, both of shape `(batch_size, ..., number)`.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, ..., vocab_size)`):
            Log-probabilities after the nodes.
        number (`int`):
            How many to take.
        first (`int`, *optional*, defaults to 0):
            The token that the first of them is of; the others follow.

    Raises:
        ValueError: If there are fewer tokens.
    """
    if number > log_probs.shape[-1]:
        raise ValueError(
            f"`TreeConfig.topology` must name ranks below {log_probs.shape[-1]}, as many tokens as there are, got "
            f"{number - 1}. Lower it."
        )
    scores, token_ids = log_probs.topk(number)
    return scores, token_ids + first if first else token_ids


def grow_topology(
    topology: Topology,
    log_probs: torch.Tensor,
    expand: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    step: int = 0,
) -> dict[str, Any]:
    """
    Grow a tree of a shape (Medusa, arXiv 2401.10774; EAGLE, arXiv 2401.15077): at each level what it names.

    Args:
        topology (`Topology`):
            The shape, of [`read_topology`].
        log_probs (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            The draft's log-probabilities after the root.
        expand (`Callable`):
            Runs the draft on a frontier, as in [`grow_tree`].
        step (`int`, *optional*, defaults to 0):
            How much later than at the level before the tokens begin that log-probabilities are of.

    Returns:
        `dict[str, Any]`: `token_ids`, `parents` and `scores` of all drafted nodes, each of shape `(batch_size,
        len(topology))`, and the `depth`. Parents are counted from the root, which is 0.
    """
    place_of = {path: place for place, path in enumerate(topology, 1)}
    batch_size, device = len(log_probs), log_probs.device
    parents = to_device([place_of.get(path[:-1], 0) for path in topology], device)
    depth = len(topology[-1])
    frontier: list[tuple[int, ...]] = [()]
    frontier_scores, visible = log_probs.new_zeros(batch_size, 1), None
    all_scores, all_token_ids = [], []
    log_probs = log_probs[:, None]  # (batch_size, frontier, vocab_size)
    for level in range(1, depth + 1):
        nodes = [path for path in topology if len(path) == level]
        slots = to_device([frontier.index(path[:-1]) for path in nodes], device)
        ranks = to_device([path[-1] for path in nodes], device)
        scores, token_ids = best_tokens(log_probs, max(path[-1] for path in nodes) + 1, step * (level - 1))
        scores = scores[:, slots, ranks] + frontier_scores[:, slots]  # (batch_size, nodes)
        token_ids = token_ids[:, slots, ranks]
        all_scores.append(scores)
        all_token_ids.append(token_ids)
        if level == depth:
            break
        expanded = {path[:-1] for path in topology if len(path) == level + 1}
        inner = [place for place, path in enumerate(nodes) if path in expanded]
        kept = to_device(inner, device)
        parent_slots = slots[kept].expand(batch_size, -1)
        identity = torch.eye(len(inner), dtype=torch.bool, device=device).expand(batch_size, -1, -1)
        visible = identity if visible is None else torch.cat([take_rows(visible, parent_slots), identity], dim=-1)
        frontier, frontier_scores = [nodes[place] for place in inner], scores[:, kept]
        log_probs = expand(token_ids[:, kept], parent_slots, visible)
    return {
        "token_ids": torch.cat(all_token_ids, dim=1),
        "parents": parents.expand(batch_size, -1),
        "scores": torch.cat(all_scores, dim=1),
        "depth": depth,
    }
