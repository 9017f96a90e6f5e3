"""What a round costs at the least: reading weights, where that takes all the time."""

from dataclasses import dataclass


def round_floor(step: float, drafting: float) -> float:
    """
    Tell what a round costs at the least, in plain steps: the target is read once.

    Args:
        step (`float`):
            Bytes that a plain step of the target reads.
        drafting (`float`):
            Bytes that all levels of the tree read: the draft's layers and the head it uses, for each forward.
    """
    return 1 + drafting / step


@dataclass(frozen=True)
class VocabularyCut:
    """
    What a smaller draft vocabulary does to cost and acceptance length of a round.

    Args:
        step (`int`):
            Bytes that a plain step of the target reads.
        layers (`int`):
            Bytes of the draft without a head.
        full_head, own_head (`int`):
            Bytes of the target's head, which the draft uses now, and of the head it would have.
        depth (`int`):
            Levels of its trees.
        num_forwards (`int`):
            Forwards of the draft in a round: one for each level, or one for all of them.
        acceptance_length (`float`):
            Tokens of a round with the full head, the bonus token included.
        share_outside (`float`):
            Share of the target's tokens that the smaller vocabulary lacks.
    """

    step: int
    layers: int
    full_head: int
    own_head: int
    depth: int
    num_forwards: int
    acceptance_length: float
    share_outside: float

    def __post_init__(self) -> None:
        if not 1 <= self.acceptance_length <= self.depth + 1:
            raise ValueError(
                f"`acceptance_length` must be between 1 and {self.depth + 1}, one more than the trees are deep, got "
                f"{self.acceptance_length}. Measure it: `transformers-msd bench` calls it τ."
            )

    @property
    def full_cost(self) -> float:
        """Least cost of a round with the full head, in plain steps."""
        return round_floor(self.step, self.num_forwards * (self.layers + self.full_head))

    @property
    def cut_cost(self) -> float:
        """Least cost of a round with the smaller head, in plain steps."""
        return round_floor(self.step, self.num_forwards * (self.layers + self.own_head))

    @property
    def cut_acceptance_length(self) -> float:
        """Tokens of a round where every accepted token that is outside costs a round more; bonus tokens are not it."""
        accepted = 1 - 1 / self.acceptance_length
        return 1 / (1 / self.acceptance_length + self.share_outside * accepted)

    @property
    def gain(self) -> float:
        """Tokens a second with the smaller vocabulary over those without; below 1 it is slower."""
        return self.cut_acceptance_length / self.acceptance_length * self.full_cost / self.cut_cost

    def __str__(self) -> str:
        return (
            f"a round costs {self.cut_cost:.2f} plain steps in place of {self.full_cost:.2f}, by the weights that the "
            f"draft reads in {self.num_forwards} forwards; {self.share_outside:.2%} of the tokens are outside, so "
            f"that its {self.acceptance_length:g} tokens become {self.cut_acceptance_length:.2f}; gain {self.gain:.3f}"
        )
