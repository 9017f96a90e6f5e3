"""How well a call was drafted."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass
class SpeculativeStats:
    """
    Acceptance statistics of one `generate` call, `speculative_stats` of its output.

    Counted are the rounds of unfinished rows, and of their last round the tokens before the stop. The prefill and the
    token it gives are not in it.

    Args:
        acceptance_lengths (`torch.Tensor` of shape `(num_rounds, batch_size)`):
            Tokens emitted by each round for each row: those accepted and the bonus token. 0 where a row was finished
            or waited for others at the length limit.
        num_drafted (`int`):
            Drafted tokens verified, the roots not among them.
        num_accepted (`int`):
            Drafted tokens emitted.
        acceptance_by_depth (`list[float]`):
            Share of the rounds that accepted a token at depth 1, 2, and so on.
        num_plain_steps (`int`):
            Rounds in which nothing was drafted, because drafting did not pay of late. They count as rounds of one
            token.
        num_repeated (`int`):
            Accepted tokens that the target ran again, as one that keeps states must where a round was not accepted
            whole.
    """

    acceptance_lengths: torch.Tensor
    num_drafted: int = 0
    num_accepted: int = 0
    acceptance_by_depth: list[float] = field(default_factory=list)
    num_plain_steps: int = 0
    num_repeated: int = 0

    @property
    def num_rounds(self) -> int:
        """Rounds of the call, each one forward pass of the target."""
        return len(self.acceptance_lengths)

    @property
    def mean_acceptance_length(self) -> float:
        """τ, the tokens emitted per round and row, bonus tokens included (τ - 1 is without). 0 without a round."""
        num_row_rounds = int((self.acceptance_lengths > 0).sum())
        return int(self.acceptance_lengths.sum()) / max(num_row_rounds, 1)

    def __repr__(self) -> str:
        return (
            f"SpeculativeStats(mean_acceptance_length={self.mean_acceptance_length:.2f}, "
            f"num_rounds={self.num_rounds}, num_plain_steps={self.num_plain_steps}, "
            f"num_drafted={self.num_drafted}, num_accepted={self.num_accepted})"
        )


# What is told how well each call of a context was drafted, also where `generate` returns tokens alone.
observer: ContextVar[Callable[[SpeculativeStats], None] | None] = ContextVar("transformers_msd_observer", default=None)


@dataclass
class Rounds:
    """Notes of every round, from which the statistics follow once the ends of all rows are known."""

    starts: list[list[int]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    num_accepted: list[list[int]] = field(default_factory=list)
    num_drafted: list[torch.Tensor] = field(default_factory=list)
    num_plain_steps: int = 0

    def summarize(self, ends: list[int]) -> SpeculativeStats:
        """
        Args:
            ends (`list[int]`):
                Tokens of each row up to and with the one that ended it.
        """
        if not self.starts:
            return SpeculativeStats(torch.zeros(0, len(ends), dtype=torch.long))
        starts, lengths, num_accepted = (
            torch.tensor(values) for values in (self.starts, self.lengths, self.num_accepted)
        )  # (num_rounds, batch)
        emitted = (torch.minimum(lengths, torch.tensor(ends)) - starts).clamp(min=0)
        accepted = torch.minimum(num_accepted, emitted)
        num_drafted = torch.stack(self.num_drafted).cpu()
        num_row_rounds = (emitted > 0).sum().clamp(min=1)
        deepest = int(accepted.max())
        return SpeculativeStats(
            acceptance_lengths=emitted,
            num_drafted=int(num_drafted[emitted > 0].sum()),
            num_accepted=int(accepted.sum()),
            acceptance_by_depth=[float((accepted >= depth).sum() / num_row_rounds) for depth in range(1, deepest + 1)],
            num_plain_steps=self.num_plain_steps,
        )
