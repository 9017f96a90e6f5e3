"""The random numbers of a sampled call, which make its samples those of plain sampling."""

import threading
from collections import deque
from hashlib import sha256

import torch


# No two calls begin at the same number.
_lock = threading.Lock()


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
        self._generator = torch.Generator(device)
        # State of the generator before each position, from `_first` on.
        self._states: deque[torch.Tensor] = deque()
        self._left_at: torch.Tensor | None = None

    def open(self) -> None:
        """
        Take the default generator's numbers from here on.

        Meanwhile the default generator stands elsewhere, so that whoever draws from it, another call in another thread
        say, draws other numbers.
        """
        with _lock:
            state = self._get_state()
            self._states.append(state)
            seed = int.from_bytes(sha256(state.numpy().tobytes()).digest()[:7])
            self._left_at = self._generator.manual_seed(seed).get_state()
            self._set_state(self._left_at)
            self._generator.set_state(state)

    def at(self, step: int) -> torch.Tensor:
        """Noise of one position, counted from the first generated token, of shape `(batch_size, vocab_size)`."""
        while step >= self._first + len(self._draws):
            draw = torch.empty(self._shape, dtype=torch.float32, device=self._device)
            self._draws.append(draw.exponential_(1, generator=self._generator))
            self._states.append(self._generator.get_state())
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

    def leave(self, step: int) -> None:
        """Put the default generator where plain sampling stands after `step` tokens, unless others have used it."""
        if self._left_at is None:
            return
        if step > self._first:
            self.at(step - 1)
        with _lock:
            if torch.equal(self._get_state(), self._left_at):
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
