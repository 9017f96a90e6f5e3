"""Token trees as plain tensors, and their settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import pad

from transformers_msd.trees.topology import Topology, read_topology


@dataclass(frozen=True)
class TreeConfig:
    """
    Size and shape of the token tree drafted in each round (EAGLE-2, arXiv 2406.16858, section 4).

    Args:
        num_nodes (`int`, *optional*, defaults to 59):
            Most nodes of the tree, the root included. A tree that can't fill them is smaller.
        depth (`int`, *optional*, defaults to 6):
            Most drafted tokens on one path. The draft runs `depth` times a round.
        top_k (`int`, *optional*, defaults to 10):
            Children tried for each expanded node, and nodes expanded at each depth. `1` drafts a chain.

        min_probability (`float`, *optional*, defaults to 0.0):
            Probability that the draft must give the path to a node for the node to be expanded and verified, so that
            the tree is as large as the draft is sure of itself (Spec-LLaVA, arXiv 2509.11961, on probabilities in
            place of its raw logits). 0 always fills the tree.
        gate (`bool`, *optional*, defaults to `True`):
            Whether to decode plainly for a while where few drafted tokens are accepted of late, and on a CPU to draft
            as much of the tree as pays by what rounds are assumed to cost, where `transformers-msd tune` never ran.
        ngrams (`bool`, *optional*, defaults to `True`):
            Whether what followed the last words where they stood before, in the prompt or the answer, is tried as a
            branch in place of the least likely nodes, and alone while the gate is closed.
        topology (`Sequence[Sequence[int]]`, *optional*):
            The tree's shape, the same in every round, in place of one that follows the draft: for every drafted node
            the ranks on the path to it, `[[0], [1], [0, 0]]` for two choices and one after the first (Medusa, arXiv
            2401.10774). Paths longer than `depth` are left out; `num_nodes`, `depth` and `top_k` become its own.

    The defaults are MSD's (arXiv 2505.14260): its `total_token=59, depth=5, top_k=10`.
    """

    num_nodes: int = 59
    depth: int = 6
    top_k: int = 10
    min_probability: float = 0.0
    gate: bool = True
    ngrams: bool = True
    topology: Topology | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_nodes", 2), ("depth", 1), ("top_k", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"`TreeConfig.{name}` must be an integer of at least {least}, got {value!r}. "
                    "The smallest tree, `TreeConfig(num_nodes=2, depth=1, top_k=1)`, drafts one token per round."
                )
        if not isinstance(self.min_probability, int | float) or not 0 <= self.min_probability < 1:
            raise ValueError(
                f"`TreeConfig.min_probability` must be at least 0 and less than 1, got {self.min_probability!r}. Try "
                "0.02; 0 always fills the tree."
            )
        for name in ("gate", "ngrams"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`TreeConfig.{name}` must be `True` or `False`, got {getattr(self, name)!r}.")
        if self.topology is not None:
            self._take_shape(read_topology(self.topology, self.depth))

    def _take_shape(self, topology: Topology) -> None:
        if self.min_probability:
            raise ValueError(
                "`TreeConfig.topology` gives every round the same tree, got `min_probability="
                f"{self.min_probability}` beside it. Drop one of them."
            )
        shape = {"num_nodes": len(topology) + 1, "depth": len(topology[-1]), "top_k": 1 + max(map(max, topology))}
        for name, value in ({"topology": topology} | shape).items():
            object.__setattr__(self, name, value)  # frozen for all others

    @classmethod
    def checked(cls, tree_config: Any) -> "TreeConfig":
        """
        Return a tree as it is, and make one of its fields.

        Args:
            tree_config ([`TreeConfig`] or `dict[str, Any]`):
                What a user or a file gives.

        Raises:
            ValueError: If it is neither, or has other fields.
        """
        if isinstance(tree_config, cls):
            return tree_config
        names = [field.name for field in fields(cls)]
        if not isinstance(tree_config, Mapping) or not set(tree_config) <= set(names):
            raise ValueError(
                f"`tree_config` must be a `TreeConfig`, or some of its fields {names}, got {tree_config!r}. Check the "
                "spelling."
            )
        return cls(**tree_config)


@dataclass(frozen=True)
class TokenTree:
    """
    One token tree per row of a batch. Node 0, the root, is the last token emitted; parents come before children, and
    the children of a node hold different tokens.

    Args:
        token_ids (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Token of each node.
        parents (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Index of each node's parent; -1 for the root, and for fillers of a row that has fewer nodes.
        scores (`torch.Tensor` of shape `(batch_size, num_nodes)`):
            Log-probability that the draft gives the path from the root to each node.
        depth (`int`):
            Most drafted tokens on one path; deeper nodes are never accepted.
        is_ngram (`torch.Tensor` of shape `(batch_size, num_nodes)`, *optional*):
            Which nodes the draft did not propose, but the text so far.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    depth: int
    is_ngram: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        if len(shape) != 2 or not shape[1] or self.parents.shape != shape or self.scores.shape != shape:
            raise ValueError(
                "`token_ids`, `parents` and `scores` of a `TokenTree` must have one shape `(batch_size, num_nodes)`, "
                f"got {tuple(shape)}, {tuple(self.parents.shape)} and {tuple(self.scores.shape)}. Pad them with "
                "parents of -1."
            )
        for name in ("token_ids", "parents"):
            if getattr(self, name).is_floating_point():
                raise ValueError(f"`TokenTree.{name}` must hold integers, got {getattr(self, name).dtype}.")
        if self.depth < 0:
            raise ValueError(f"`TokenTree.depth` must not be negative, got {self.depth}. A root alone has 0.")

    @property
    def num_nodes(self) -> int:
        return self.token_ids.shape[1]

    @cached_property
    def ancestor_mask(self) -> torch.Tensor:
        """`(batch_size, num_nodes, num_nodes)`, true where the second node is the first or one of its ancestors."""
        nodes = torch.arange(self.num_nodes, device=self.parents.device)
        reach = ((self.parents[:, :, None] == nodes) | (nodes[:, None] == nodes)).float()
        # Each squaring doubles how far up a node reaches.
        for _ in range(self.depth.bit_length()):
            reach = (reach @ reach).clamp(max=1)
        return reach.bool()

    @cached_property
    def depths(self) -> torch.Tensor:
        """`(batch_size, num_nodes)`, drafted tokens from the root to each node, this one included."""
        if self.depth == 0:
            return torch.zeros_like(self.parents)
        return self.ancestor_mask.sum(-1) - 1

    @property
    def num_expected(self) -> torch.Tensor:
        """Drafted tokens that the draft expects to be accepted, of shape `(batch_size,)`."""
        return (self.scores.exp() * (self.parents >= 0)).sum(-1)

    @classmethod
    def root(cls, token_ids: torch.Tensor) -> "TokenTree":
        """Make trees of a root alone from their tokens, of shape `(batch_size,)`."""
        token_ids = token_ids[:, None]
        return cls(token_ids, torch.full_like(token_ids, -1), torch.zeros_like(token_ids, dtype=torch.float32), 0)

    def to(self, device: torch.device) -> "TokenTree":
        """Move the trees to a device."""
        if self.token_ids.device == device:
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenTree(**{name: own.to(device) if torch.is_tensor(own) else own for name, own in tensors.items()})

    def with_roots(
        self, token_ids: torch.Tensor, unfit: Sequence[int] = (), vocab_size: int | None = None
    ) -> "TokenTree":
        """
        Stand the trees on the tokens emitted last, whatever roots they were drafted with.

        A node whose parent does not come before it becomes a filler, and so does one with a token that is not to be
        tried. A score that is no number is the lowest, and none is above the root's.

        Args:
            token_ids (`torch.Tensor` of shape `(batch_size,)`):
                The roots.
            unfit (`Sequence[int]`, *optional*, defaults to `()`):
                Tokens that are not to be tried.
            vocab_size (`int`, *optional*):
                Tokens there are; others can't be tried.
        """
        if self.num_nodes == 1:
            return TokenTree.root(token_ids.to(self.token_ids))
        nodes = torch.arange(self.num_nodes, device=self.parents.device)
        parents, drafted = torch.where(self.parents < nodes, self.parents, -1), self.token_ids
        wrong = [drafted == token_id for token_id in unfit]
        if vocab_size is not None:
            wrong.append((drafted < 0) | (drafted >= vocab_size))
        for mask in wrong:
            parents, drafted = parents.masked_fill(mask, -1), drafted.masked_fill(mask, 0)
        roots = torch.where(nodes == 0, token_ids.to(drafted)[:, None], drafted)
        scores = self.scores.float().nan_to_num(nan=torch.finfo(torch.float32).min, neginf=-torch.inf)
        scores = scores.clamp(max=0).masked_fill(nodes == 0, 0)
        return replace(self, token_ids=roots, parents=parents, scores=scores)

    def widen(self, num_nodes: int) -> "TokenTree":
        """Fill the trees up to so many nodes."""
        more = num_nodes - self.num_nodes
        if not more:
            return self
        return TokenTree(
            pad(self.token_ids, (0, more)),
            pad(self.parents, (0, more), value=-1),
            pad(self.scores, (0, more)),
            self.depth,
            None if self.is_ngram is None else pad(self.is_ngram, (0, more)),
        )

    def chain(self) -> "TokenTree":
        """Keep of each tree the path on which the draft expects the most tokens to be accepted."""
        hangs = self.ancestor_mask[..., 0]  # on the root, unlike a filler
        expected = (self.ancestor_mask * self.scores.exp()[:, None]).sum(-1) * hangs
        rows = torch.arange(len(expected), device=expected.device)
        is_on_path = self.ancestor_mask[rows, expected.argmax(-1)]
        nodes = is_on_path.int().sort(dim=-1, descending=True, stable=True).indices[:, : self.depth + 1]
        places = torch.arange(nodes.shape[1], device=nodes.device)
        return TokenTree(
            token_ids=self.token_ids.gather(1, nodes),
            parents=torch.where(places < is_on_path.sum(-1, keepdim=True), places - 1, -1),
            scores=self.scores.gather(1, nodes),
            depth=self.depth,
            is_ngram=None if self.is_ngram is None else self.is_ngram.gather(1, nodes),
        )

    def with_chains(self, rows: torch.Tensor, token_id: int) -> "TokenTree":
        """Replace the trees of some rows, a mask of shape `(batch_size,)`, by a chain that repeats one token."""
        nodes = torch.arange(self.num_nodes, device=rows.device)
        chain = torch.where(nodes <= self.depth, nodes - 1, -1)
        return replace(
            self,
            token_ids=torch.where(rows[:, None] & (nodes > 0), token_id, self.token_ids),
            parents=torch.where(rows[:, None], chain, self.parents),
            scores=torch.where(rows[:, None], 0.0, self.scores),
        )
