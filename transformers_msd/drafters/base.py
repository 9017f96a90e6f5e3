"""The two roles of drafting: an assistant, which the user passes, makes a candidate generator for each call."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator
from transformers.utils import logging

from transformers_msd.caches.captures import Captures
from transformers_msd.call.sampling import Sampler
from transformers_msd.costs.rounds import Costs, assumed_costs, costs_of_batch, forward_cost, round_cost
from transformers_msd.costs.sizing import Sizing
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.host import has_to_wait
from transformers_msd.trees.tree import TokenTree, TreeConfig


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CallInputs:
    """
    What a call gives its candidate generator besides the target.

    Args:
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate` as the user passed them, pictures included.
        sampler (`Sampler`):
            Ranks draft logits.
        carried (`Any`, *optional*):
            What the candidate generator of the turn before left in the cache that this call goes on from.
        captures ([`Captures`], *optional*):
            Compiles what has fixed shapes.
    """

    arguments: dict[str, Any]
    sampler: Sampler
    carried: Any | None = None
    captures: Captures | None = None


class TreeCandidateGenerator(CandidateGenerator, ABC):
    """Drafts the token trees of one `generate` call and holds the call's draft caches."""

    # What rounds of this pair cost on this machine, where it was measured.
    measured: Sequence[Costs] | None = None
    # Chooses the size of trees by what rounds cost; without it they are as large as they are set.
    sizing: Sizing | None = None
    # What a level of a tree is taken to cost where it was not measured, in plain steps: as one layer's does in eager
    # mode, six of which were measured to take 1.0 steps of a tiny target on a CPU, and 0.5 of LLaVA-1.5-7B on an H100.
    assumed_level_cost = {"cpu": 0.17, "cuda": 0.08}

    @abstractmethod
    def draft(self, committed: Committed) -> TokenTree:
        """
        Draft one tree per row.

        Args:
            committed (`Committed`):
                All tokens that have come to stand since the call before, the roots of the new trees last.
        """

    def follow_costs(
        self, measured: Sequence[Costs] | None, tree_config: TreeConfig, devices: Sequence[torch.device]
    ) -> None:
        """
        Let trees be as large as pays by what rounds cost: as measured, or else as assumed, unless they are drafted
        whether they pay or not. A device that the host would wait for is not asked for the sake of an assumption: a
        node costs it little.

        Args:
            measured (`Sequence[Costs]`, *optional*):
                What was measured, with one prompt and with larger batches.
            tree_config ([`TreeConfig`]):
                Size and shape of the largest trees.
            devices (`Sequence[torch.device]`):
                Those of target and draft.
        """
        self.measured = measured
        if measured is not None or (tree_config.gate and not any(map(has_to_wait, devices))):
            self.sizing = Sizing(self._costs(1, devices[0].type))

    def _costs(self, batch_size: int, device_type: str) -> Costs:
        """What rounds with a batch cost, in plain steps: as measured, or as assumed."""
        if self.measured is not None:
            return costs_of_batch(self.measured, batch_size)
        draft, deeper = (self.assumed_draft_cost(batch_size, depth, device_type) for depth in (0, 1))
        return assumed_costs(draft, deeper - draft, device_type, batch_size)

    def keep_sequences(self, kept: list[bool]) -> bool:
        """
        Forget sequences that have ended, so that they take no room in further rounds.

        Called between two rounds, and only where nothing but tokens is returned. By default nothing is forgotten, and
        all sequences stay until the last has ended.

        Args:
            kept (`list[bool]`):
                For each sequence of the batch, whether it stays. All later batches are of those alone.

        Returns:
            `bool`: Whether the others are forgotten. If not, all of them stay in the batch.
        """
        return False

    def round_cost(self, tree: TokenTree) -> float:
        """What a round with a tree costs, in plain steps: as measured, or as assumed."""
        batch_size, num_nodes = tree.token_ids.shape
        device_type = tree.token_ids.device.type
        if self.measured is None:
            drafting = self.assumed_draft_cost(batch_size, tree.depth, device_type)
            return drafting + self.forward_cost(batch_size, num_nodes, device_type)
        return round_cost(self.measured, batch_size, num_nodes, tree.depth)

    def assumed_level(self, device_type: str) -> float:
        """What a forward of the draft is taken to cost where it was not measured, in plain steps."""
        return self.assumed_level_cost.get(device_type, self.assumed_level_cost["cuda"])

    def assumed_draft_cost(self, batch_size: int, depth: int, device_type: str) -> float:
        """What drafting a tree is taken to cost where it was not measured, in plain steps."""
        return depth * self.assumed_level(device_type)

    def forward_cost(self, batch_size: int, num_nodes: int, device_type: str) -> float:
        """What the target's forward over trees of so many nodes costs, in plain steps of the same batch."""
        if self.measured is None:
            return forward_cost(batch_size * num_nodes, device_type) / forward_cost(batch_size, device_type)
        return max(round_cost(self.measured, batch_size, num_nodes, 0), 1.0)

    def sizing_for(self, committed: Committed, sampler: Sampler) -> Sizing | None:
        """Let the sizing learn from what has come to stand, and return it."""
        if self.sizing is not None:
            batch_size = len(committed.lengths)
            if self.sizing.costs.batch_size != batch_size:
                self.sizing.follow(self._costs(batch_size, committed.token_ids.device.type))
            self.sizing.observe([length - 1 for length in committed.host_lengths], sampler.going_on)
        return self.sizing

    def carry(self, committed: Committed, target: Target) -> Any | None:
        """
        Give what a next turn on the returned cache needs to go on from here; nothing by default.

        Args:
            committed (`Committed`):
                Tokens that have come to stand since the last `draft`.
            target (`Target`):
                The target at the end of the call.
        """
        return None


@runtime_checkable
class TreeAssistant(Protocol):
    """Anything that `generate` takes as `assistant_model` to draft trees: it holds weights and settings only."""

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        """Make the candidate generator of one call."""


def tree_config_of(assistant: TreeAssistant) -> TreeConfig | None:
    """Return the tree that an assistant drafts, where it says so."""
    tree_config = getattr(assistant, "tree_config", None)
    return tree_config if isinstance(tree_config, TreeConfig) else None


def as_chains(assistant: TreeAssistant, target: str) -> TreeAssistant:
    """
    Let an assistant draft chains, for a target whose states can't branch; one that can't be told keeps its trees, of
    which one path is verified.

    Args:
        assistant ([`TreeAssistant`]):
            What the user passed, which is left as it is.
        target (`str`):
            Name of the target, for the log.
    """
    inner = getattr(assistant, "assistant", None)
    if isinstance(inner, TreeAssistant):
        # All but what drafts is shared, so that what a runtime compiles is kept.
        wrapped = object.__new__(type(assistant))
        vars(wrapped).update(vars(assistant) | {"assistant": as_chains(inner, target)})
        return wrapped
    config = tree_config_of(assistant)
    if config is None or (config.top_k == 1 and config.topology is None):
        return assistant
    logger.warning_once(
        f"{target} keeps states, which can't branch: chains of {config.depth} tokens are drafted for it, not trees. "
        f"`TreeConfig(num_nodes={config.depth + 1}, depth={config.depth}, top_k=1)` says the same."
    )
    # One that only passes on what another object has is left as it is, or that would be changed.
    name = next((name for name in ("tree_config", "_tree_config") if name in vars(assistant)), None)
    if name is None:
        return assistant
    chains = copy.copy(assistant)
    num_nodes = min(config.num_nodes, config.depth + 1)
    vars(chains)[name] = replace(config, num_nodes=num_nodes, top_k=1, topology=None)
    return chains


def feature_layers_of(assistant: TreeAssistant) -> tuple[int, ...]:
    """Return the hidden states of the target that an assistant's draft reads; the last, where it does not say."""
    return next((model.feature_layers for model in models_of(assistant) if hasattr(model, "feature_layers")), (-1,))


def models_of(assistant: TreeAssistant) -> tuple[PreTrainedModel, ...]:
    """Return the models that an assistant drafts with, where it says so."""
    return tuple(getattr(assistant, "models", ()))


def name_of(assistant_model: Any) -> str:
    """Name what a user passed as `assistant_model`, and the models it drafts with, where it says so."""
    names = dict.fromkeys(type(model).__name__ for model in models_of(assistant_model))
    return type(assistant_model).__name__ + (f" ({', '.join(names)})" if names else "")


@runtime_checkable
class ChecksTarget(Protocol):
    """An assistant that can tell, before anything runs, whether it fits a target."""

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the assistant can't draft for this model, called with these arguments."""
