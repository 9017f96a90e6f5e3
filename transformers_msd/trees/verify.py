"""Which drafted tokens stand: one rule, greedy or sampled."""

from dataclasses import dataclass

import torch

from transformers_msd.trees.tree import TokenTree


@dataclass(frozen=True)
class Acceptance:
    """
    What a round found out.

    Args:
        path (`torch.Tensor` of shape `(batch_size, depth + 1)`):
            Nodes of the accepted path from the root; filled with 0 behind its end.
        num_accepted (`torch.Tensor` of shape `(batch_size,)`):
            Drafted tokens accepted.
        token_ids (`torch.Tensor` of shape `(batch_size, depth + 1)`):
            The accepted tokens, then the bonus token, which the target chose at the end of the path; fillers behind.
    """

    path: torch.Tensor
    num_accepted: torch.Tensor
    token_ids: torch.Tensor


def verify(tree: TokenTree, choices: torch.Tensor) -> Acceptance:
    """
    Descend from the root of each tree while the target's choice is a child.

    Args:
        tree (`TokenTree`):
            The drafted trees.
        choices (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Token that the target picks after each node: its argmax, or its sample.
    """
    if tree.num_nodes == 1:
        return Acceptance(torch.zeros_like(choices), choices.new_zeros(len(choices)), choices)
    parents = tree.parents.clamp(min=0)
    chosen = (tree.token_ids == choices.gather(1, parents)) & (tree.parents >= 0)
    chosen[:, 0] = True
    # A node stands when it and all its ancestors were chosen. As siblings differ, these nodes form one path.
    accepted = (chosen[:, None] | ~tree.ancestor_mask).all(-1)
    num_accepted = (accepted.sum(-1) - 1).clamp(max=tree.depth)
    # Sorted stably, the accepted nodes come first and in order: parents stand before their children.
    path = accepted.int().sort(descending=True, stable=True).indices[:, : tree.depth + 1]
    path = path.masked_fill(torch.arange(path.shape[1], device=path.device) > num_accepted[:, None], 0)
    return Acceptance(path=path, num_accepted=num_accepted, token_ids=choices.gather(1, path))
