"""Chains that another source proposes, as branches of a tree."""

import torch
from torch.nn.functional import pad

from transformers_msd.trees.tree import TokenTree
from transformers_msd.trees.verify import verify


def graft(tree: TokenTree, token_ids: torch.Tensor, scores: torch.Tensor, num_nodes: int) -> TokenTree:
    """
    Add a chain to each tree, in place of the nodes that are least likely. What a tree has of its chain already gets
    the better score of the two.

    Args:
        tree (`TokenTree`):
            The trees.
        token_ids (`torch.Tensor` of shape `(batch_size, length)`):
            Tokens after the root.
        scores (`torch.Tensor` of shape `(batch_size, length)`):
            Log-probability of the path to each of them; `-inf` for fillers behind the end of a chain.
        num_nodes (`int`):
            Nodes of the grown trees.
    """
    length = token_ids.shape[1]
    nodes = torch.arange(tree.num_nodes, device=tree.parents.device)
    places = torch.arange(length, device=nodes.device)
    ends = torch.where(scores.isneginf(), -1, token_ids)
    shared = verify(tree, pad(ends, (0, 1), value=-1).gather(1, tree.depths.clamp(max=length)))
    num_shared = shared.num_accepted[:, None]
    last = shared.path.gather(1, num_shared)
    # A path that both propose is as likely as the surer of them says, and what follows it follows that.
    own_scores = tree.scores.masked_fill((tree.parents < 0) & (nodes > 0), -torch.inf)
    before = pad(scores, (1, 0)).gather(1, num_shared)  # of the chain as far as it is shared
    lifted = scores + (own_scores.gather(1, last) - before).clamp(min=0)
    common = min(length, shared.path.shape[1] - 1)
    is_shared = places[:common] < num_shared
    path = shared.path[:, 1 : common + 1]
    own_scores = own_scores.scatter_reduce(1, path, scores[:, :common].masked_fill(~is_shared, -torch.inf), "amax")
    is_new = (places >= num_shared) & ~scores.isneginf()
    parents = torch.where(places == num_shared, last, tree.num_nodes - 1 + places).masked_fill(~is_new, -1)
    is_ngram = torch.zeros_like(tree.parents, dtype=torch.bool) if tree.is_ngram is None else tree.is_ngram
    all_scores = torch.cat([own_scores, lifted.masked_fill(~is_new, -torch.inf)], dim=1)
    # Stable: on a tie the parent, which comes first, must win over its child.
    kept = all_scores.sort(descending=True, stable=True).indices[:, :num_nodes].sort().values
    new_nodes = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    # Behind the last candidate stands the place of those that have no parent, or lost it.
    node_of = torch.full_like(pad(all_scores, (0, 1)), -1, dtype=torch.long).scatter(1, kept, new_nodes)
    kept_parents = torch.cat([tree.parents, parents], dim=1).gather(1, kept)
    kept_scores = all_scores.gather(1, kept)
    kept_parents = node_of.gather(1, torch.where(kept_parents < 0, all_scores.shape[1], kept_parents))
    return TokenTree(
        token_ids=torch.cat([tree.token_ids, token_ids], dim=1).gather(1, kept),
        parents=kept_parents.masked_fill(kept_scores.isneginf(), -1),
        scores=kept_scores.masked_fill(kept_scores.isneginf(), 0.0),
        depth=max(tree.depth, length),
        is_ngram=torch.cat([is_ngram, is_new], dim=1).gather(1, kept),
    )
