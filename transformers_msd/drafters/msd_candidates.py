"""Trees that grow level by level: MSD (arXiv 2505.14260), EAGLE-2 (2406.16858), EAGLE-3 (2503.01840)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from transformers_msd.caches.carried import Owner
from transformers_msd.caches.room import Room
from transformers_msd.costs.calibration import load_costs
from transformers_msd.costs.sizing import Sizing
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.drafters.msd_captured import draft_trees
from transformers_msd.drafters.reading import Reader, beside
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.axes import with_carried
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.traits.sizes import num_bytes_per_draft, num_bytes_per_step
from transformers_msd.trees.growing import grow_tree
from transformers_msd.trees.masks import causal_mask, take_rows
from transformers_msd.trees.tree import TokenTree, TreeConfig


@dataclass(frozen=True)
class _Carried:
    cache: DynamicCache
    lengths: torch.Tensor
    starts: torch.Tensor
    context: torch.Tensor | None
    begins_visual: torch.Tensor
    pending: Committed
    axes: torch.Tensor
    owner: Owner


class MSDCandidateGenerator(TreeCandidateGenerator):
    """
    Grows trees with a draft on the target's features.

    The draft's cache holds one row for each row of the target's cache, fewer where it pools visual ones. A round first
    adds the rows committed since the round before, whose last prediction gives the children of the root, then the rows
    of the tree, which it drops again.

    Args:
        draft ([`FeatureDraftModel`]):
            The draft model.
        tree_config ([`TreeConfig`]):
            The tree.
        target ([`Target`]):
            The target of the call, which lends its embeddings and head.
        inputs ([`CallInputs`]):
            Inputs of the call.
    """

    # A round, compiled.
    _draft_trees: Callable[..., Any] = staticmethod(draft_trees)

    def __init__(self, draft: FeatureDraftModel, tree_config: TreeConfig, target: Target, inputs: CallInputs) -> None:
        self._draft, self._tree_config = draft, tree_config
        # Looked up once: each look at these properties walks the parameters.
        self._device, self._dtype = draft.device, draft.dtype
        self._target, self._sampler = target, inputs.sampler
        # Of tokens by their places `(batch_size, num_rows)`.
        self._positions = target.axes if draft.reads_axes else lambda places: places
        # Draft and target are captured together.
        self._captures = inputs.captures if self._device == target.device else None
        if self._captures is None:  # compiled rounds have fixed shapes, and other costs
            self.follow_costs(load_costs([draft], target.model), tree_config, (target.device, self._device))
        self._cache = DynamicCache(config=draft.config.get_text_config())
        self._room: Room | None = None
        self._pending: Committed | None = None
        self._owner = Owner([draft])
        self.reader = Reader(draft, target)
        if isinstance(carried := inputs.carried, _Carried) and carried.owner == self._owner:
            self._cache, self._pending = carried.cache, carried.pending
            self.reader.starts, self.reader.context = carried.starts, carried.context
            self.reader.begins_visual = carried.begins_visual
            if draft.reads_axes:
                self._positions = with_carried(target.axes, carried.axes, carried.pending)
            if self._cache.get_seq_length():
                self._open_room(carried.lengths, carried.lengths.tolist())

    @cached_property
    def _least_level(self) -> float:
        """
        What a level costs at the least, in plain steps, for the share that it reads of their weights; nothing where
        these are kept so that they can't be counted.
        """
        step = num_bytes_per_step(self._target.model)
        share = num_bytes_per_draft(self._draft, self._target.model) / step if step else 1.0
        return share if share < 1 else 0.0

    def assumed_draft_cost(self, batch_size: int, depth: int, device_type: str) -> float:
        return depth * max(self.assumed_level(device_type), self._least_level)

    def draft(self, committed: Committed) -> TokenTree:
        sizing = self.sizing_for(committed, self._sampler)
        # Visual rows stand in the prompt alone, which comes with the first rows of a call.
        is_prompt = self._room is None or self._pending is not None
        if self._pending is not None:
            committed, self._pending = self._pending.join(committed), None
        num_before = None if self._room is None else self._room.lengths
        committed = self.reader.read(committed, is_prompt, num_before)
        if self._captures is not None:
            return self._draft_captured(committed, is_prompt)
        tree = self._grow(committed, sizing)
        self._room.settle(None, self._room.lengths, self._room.host_lengths)
        return tree

    def _grow(self, committed: Committed, sizing: Sizing | None) -> TokenTree:
        """Add committed rows to the draft's cache, and grow trees behind them."""
        hidden = take_rows(self._extend(committed), committed.last_rows[:, None])  # (batch, 1, hidden)
        next_positions, depth = self._next_positions(committed), 0

        def expand(token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            nonlocal hidden, depth
            position_ids = (next_positions + depth).expand(*next_positions.shape[:-1], token_ids.shape[1])
            depth += 1
            features = beside(take_rows(hidden, slots), self.reader.context)
            hidden = self._forward(
                inputs_embeds=self._draft.embed(token_ids, self._target),
                features=self._draft.deepen(features.to(self._device, self._dtype), depth),
                attention_mask=self._room.mask(visible, self._dtype),
                position_ids=position_ids,
            )
            return self._rank(hidden, depth)

        log_probs = self._rank(hidden, depth)[:, 0]
        return grow_tree(self._tree_config, committed.root_token_ids, log_probs, expand, sizing)

    @property
    def _num_drafted_rows(self) -> int:
        """Rows that a round adds to the draft's cache, and drops again, at the most."""
        return self._tree_config.depth * self._tree_config.top_k

    def _draft_captured(self, committed: Committed, is_prompt: bool) -> TokenTree:
        """Draft by compiled code, on inputs of one shape."""
        config = self._tree_config
        num_rows = config.depth + 1
        if is_prompt or committed.token_ids.shape[1] > num_rows:
            # Visual rows, or more than a round commits: a prompt, or what came to stand while the gate was closed.
            last_rows = committed.last_rows
            self._extend(
                replace(
                    committed,
                    lengths=last_rows,
                    host_lengths=[max(length - 1, 0) for length in committed.host_lengths],
                )
            )
            committed = committed.last()
        self._room.reserve(num_rows + self._num_drafted_rows)
        more = num_rows - committed.token_ids.shape[1]
        position_ids, next_positions = self._positions(committed.position_ids), self._next_positions(committed)
        inputs_embeds, features = (
            pad(rows, (0, 0, 0, more)).to(self._dtype) for rows in (committed.inputs_embeds, committed.features)
        )
        position_ids = pad(position_ids, (0, more))
        noise = self._sampler.noise_of_round(config.depth)
        warpers = () if noise is None else self._sampler.draft_warpers
        # Their settings are constants of the compiled code.
        sampling = tuple((type(warper), *vars(warper).values()) for warper in warpers)
        token_ids, parents, scores = self._captures.run(
            self._draft_trees,
            (
                self._draft,
                config,
                len(committed.lengths),
                self._room.width,
                noise is None,
                sampling,
                self._target.scales,
            ),
            self._draft,
            self._target,
            config,
            self._room.cache,
            self._room.starts,
            self._room.lengths,
            inputs_embeds,
            features,
            self.reader.context,
            position_ids,
            next_positions,
            committed.lengths,
            committed.root_token_ids,
            noise,
            warpers,
        )
        self._room.extend(committed.lengths, committed.host_lengths)
        # Fillers come last.
        num_nodes = token_ids.shape[1]
        if config.min_probability:
            num_nodes = int((parents >= 0).sum(-1).max()) + 1
        return TokenTree(*(rows[:, :num_nodes].clone() for rows in (token_ids, parents, scores)), config.depth)

    def _next_positions(self, committed: Committed) -> torch.Tensor:
        """Positions behind the last rows; a level deeper they go on by one, on all axes alike."""
        return self._positions(committed.position_ids.gather(1, committed.last_rows[:, None]) + 1)

    def keep_sequences(self, kept: list[bool]) -> bool:
        if self._room is not None:
            self._room.keep_sequences(kept)
            self._room.settle(None, self._room.lengths, self._room.host_lengths)
        self.reader.keep_sequences(kept)
        return True

    def carry(self, committed: Committed, target: Target) -> _Carried:
        if self._pending is not None:
            committed = self._pending.join(committed)
        if self._room is None:
            lengths, self.reader.starts = torch.zeros_like(committed.lengths), committed.position_ids[:, 0]
        else:
            lengths = self._room.lengths.to(committed.lengths.device)
            self._room.leave()
        # A row that ran ahead of the end of the call may have drafted on more than the target kept.
        starts, context = self.reader.starts, self.reader.context
        lengths = torch.minimum(lengths, target.num_real_rows - starts - committed.lengths)
        axes, begins_visual = self._positions(committed.position_ids), self.reader.begins_visual
        return _Carried(self._cache, lengths, starts, context, begins_visual, committed, axes, self._owner)

    def _open_room(self, lengths: torch.Tensor, host_lengths: list[int]) -> None:
        lengths = lengths.to(self._device)
        make_room = Room if self._captures is None else partial(self._captures.room, self._draft)
        self._room = make_room(self._cache, lengths, host_lengths)
        self._room.open()

    def _extend(self, committed: Committed) -> torch.Tensor:
        """Add committed rows to the draft's cache; fillers behind the last row of a sequence are overwritten later."""
        batch_size, num_rows = committed.token_ids.shape
        attention_mask = None
        if self._room is not None and (batch_size > 1 or self._captures is not None):
            attention_mask = self._room.mask(causal_mask(batch_size, num_rows, self._device), self._dtype)
        hidden = self._forward(
            inputs_embeds=committed.inputs_embeds,
            features=self._draft.fuse(committed.features.to(self._device, self._dtype)),
            visual_mask=committed.visual_mask,
            attention_mask=attention_mask,
            position_ids=self._positions(committed.position_ids),
        )
        if self._room is None:
            self._open_room(committed.lengths, committed.host_lengths)
        else:
            self._room.extend(committed.lengths.to(self._device), committed.host_lengths)
        return hidden

    def _forward(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Run the draft in its own dtype and on its own device, and hand over what it says on the target's."""
        inputs = {
            name: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if value is not None
        }
        hidden = self._draft(**inputs, cache=self._cache, use_cache=True).last_hidden_state
        return hidden.to(self._target.device)

    def _rank(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """Rank all tokens after nodes of one depth by their predicted features `(batch_size, nodes, hidden_size)`."""
        if self._draft.head is not None:
            hidden = hidden.to(self._device)
        return self._sampler.rank(self._draft.logits(hidden, self._target).to(self._target.device), depth)
