"""Where drafting does not pay, decode plainly for a while, then see whether it pays again."""

from collections import deque

from transformers_msd.call.emission import Emission
from transformers_msd.drafters.base import TreeCandidateGenerator
from transformers_msd.target.committed import Committed
from transformers_msd.trees.tree import TokenTree


# Rounds that are looked at in the beginning, after a rest, and while all goes well.
FIRST_ROUNDS, PROBE_ROUNDS, WINDOW = 3, 2, 8
# Plain steps of the first rest; each further one is so many times longer, until drafting pays again.
FIRST_REST, LONGER = 40, 6


class Gate:
    """
    Stands before a candidate generator and lets it rest while few of its tokens are accepted.

    All decisions follow from the numbers of tokens that rounds emitted, never from a clock: the same call drafts the
    same trees every time.

    Args:
        candidates ([`TreeCandidateGenerator`]):
            Drafts the trees.
        emission ([`Emission`]):
            Tokens of the call so far.
        is_active (`bool`, *optional*, defaults to `True`):
            Whether there is a gate at all.
    """

    def __init__(self, candidates: TreeCandidateGenerator, emission: Emission, is_active: bool = True) -> None:
        self._candidates = candidates
        self._emission = emission
        self._is_active = is_active
        self._lengths: list[int] = []
        # Of each round, the tokens it emitted less those that plain steps would have emitted meanwhile.
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._cost = 0.0  # of the last round
        self._num_needed = FIRST_ROUNDS
        self._rest, self._num_left = FIRST_REST, 0
        # What came to stand while the candidates rested.
        self._missed: list[Committed] = []

    def draft(self, committed: Committed) -> TokenTree:
        """Draft trees, or give roots alone, which make the round a plain step."""
        if self._is_active:
            self._judge()
        if self._num_left:
            self._num_left -= 1
            self._missed.append(committed)
            return TokenTree.root(committed.root_token_ids)
        tree = self._candidates.draft(self._catch_up(committed))
        if not isinstance(tree, TokenTree) or len(tree.token_ids) != len(committed.lengths):
            found = f"{len(tree.token_ids)} trees" if isinstance(tree, TokenTree) else type(tree).__name__
            raise ValueError(
                f"`draft` of {type(self._candidates).__name__} must return a `TokenTree` of {len(committed.lengths)} "
                f"rows, got {found}. Draft one tree for each row of `committed`."
            )
        self._cost = self._candidates.round_cost(tree)
        return tree

    def keep_sequences(self, kept: list[bool]) -> bool:
        """Forget sequences, if the candidates can; return whether they could."""
        if not self._candidates.keep_sequences(kept):
            return False
        self._missed = [committed.keep_sequences(kept) for committed in self._missed]
        return True

    def carry(self, committed: Committed, target: object) -> object | None:
        """Give what a next turn needs."""
        return self._candidates.carry(self._catch_up(committed), target)

    def _catch_up(self, committed: Committed) -> Committed:
        missed, self._missed = self._missed, []
        return missed[0].join(*missed[1:], committed) if missed else committed

    def _judge(self) -> None:
        """Look at the round before, and close the gate if rounds have not paid of late."""
        before, self._lengths = self._lengths, self._emission.lengths
        if not before or self._missed:
            return
        # Rows that have ended take pads or wait for others: neither tells how well they were drafted.
        emitted = [
            now - then
            for now, then, has_ended in zip(self._lengths, before, self._emission.pad_rows, strict=True)
            if now > then and not has_ended
        ]
        if not emitted:
            return
        self._recent.append(sum(emitted) / len(emitted) - self._cost)
        if len(self._recent) < self._num_needed:
            return
        if sum(self._recent) < 0:
            self._num_left, self._rest = self._rest, self._rest * LONGER
            self._num_needed = PROBE_ROUNDS
            self._recent.clear()
        else:
            self._rest = FIRST_REST
