"""How a token tree grows."""

import math
from collections.abc import Callable

import torch

from transformers_msd.costs.rounds import with_full_fours
from transformers_msd.costs.sizing import Sizing
from transformers_msd.trees.host import has_to_wait, to_device
from transformers_msd.trees.masks import take_rows
from transformers_msd.trees.topology import best_tokens, grow_topology
from transformers_msd.trees.tree import TokenTree, TreeConfig


def grow_tree(
    config: TreeConfig,
    root_token_ids: torch.Tensor,
    log_probs: torch.Tensor,
    expand: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    sizing: Sizing | None = None,
    fixed: bool = False,
    known: torch.Tensor | None = None,
) -> TokenTree:
    """
    Grow a token tree breadth-first and keep its `num_nodes` most likely nodes (EAGLE-2, arXiv 2406.16858), or grow
    the one whose `topology` the settings name. Where answers cost nothing, each level is grown only if it pays by what
    the draft says; a device that the host would wait for is asked once, in the end.

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
            Chooses depth and size within the settings.
        fixed (`bool`, *optional*, defaults to `False`):
            Whether the device is asked nothing at all and all shapes follow from the settings: every level is grown,
            and what is too unlikely to be verified becomes fillers behind the other nodes.
        known (`torch.Tensor` of shape `(batch_size, num_levels, vocab_size)`, *optional*):
            Tokens of each level that log-probabilities are of; those from 0 on by default. `expand` is then given not
            tokens, but their places in the flattened levels.
    """
    step = 0 if known is None else known.shape[2]
    if config.topology is not None:
        roots = root_token_ids[:, None]
        grown = grow_topology(config.topology, log_probs, expand, step)
        return TokenTree(
            token_ids=torch.cat([roots, _tokens_at(grown["token_ids"], known)], dim=1),
            parents=torch.cat([torch.full_like(roots, -1), grown["parents"]], dim=1),
            scores=torch.cat([grown["scores"].new_zeros(roots.shape), grown["scores"]], dim=1),
            depth=grown["depth"],
        )
    top_k = min(config.top_k, log_probs.shape[-1])
    scores, token_ids = best_tokens(log_probs, top_k)  # (batch, top_k)
    # Candidates are numbered in the order they were tried; 0 is the root, so the first level starts at 1.
    slots = torch.zeros_like(token_ids)
    level = torch.arange(1, top_k + 1, device=token_ids.device).expand_as(token_ids)
    all_scores, all_token_ids, expanded = [scores], [token_ids], [slots[:, :1]]
    frontier_scores, frontier_ids, frontier = scores, token_ids, level
    identity = torch.eye(top_k, dtype=torch.bool, device=token_ids.device).expand(len(token_ids), -1, -1)
    visible = identity[:, :, :0]
    num_candidates = top_k
    depth = 1
    asks = not fixed and not has_to_wait(log_probs.device)
    num_levels = config.depth if asks or sizing is None else sizing.plan(config.depth)
    while depth < num_levels:
        width = frontier.shape[1]
        if asks and config.min_probability:
            # The best come first: of all rows the one that is surest tells how many are open.
            width = int((frontier_scores >= math.log(config.min_probability)).sum(-1).max())
            if width == 0:
                break
        if asks and sizing is not None:
            open_scores = frontier_scores[:, :width]
            path, open_path = (_mean_paths(own, sizing).tolist() for own in (_ranked(all_scores), open_scores))
            if not sizing.goes_on(path, open_path, depth, config.num_nodes - 1, num_levels - depth):
                break
            width = sizing.width(path, open_path, depth, config.num_nodes - 1)
            width = min(with_full_fours(width, len(token_ids), token_ids.device.type), len(open_path))
        frontier_scores, frontier_ids = frontier_scores[:, :width], frontier_ids[:, :width]
        frontier, slots = frontier[:, :width], slots[:, :width]
        if known is None:
            visible = take_rows(visible, slots) if depth > 1 else visible[:, :width]
            visible = torch.cat([visible, identity[:, :width, :width]], dim=-1)
        after = expand(frontier_ids, slots, visible)
        scores, token_ids = best_tokens(after, top_k, step * depth)  # (batch, frontier, top_k)
        scores = (scores + frontier_scores[..., None]).flatten(1)
        token_ids = token_ids.flatten(1)
        all_scores.append(scores)
        all_token_ids.append(token_ids)
        expanded.append(frontier)
        best = scores.sort(descending=True, stable=True).indices[:, :top_k]
        frontier_scores, frontier_ids = scores.gather(1, best), token_ids.gather(1, best)
        frontier = best + (num_candidates + 1)
        slots = best // top_k
        num_candidates += scores.shape[1]
        depth += 1
    num_kept = config.num_nodes - 1
    if sizing is not None and not asks:
        num_kept = sizing.settle_whole(_sure_paths(all_scores, config.min_probability, sizing), top_k, num_kept)
    else:
        if sizing is not None:
            num_kept = sizing.settle(_mean_paths(_ranked(all_scores), sizing).tolist(), depth, num_kept)
        if config.min_probability and not fixed:
            is_sure = torch.cat(all_scores, dim=1) >= math.log(config.min_probability)
            num_kept = min(num_kept, int(is_sure.sum(-1).max()))
    return _keep_best(
        config,
        root_token_ids,
        torch.cat(all_scores, 1),
        torch.cat(all_token_ids, 1),
        torch.cat(expanded, 1)[..., None].expand(-1, -1, top_k).flatten(1),
        depth,
        max(num_kept, 1),
        known,
    )


def _tokens_at(places: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    return places if known is None else known.flatten(1).gather(1, places)


def _ranked(scores: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(scores, dim=1).sort(descending=True).values


def _mean_paths(scores: torch.Tensor, sizing: Sizing) -> torch.Tensor:
    """Probabilities of paths in the mean of the prompts that have not ended, rank by rank."""
    probabilities = scores.exp()
    if len(scores) == 1:
        return probabilities[0]
    if all(sizing.going_on):
        return probabilities.mean(0)
    weights = to_device(sizing.going_on, scores.device, torch.float32)[:, None]
    return (probabilities * weights).sum(0) / weights.sum()


def _sure_paths(scores: list[torch.Tensor], min_probability: float, sizing: Sizing) -> list[list[float]]:
    """Ask for the probabilities of the paths to the candidates of each level, those that are likely enough."""
    if len(scores[0]) > 1:  # the likeliest of all prompts count as one
        scores = [level.sort(descending=True).values for level in scores]
    paths = iter(_mean_paths(torch.cat(scores, dim=1), sizing).tolist())
    levels = [[next(paths) for _ in range(level.shape[1])] for level in scores]
    return [[path for path in level if path >= min_probability] for level in levels]


def _keep_best(
    config: TreeConfig,
    root_token_ids: torch.Tensor,
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    depth: int,
    num_kept: int,
    known: torch.Tensor | None,
) -> TokenTree:
    """Build the tree of the most likely candidates, in the order in which they were tried."""
    unsure = torch.zeros_like(scores, dtype=torch.bool)
    if config.min_probability:
        unsure = scores < math.log(config.min_probability)
        unsure.scatter_(1, scores.argmax(-1, keepdim=True), False)  # a tree holds one drafted token at least
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
        token_ids=torch.cat([root_token_ids, _tokens_at(token_ids.gather(1, kept), known)], dim=1),
        parents=torch.cat([torch.full_like(root_token_ids, -1), kept_parents], 1),
        scores=torch.cat([scores.new_zeros(batch_size, 1), scores.gather(1, kept)], dim=1),
        depth=min(depth, num_kept),
    )
