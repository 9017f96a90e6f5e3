"""Where drafting does not pay, decode plainly for a while, then see whether it pays again."""

from dataclasses import dataclass, replace

from transformers_msd.call.emission import Emission
from transformers_msd.drafters.base import TreeCandidateGenerator
from transformers_msd.target.committed import Committed
from transformers_msd.trees.tree import TokenTree


# What drafting may lose before it rests, at the most: in plain steps, and in rounds in vain where these cost more.
LOST_STEPS, LOST_ROUNDS = 3.0, 1.5
# Of this, what it may lose after a rest, and what it may win beyond.
AFTER_REST, CREDIT = 1 / 3, 5 / 3
# Plain steps of the first rest; each further one is so many times longer, until drafting pays again.
FIRST_REST, LONGER = 16, 6
# Tokens by which the draft is taken at its word in the beginning, and share of what was seen that a round forgets.
PRIOR, FORGOTTEN = 4.0, 0.05


@dataclass
class Evidence:
    """
    What speaks for drafting, as counted in rounds; a next turn goes on with it.

    Args:
        won (`float`):
            Plain steps that rounds have saved, less those that they cost.
        rest (`int`):
            Plain steps of the next rest.
        expected (`float`):
            Tokens that the draft expected to be accepted.
        accepted (`float`):
            Those that were.
    """

    won: float = 0.0
    rest: int = FIRST_REST
    expected: float = PRIOR
    accepted: float = PRIOR

    def observe(self, accepted: float, expected: float, cost: float) -> int:
        """
        Take a round that accepted so many tokens, expected others and cost so many plain steps.

        Returns:
            `int`: Plain steps to take now. Two witnesses must speak for a rest: what was won and lost, which tells
            little after a few rounds, and the draft, by what it expects of its trees, scaled by how this turned out.
            Where that is less than the round costs, less may be lost in proportion.
        """
        self.expected += expected - FORGOTTEN * (self.expected - PRIOR)
        self.accepted += accepted - FORGOTTEN * (self.accepted - PRIOR)
        may_lose = max(LOST_STEPS, LOST_ROUNDS * (cost - 1))
        self.won = min(self.won + 1 + accepted - cost, CREDIT * may_lose)
        if self.won >= 0:
            self.rest = FIRST_REST
        promised = (1 + expected * self.accepted / self.expected) / cost
        if promised >= 1 or self.won >= -may_lose * promised:
            return 0
        num_steps, self.rest, self.won = self.rest, self.rest * LONGER, (AFTER_REST - 1) * may_lose
        return num_steps


class Gate:
    """
    Stands before a candidate generator and lets it rest while few of its tokens are accepted.

    All decisions follow from the numbers of tokens that rounds emitted and the draft expected, never from a clock: the
    same call drafts the same trees every time.

    Args:
        candidates ([`TreeCandidateGenerator`]):
            Drafts the trees.
        emission ([`Emission`]):
            Tokens of the call so far.
        is_active (`bool`, *optional*, defaults to `True`):
            Whether there is a gate at all.
        evidence ([`Evidence`], *optional*):
            What the turn before left.
    """

    def __init__(
        self,
        candidates: TreeCandidateGenerator,
        emission: Emission,
        is_active: bool = True,
        evidence: Evidence | None = None,
    ) -> None:
        self._candidates = candidates
        self._emission = emission
        self._is_active = is_active
        # A turn begins with a short rest: another draft may have gone before.
        self.evidence = replace(evidence or Evidence(), rest=FIRST_REST)
        self._lengths: list[int] = []
        self._cost = 0.0  # of the last round
        self._num_left = 0  # plain steps of this rest
        # What came to stand while the candidates rested.
        self._missed: list[Committed] = []

    @property
    def is_resting(self) -> bool:
        """Whether the candidates rested in the last round."""
        return bool(self._missed)

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

    def forward_cost(self, batch_size: int, num_nodes: int, device_type: str) -> float:
        """What the target's forward over trees of so many nodes costs, in plain steps."""
        return self._candidates.forward_cost(batch_size, num_nodes, device_type)

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
        """Look at the round before, and close the gate if rounds do not pay."""
        before, self._lengths = self._lengths, self._emission.lengths
        if not before or self._missed:
            return
        emission = self._emission
        # Rows that have ended take pads or wait for others: neither tells how well they were drafted. What the text
        # so far proposed was not drafted.
        rows = [
            (now - then - 1 - num_ngrams, num_expected)
            for now, then, has_ended, num_ngrams, num_expected in zip(
                self._lengths, before, emission.pad_rows, emission.num_ngrams, emission.num_expected, strict=True
            )
            if now > then and not has_ended
        ]
        if rows:
            accepted, expected = (sum(each) / len(rows) for each in zip(*rows, strict=True))
            self._num_left = self.evidence.observe(accepted, expected, self._cost)
