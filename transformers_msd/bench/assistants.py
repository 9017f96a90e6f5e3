"""Assistants that draft with another: one times its phases, one simulates how often it is right."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch

from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.drafters.runtime import StaticRuntime
from transformers_msd.drafters.wrapped import Ungated, Wrapped
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.host import synchronize
from transformers_msd.trees.tree import TokenTree


PHASES = ("draft", "verify", "commit")


class PhaseTimer(Wrapped):
    """
    Drafts with another assistant, and notes when each phase of a round begins and how long it takes.

    The device is waited for after each, so a call takes longer than it does without.

    Args:
        assistant ([`TreeAssistant`]):
            What drafts, or a [`StaticRuntime`] around it.
    """

    def __init__(self, assistant: Any) -> None:
        self._runtime = assistant if isinstance(assistant, StaticRuntime) else None
        super().__init__(assistant if self._runtime is None else self._runtime.assistant)
        # Of the last call: phase, start, seconds.
        self.notes: list[tuple[str, float, float]] = []

    @contextmanager
    def timed(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the arguments of a call that is timed. A runtime stays what it is, and keeps what it has compiled."""
        if self._runtime is None:
            yield call | {"assistant_model": self}
            return
        self._runtime.assistant = self
        try:
            yield call
        finally:
            self._runtime.assistant = self.assistant

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        self.notes.clear()  # not anew: a copy that drafts chains notes here, too
        candidates = super().candidate_generator(target, inputs)
        device = target.model.device
        # Both live for one call.
        candidates.draft = self._timed("draft", candidates.draft, device)
        target.forward_tree = self._timed("verify", target.forward_tree, device)
        target.commit = self._timed("commit", target.commit, device)
        return candidates

    def _timed(self, phase: str, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            self.notes.append((phase, start, time.perf_counter() - start))
            return result

        return timed

    def seconds_since(self, start: float) -> dict[str, float]:
        """Sum up the phases that began after a time."""
        return {
            phase: sum(note[2] for note in self.notes if note[0] == phase and note[1] >= start) for phase in PHASES
        }


class Simulated(Ungated):
    """
    Lets another assistant draft, so that all of its time is paid, and puts a chain in the place of its tree, of the
    same size and depth, that goes on as the call is known to go on.

    Args:
        assistant ([`TreeAssistant`]):
            What drafts.
        probability (`float`):
            Probability that a node of the chain, given that its parent is right, is right.
    """

    def __init__(self, assistant: Any, probability: float) -> None:
        super().__init__(assistant)
        self.probability = probability
        # Tokens that the next call is taken to generate, of shape `(batch_size, num_steps)`. In half precision a
        # near-tie may fall the other way in a tree: what the call itself said then is the better guess for the next.
        self.continuation = torch.zeros(0, 0, dtype=torch.long)
        # Of the errors in the next call.
        self.seed = 0

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        candidates.sizing = None
        vocab_size = target.model.config.get_text_config().vocab_size
        # All on the device beforehand: a round waits for nothing that it would not wait for otherwise.
        continuation = self.continuation.to(target.model.device)
        batch_size, num_steps = continuation.shape
        generator = torch.Generator().manual_seed(self.seed)
        luck = torch.rand(num_steps, batch_size, self.tree_config.depth, generator=generator)
        # Of each round.
        is_right = iter(cycle((luck < self.probability).to(target.model.device)))
        num_emitted: torch.Tensor | None = None
        draft = candidates.draft

        def simulated(committed: Committed) -> TokenTree:
            nonlocal num_emitted
            tree = draft(committed)
            # The first rows are the prompt's, behind which one token was emitted.
            num_emitted = (
                torch.ones_like(committed.lengths) if num_emitted is None else num_emitted + committed.lengths
            )
            return _with_chain(tree, continuation, num_emitted, next(is_right), vocab_size)

        candidates.draft = simulated
        return candidates


def _with_chain(
    tree: TokenTree, continuation: torch.Tensor, num_emitted: torch.Tensor, is_right: torch.Tensor, vocab_size: int
) -> TokenTree:
    """
    Put a chain in the place of a tree.

    Args:
        tree (`TokenTree`):
            The drafted trees.
        continuation (`torch.Tensor` of shape `(batch_size, num_steps)`):
            Tokens that the call is taken to generate.
        num_emitted (`torch.Tensor` of shape `(batch_size,)`):
            How many of them are generated.
        is_right (`torch.Tensor` of shape `(batch_size, depth)`):
            Whether each node of the chain is right.
        vocab_size (`int`):
            Tokens of the target.
    """
    depth = min(tree.depth, tree.num_nodes - 1)
    places = num_emitted[:, None] + torch.arange(depth, device=num_emitted.device)
    last = continuation.shape[1] - 1
    truth = continuation.gather(1, places.clamp(max=last))
    chain = torch.where(is_right[:, :depth] & (places <= last), truth, (truth + 1) % vocab_size)
    nodes = torch.arange(tree.num_nodes, device=places.device).expand_as(tree.token_ids)
    return TokenTree(
        token_ids=torch.cat([tree.token_ids[:, :1], chain, tree.token_ids[:, depth + 1 :]], dim=1),
        parents=torch.where(nodes <= depth, nodes - 1, -1),
        scores=tree.scores,
        depth=depth,
    )
