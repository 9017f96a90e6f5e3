"""Going down trees step by step, all rows at once, with the ids at hand: nothing is asked of the device."""

import torch

from transformers_msd.call.emission import Emission
from transformers_msd.trees.host import to_device
from transformers_msd.trees.tree import TokenTree


class Walk:
    """
    Where all rows of a call stand in their trees, and what was picked on the way.

    Args:
        emission (`Emission`):
            Tokens of the call so far.
        tree (`TokenTree`):
            The trees of the rows that rounds are about.
        logits (`torch.Tensor` of shape `(num_trees, num_nodes, vocab_size)`):
            The target's logits after their nodes.
        starts (`list[int]`):
            Generated tokens of each row of the call.
        goes_on (`list[bool]`):
            Which rows need more.
    """

    def __init__(
        self, emission: Emission, tree: TokenTree, logits: torch.Tensor, starts: list[int], goes_on: list[bool]
    ) -> None:
        self._emission, self._logits, device = emission, logits, logits.device
        # Rows that have left stand at the first tree, and nothing is asked of it.
        place_of = {row: place for place, row in enumerate(emission.rows)}
        places = [place_of.get(row, 0) for row in range(len(starts))]
        columns = to_device([starts, goes_on, emission.pad_rows, places], device, torch.long)
        self._starts, goes_on, pad_rows, self._places = columns
        self._pad_rows, self.goes_on = pad_rows.bool(), goes_on.bool()
        self._rows = to_device(emission.rows, device)
        self._eos_token_ids = to_device(sorted(emission.eos_token_ids), device, torch.long)
        self._token_ids, self._parents = tree.token_ids[self._places], tree.parents[self._places]
        self._nodes = torch.zeros_like(self._places)
        self._tail = emission.tail(max(starts) + tree.depth + 1).clone()
        # As `Sampler.choose` returns them.
        self.choices, self.scores = torch.full_like(tree.token_ids, -1), logits.clone()

    def prefix(self, step: int) -> torch.Tensor:
        """Ids that plain decoding sees at a step, of shape `(batch_size, sequence_length)`."""
        return self._emission.prefix(self._tail[:, :step])

    def logits(self) -> torch.Tensor:
        """Logits after the nodes where the rows stand, of shape `(batch_size, vocab_size)`."""
        return self._logits[self._places, self._nodes]

    def descend(self, step: int, picked: torch.Tensor, scores: torch.Tensor) -> None:
        """
        Note what rows that have come to a step pick there, and go to the nodes of these tokens.

        Args:
            step (`int`):
                The step.
            picked (`torch.Tensor` of shape `(batch_size,)`):
                Tokens, -1 where none can be picked.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                The scores they were picked from.
        """
        picked = torch.where(self._pad_rows, self._emission.pad_token_id, picked)
        is_here = self.goes_on & (self._starts <= step)
        self.goes_on = self.goes_on & ~(is_here & (picked < 0))
        is_here = is_here & (picked >= 0)
        self._tail[:, step] = torch.where(is_here, picked, self._tail[:, step])
        # Of the rows that have trees.
        places, nodes, noted = self._places[self._rows], self._nodes[self._rows], is_here[self._rows]
        self.choices[places, nodes] = torch.where(noted, picked[self._rows], self.choices[places, nodes])
        before = self.scores[places, nodes]
        self.scores[places, nodes] = torch.where(noted[:, None], scores[self._rows].to(before.dtype), before)
        is_child = (self._parents == self._nodes[:, None]) & (self._token_ids == picked[:, None])
        is_end = (picked[:, None] == self._eos_token_ids).any(-1) & ~self._pad_rows
        if self._emission.max_steps is not None and step + 1 >= self._emission.max_steps:
            is_end = torch.ones_like(is_end)
        self.goes_on = torch.where(is_here, is_child.any(-1) & ~is_end, self.goes_on)
        self._nodes = torch.where(is_here & self.goes_on, is_child.int().argmax(-1), self._nodes)
