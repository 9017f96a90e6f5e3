"""Which drafted tokens stand: one rule, greedy or sampled, and the noise that makes samples repeatable."""

from collections import deque
from dataclasses import dataclass

import torch

from transformers_msd.tree import TokenTree


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
    num_accepted = accepted.sum(-1) - 1
    # Sorted stably, the accepted nodes come first and in order: parents stand before their children.
    path = accepted.int().sort(descending=True, stable=True).indices[:, : tree.depth + 1]
    path = path.masked_fill(torch.arange(path.shape[1], device=path.device) > num_accepted[:, None], 0)
    return Acceptance(path=path, num_accepted=num_accepted, token_ids=choices.gather(1, path))


class NoiseTape:
    """
    The random numbers of a sampled call, one draw for each generated position.

    PyTorch draws `torch.multinomial(p, 1)` as `argmax(p / e)` with `e ~ Exp(1)` of the shape of `p`, once for each
    step of plain decoding. Drawing the same numbers in the same order, and using them at every node of a position,
    makes the token there the one that plain sampling picks from the same seed (the Gumbel-max trick).

    Args:
        batch_size (`int`):
            Rows of the batch, `num_return_sequences` included.
        vocab_size (`int`):
            Width of the target's logits.
        device (`torch.device`):
            Device of `input_ids`, whose default generator is used.
    """

    def __init__(self, batch_size: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (batch_size, vocab_size)
        self._device = device
        self._first = 0
        self._draws: deque[torch.Tensor] = deque()
        # State of the generator before each position, from `_first` on.
        self._states: deque[torch.Tensor] = deque([self._get_state()])

    def at(self, step: int) -> torch.Tensor:
        """Noise of one position, counted from the first generated token, of shape `(batch_size, vocab_size)`."""
        while step >= self._first + len(self._draws):
            self._draws.append(torch.empty(self._shape, device=self._device).exponential_(1))
            self._states.append(self._get_state())
        return self._draws[step - self._first]

    def rows_at(self, steps: dict[int, int]) -> torch.Tensor:
        """Noise of some rows, each at a position of its own, of shape `(num_rows, vocab_size)`."""
        if len(steps) == self._shape[0] and len(set(steps.values())) == 1:
            return self.at(steps[0])
        return torch.stack([self.at(step)[row] for row, step in steps.items()])

    def free(self, step: int) -> None:
        """Forget the positions before `step`, which every row has passed."""
        while self._first < step and self._draws:
            self._draws.popleft()
            self._states.popleft()
            self._first += 1

    def rewind(self, step: int) -> None:
        """Leave the generator where plain sampling stands after `step` tokens."""
        if step > self._first:
            self.at(step - 1)
        self._set_state(self._states[step - self._first])

    def _get_state(self) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self._device).get_rng_state(self._device)

    def _set_state(self, state: torch.Tensor) -> None:
        if self._device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self._device).set_rng_state(state, self._device)
