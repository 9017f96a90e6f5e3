"""Drafting from the text itself: where the last words stood before, what followed them is tried again."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from transformers_msd.call.emission import Emission
from transformers_msd.call.sampling import Sampler
from transformers_msd.compat import stock_drafting_error
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.grafting import graft
from transformers_msd.trees.host import to_device
from transformers_msd.trees.tree import TokenTree, TreeConfig


# Tokens that must have stood before: the longest match counts.
LENGTHS = (4, 3, 2)
# Matches of so many tokens and more are counted as one.
LONGEST = 12
# Until they are counted, matches of `n` tokens are taken to be right `n` times in `n + 3`.
NUM_WRONG = 3
# What a forward that verifies a chain must give for each plain step that it costs, for costs are rough.
LEAST_GAIN = 1.05


@dataclass
class Outcomes:
    """How often a token that followed a match before has followed it again, by tokens matched."""

    tried: Counter[int] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)

    def probability(self, num_matched: int) -> float:
        """How likely the token after a match is to follow again."""
        num_matched = min(num_matched, LONGEST)
        right, tried = self.right[num_matched], self.tried[num_matched]
        return (num_matched + right) / (num_matched + NUM_WRONG + tried)

    def observe(self, num_matched: int, token_ids: list[int], found: list[int]) -> None:
        """Count what followed a match beside what followed it before, up to the first that differs."""
        for number, (expected, token_id) in enumerate(zip(token_ids, found, strict=False), num_matched):
            self.tried[min(number, LONGEST)] += 1
            if expected != token_id:
                break
            self.right[min(number, LONGEST)] += 1


class Ngrams:
    """
    The text of one sequence, and where each of its last words stood before.

    Args:
        outcomes ([`Outcomes`]):
            What is counted, for all sequences of the call.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # place of the token behind each match, the last there is
        self._guess: tuple[int, list[int]] = (0, [])

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take tokens that have come to stand."""
        token_ids = list(token_ids)
        self._outcomes.observe(*self._guess, token_ids)
        self._guess = (0, [])
        for token_id in token_ids:
            place = len(self._tokens)
            for length in LENGTHS:
                if length <= place:
                    self._next[tuple(self._tokens[-length:])] = place
            self._tokens.append(token_id)

    def guess(self, most: int) -> tuple[int, list[int]]:
        """Find the longest match of the last tokens: return its length, and so many tokens that followed it."""
        for length in LENGTHS:
            place = self._next.get(tuple(self._tokens[-length:]))
            if place is not None:
                while length < min(place, LONGEST) and self._tokens[place - 1 - length] == self._tokens[-1 - length]:
                    length += 1
                period = len(self._tokens) - place
                self._guess = (length, [self._tokens[place + number % period] for number in range(most)])
                break
        return self._guess


class NgramBranches:
    """
    Grafts what stood in the text before on the trees of one call.

    Args:
        config ([`TreeConfig`]):
            Most nodes, and tokens on a path.
        emission ([`Emission`]):
            Tokens of the call so far.
        sampler ([`Sampler`]):
            Knows the noise by which the target picks.
        vocab_size (`int`):
            Tokens there are.
        unfit (`Sequence[int]`):
            Tokens that are not to be tried.
        outcomes ([`Outcomes`]):
            What was counted in the turns before, and is counted in this.
        is_fixed (`bool`, *optional*, defaults to `False`):
            Whether all grafted trees count as deep as chains may become, so that compiled code sees one shape.
    """

    def __init__(
        self,
        config: TreeConfig,
        emission: Emission,
        sampler: Sampler,
        vocab_size: int,
        unfit: Sequence[int],
        outcomes: Outcomes,
        is_fixed: bool = False,
    ) -> None:
        self._outcomes = outcomes
        self._config, self._is_fixed = config, is_fixed
        self._emission = emission
        self._sampler = sampler
        self._vocab_size, self._unfit = vocab_size, set(unfit)
        self._texts = [Ngrams(outcomes) for _ in emission.tokens]
        self._prompts = emission.prompt_ids.tolist()
        for text, prompt in zip(self._texts, self._prompts, strict=True):
            text.extend(prompt)

    def graft(self, tree: TokenTree, forward_cost: Callable[[int, int, str], float]) -> TokenTree:
        """
        Add a chain to the tree of each sequence whose last tokens stood before.

        Args:
            tree (`TokenTree`):
                Trees of a draft, or roots alone.
            forward_cost (`Callable[[int, int, str], float]`):
                [`TreeCandidateGenerator.forward_cost`].
        """
        self._follow()
        guesses = [self._guess(row) for row in self._emission.rows]
        length = self._length(
            [probabilities for _, probabilities in guesses],
            tree.num_nodes,
            lambda num_nodes: forward_cost(len(guesses), num_nodes, tree.token_ids.device.type),
        )
        if length == 0:
            return tree
        filler = (0, 0.0)
        chains = [[*zip(*guess, strict=True)][:length] + [filler] * (length - len(guess[0])) for guess in guesses]
        device = tree.token_ids.device
        token_ids = to_device([[token_id for token_id, _ in chain] for chain in chains], device)
        odds = to_device([[probability for _, probability in chain] for chain in chains], device)
        noise = self._sampler.noise_of_round(length - 1)
        if noise is None:
            log_probs = odds.log()
        else:
            # What is picked is the first of exponential clocks. All other tokens together are one, of rate `1 - p`.
            own = noise.to(device).gather(-1, token_ids[..., None])[..., 0]
            log_probs = -own * (1 - odds) / odds
        scores = log_probs.cumsum(-1).nan_to_num(nan=-torch.inf)
        grown = graft(tree, token_ids, scores, max(tree.num_nodes, length + 1))
        return replace(grown, depth=max(grown.depth, self._config.depth)) if self._is_fixed else grown

    def _follow(self) -> None:
        """Take what has come to stand since the round before, in sequences that go on."""
        for row in self._emission.rows:
            text, tokens = self._texts[row], self._emission.tokens[row]
            if self._emission.goes_on(row):
                text.extend(tokens[len(text) - len(self._prompts[row]) :])

    def _guess(self, row: int) -> tuple[list[int], list[float]]:
        """Guess how a sequence goes on: tokens, and how likely each is after those before it."""
        if not self._emission.goes_on(row):
            return [], []
        num_matched, token_ids = self._texts[row].guess(self._config.depth)
        wrong = (place for place, each in enumerate(token_ids) if each in self._unfit or each >= self._vocab_size)
        end = next(wrong, len(token_ids))
        return token_ids[:end], [self._outcomes.probability(num_matched + place) for place in range(end)]

    def _length(self, guesses: list[list[float]], num_nodes: int, forward_cost: Callable[[int], float]) -> int:
        """Choose how long chains are: what fits into the trees, and beyond them what pays."""
        longest = min(max(map(len, guesses)), self._config.num_nodes - 1)
        if not longest:
            return 0
        best, best_rate = 0, (LEAST_GAIN if num_nodes == 1 else 1.0) / forward_cost(num_nodes)
        expected, paths = 1.0, [1.0] * len(guesses)
        for length in range(1, longest + 1):
            paths = [
                path * (guess[length - 1] if length <= len(guess) else 0.0)
                for path, guess in zip(paths, guesses, strict=True)
            ]
            expected += sum(paths) / len(paths)
            rate = expected / forward_cost(max(num_nodes, length + 1))
            if rate > best_rate:
                best, best_rate = length, rate
        return best


class NgramDrafter:
    """
    Drafts without a model: where the last two tokens or more stood before, in the prompt or the answer, what followed
    them is tried again (prompt lookup). It needs no training, and pays where answers repeat what was said.

    ```python
    >>> target.generate(**inputs, assistant_model=NgramDrafter())
    ```

    Args:
        tree_config ([`TreeConfig`], *optional*):
            How many tokens are tried, ten by default.
    """

    models = ()

    def __init__(self, tree_config: TreeConfig | None = None) -> None:
        chain = {"num_nodes": 11, "depth": 10, "top_k": 1, "gate": False}
        self.tree_config = TreeConfig.checked(tree_config or chain)
        if not self.tree_config.ngrams:
            raise ValueError(
                "`NgramDrafter` drafts nothing but n-grams, got a `TreeConfig` with `ngrams=False`. Leave it unset."
            )

    @property
    def config(self) -> NoReturn:
        """None: Transformers' own way of drafting asks for it first."""
        raise stock_drafting_error(self)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        """Make the candidate generator of one call, which leaves all to the branches that every call may have."""
        return _Roots()

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """Raise nothing: any target that drafting serves will do."""


class _Roots(TreeCandidateGenerator):
    """Drafts nothing of its own."""

    def draft(self, committed: Committed) -> TokenTree:
        return TokenTree.root(committed.root_token_ids)

    def keep_sequences(self, kept: list[bool]) -> bool:
        return True
