"""Drafting with models of their own: their caches, which rounds extend, and the trees they grow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from transformers_msd.caches.carried import Owner
from transformers_msd.compat import stock_drafting_error
from transformers_msd.costs.calibration import load_costs
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.drafters.check import check_draft
from transformers_msd.drafters.draft_model import DraftModel, telling_of_others
from transformers_msd.drafters.prompts import check_batch, check_pictures, check_prompt, prompt_ids, prompt_of
from transformers_msd.target.capturing import capturing
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.support import unwrapped
from transformers_msd.trees.growing import grow_tree
from transformers_msd.trees.host import has_to_wait, keep_rows
from transformers_msd.trees.tree import TokenTree, TreeConfig


# Models of one tokenizer pad their vocabularies to different multiples.
MOST_PADDING = 512


class ModelDrafter:
    """
    What drafters share that draft with models of their own.

    Args:
        models (`Sequence[PreTrainedModel]`):
            Models of the target's tokens.
        draft_inputs (`dict[str, Any]`, *optional*):
            What the models' own processor makes of the prompt, where it differs from the target's.
        tree_config ([`TreeConfig`], *optional*):
            Tree to draft, 32 nodes by default.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        draft_inputs: Mapping[str, Any] | None = None,
        tree_config: TreeConfig | None = None,
    ) -> None:
        if not models:
            raise ValueError("`draft_vlm` must be a model or several, got none. Pass the small model that drafts.")
        self.models = tuple(unwrapped(model) for model in models)
        if draft_inputs is not None:
            check_prompt(draft_inputs)
        self.draft_inputs = draft_inputs
        self.tree_config = TreeConfig.checked(tree_config or {"num_nodes": 32, "depth": 6, "top_k": 4})

    @property
    def config(self) -> NoReturn:
        """None: Transformers' own way of drafting asks for it first."""
        raise stock_drafting_error(self)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "ModelCandidateGenerator":
        """Make the candidate generator of one `generate` call."""
        return ModelCandidateGenerator(self, target, inputs)

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """
        Raise a `ValueError` unless the models share the target's vocabulary and can read the prompt.

        Args:
            target (`PreTrainedModel`):
                Model to draft for.
            arguments (`dict[str, Any]`):
                The keyword arguments of `generate`.
        """
        theirs = target.config.get_text_config().vocab_size
        ids = prompt_ids(arguments if self.draft_inputs is None else self.draft_inputs)
        if self.draft_inputs is not None:
            check_batch(self.draft_inputs, arguments)
        for model in self.models:
            check_draft(model)
            ours = model.config.get_text_config().vocab_size
            if abs(ours - theirs) > MOST_PADDING:
                raise ValueError(
                    f"The draft must have the target's vocabulary, got {ours} tokens for the draft and {theirs} for "
                    f"{type(target).__name__}. Choose a draft of the same tokenizer."
                )
            if self.draft_inputs is None:
                check_pictures(model, target, arguments)
        if ids is None:
            raise Refusal(
                "A draft model can't read `inputs_embeds` of the target, got no `input_ids`. Pass them, too, or what "
                "the draft's processor makes of the prompt: `draft_inputs=...`."
            )


@dataclass(frozen=True)
class _Carried:
    drafts: list[DraftModel]
    offsets: list[torch.Tensor]
    lengths: list[torch.Tensor]
    pending: Committed
    owner: Owner


class ModelCandidateGenerator(TreeCandidateGenerator):
    """
    Grows trees with models of their own, each of which may read several views of a prompt as rows of one batch.

    Rows of the tree that came to stand stay in the models' caches; only the tokens after them are run again.

    Args:
        drafter ([`ModelDrafter`]):
            Models and settings.
        target ([`Target`]):
            The target of the call.
        inputs ([`CallInputs`]):
            Inputs of the call.
        views (`Sequence[Any]`, *optional*):
            What each model reads. A later turn goes on with the same models and views.
    """

    assumed_level_cost = {"cpu": 0.25, "cuda": 0.25}  # several layers

    def __init__(self, drafter: "ModelDrafter", target: Target, inputs: CallInputs, views: Sequence[Any] = ()) -> None:
        self._drafter = drafter
        self._owner = Owner(drafter.models, tuple(views))
        if inputs.captures is None:  # compiled rounds have fixed shapes, and other costs
            devices = [target.device, *(model.device for model in drafter.models)]
            self.follow_costs(load_costs(drafter.models, target.model), drafter.tree_config, devices)
        self._target, self._inputs, self._sampler = target, inputs, inputs.sampler
        self._vocab_size = target.model.config.get_text_config().vocab_size
        self._drafts: list[DraftModel] = []
        # How many more columns a draft has settled than the target has real rows.
        self._offsets: list[torch.Tensor] = []
        self._pending: Committed | None = None
        self._levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        carried = inputs.carried
        if isinstance(carried, _Carried) and carried.owner == self._owner:
            self._drafts, self._offsets, self._pending = carried.drafts, carried.offsets, carried.pending
            for draft, model, lengths in zip(self._drafts, drafter.models, carried.lengths, strict=True):
                draft.resume(model, lengths, inputs.captures)

    def start(self, batch_size: int) -> list[DraftModel]:
        """Run the prompts; the rows of a model are those of its first view, then those of its second, and so on."""
        given, arguments, drafts = self._drafter.draft_inputs, self._inputs.arguments, []
        for model in self._drafter.models:
            inputs = given
            if inputs is None:
                inputs = prompt_of(model, self._target.model, arguments, self._target.num_prompt_rows)
            copies = batch_size // len(inputs["input_ids"])
            with capturing(model), telling_of_others(model, self._target.model, {} if given else arguments):
                drafts.append(DraftModel.start(model, self.read(model, inputs), copies, self._inputs.captures))
        return drafts

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn prompts into what a model reads: themselves, or several views of them."""
        return inputs

    def mix(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Turn what the views say into one distribution.

        Args:
            logits (`torch.Tensor` of shape `(num_views, batch_size, num_nodes, vocab_size)`):
                Logits of each view.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_nodes, vocab_size)`: Logits, up to a constant.
        """
        return logits[0]

    def draft(self, committed: Committed) -> TokenTree:
        sizing = self.sizing_for(committed, self._sampler)
        roots = committed.root_token_ids
        log_probs = self._sampler.rank(self._advance(committed), 0)[:, 0]
        depth = 0
        self._levels = []

        def expand(token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            nonlocal depth
            self._levels.append((token_ids, slots))
            parts = []
            for draft in self._drafts:
                copies = len(draft.lengths) // len(token_ids)
                ids = draft.readable(token_ids).repeat(copies, 1)
                logits = draft.forward_rows(ids, torch.tensor(depth), visible.repeat(copies, 1, 1)).logits
                parts.append(self._by_view(logits, copies).to(token_ids.device))
            depth += 1
            return self._sampler.rank(self.mix(torch.cat(parts)), depth)

        return grow_tree(self._drafter.tree_config, roots.to(log_probs.device), log_probs, expand, sizing)

    def keep_sequences(self, kept: list[bool]) -> bool:
        if not self._drafts:
            return False  # the prompts of all of them are yet to be run
        for place, draft in enumerate(self._drafts):
            rows = kept * (len(draft.lengths) // len(kept))
            draft.keep_sequences(rows)
            self._offsets[place] = keep_rows(self._offsets[place], rows)
        self._levels = [tuple(keep_rows(own, kept) for own in level) for level in self._levels]
        return True

    def carry(self, committed: Committed, target: Target) -> _Carried | None:
        if not self._drafts or self._pending is not None:
            return None
        lengths = []
        for draft, offset in zip(self._drafts, self._offsets, strict=True):
            # A row that ran ahead of the end of the call may have drafted on more than the target kept.
            kept = (target.num_real_rows - committed.lengths + 1).to(offset.device)
            lengths.append(torch.minimum(draft.lengths, kept.repeat(len(offset) // len(kept)) + offset))
            draft.pause()
        return _Carried(self._drafts, self._offsets, lengths, committed, self._owner)

    def _advance(self, committed: Committed) -> torch.Tensor:
        """Settle what has come to stand since the call before; return the mixed logits after it."""
        if self._pending is not None:
            # A picture in a later turn is no token that could be run on: the whole conversation is.
            restart = bool(committed.visual_mask.any())
            committed, self._pending = self._pending.join(committed), None
            if restart:
                self._drafts, self._offsets = [], []
        new = committed
        if is_first := not self._drafts:
            self._drafts, new = self.start(len(committed.lengths)), committed.last()
        device = self._drafts[0].lengths.device
        token_ids, lengths = new.token_ids.to(device), new.lengths.to(device)
        matched, rows, host_matched = self._match(token_ids, lengths)
        left, host_left = lengths - matched, [n - own for n, own in zip(new.host_lengths, host_matched, strict=True)]
        num_left = max(*host_left, 1)
        if self._inputs.captures is not None:  # few shapes are to occur
            num_left = max(num_left, self._drafter.tree_config.depth + 1 if has_to_wait(device) else 1)
            num_left = 1 << (num_left - 1).bit_length()
        places = torch.arange(num_left, device=device) + matched[:, None]
        new_ids = token_ids.gather(1, places.clamp(max=token_ids.shape[1] - 1))
        parts = []
        for draft in self._drafts:
            copies = len(draft.lengths) // len(lengths)
            found = rows.repeat(copies, 1) if any(host_matched) else None
            draft.room.extend(matched.repeat(copies), host_matched * copies, found)
            logits = draft.extend(draft.readable(new_ids).repeat(copies, 1), left.repeat(copies), host_left * copies)
            parts.append(self._by_view(logits, copies).to(device))
        if is_first:
            num_real = self._target.num_real_rows
            self._offsets = [
                draft.lengths - num_real.to(draft.lengths.device).repeat(len(draft.lengths) // len(num_real)) - 1
                for draft in self._drafts
            ]
        logits = torch.cat(parts)
        self.observe(committed, logits, matched, rows)
        sequences = torch.arange(len(left), device=device)
        return self.mix(logits[:, sequences, (left - 1).clamp(min=0)][:, :, None])

    def observe(self, committed: Committed, logits: torch.Tensor, matched: torch.Tensor, rows: torch.Tensor) -> None:
        """
        See what the views said about tokens that have come to stand; nothing is done with it by default.

        Args:
            committed ([`Committed`]):
                Tokens since the call before.
            logits (`torch.Tensor` of shape `(num_views, batch_size, num_tokens, vocab_size)`):
                Logits after those of them that were run just now.
            matched (`torch.Tensor` of shape `(batch_size,)`):
                How many of the first of them were rows of the last tree.
            rows (`torch.Tensor` of shape `(batch_size, depth)`):
                These rows, in the order they were drafted.
        """

    def _by_view(self, logits: torch.Tensor, num_views: int) -> torch.Tensor:
        """
        Bring logits `(num_views * batch_size, num_rows, vocab_size)` into the shape of `mix`, of the target's
        vocabulary; tokens that a draft lacks are not drafted.
        """
        missing = self._vocab_size - logits.shape[-1]
        if missing:
            logits = pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
        return logits.unflatten(0, (num_views, -1))

    def _match(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """
        Find the rows of the last tree that hold the first tokens that came to stand, all but the very last. Where the
        host would wait for it, none are looked for, and all run again: a few rows more take such a device no longer.

        Returns:
            Their number, `(batch_size,)`, the rows, `(batch_size, depth)`, fillers behind, and the number on the host.
        """
        if has_to_wait(lengths.device):
            return torch.zeros_like(lengths), lengths.new_zeros(len(lengths), 0), [0] * len(lengths)
        matched, place, first = torch.zeros_like(lengths), torch.zeros_like(lengths), 0
        standing, rows = torch.ones_like(lengths, dtype=torch.bool), []
        for depth, (level, slots) in enumerate(self._levels[: token_ids.shape[1] - 1]):
            hits = (level == token_ids[:, depth, None]) & ((slots == place[:, None]) | (depth == 0))
            standing = standing & hits.any(-1) & (depth + 1 < lengths)
            place = hits.int().argmax(-1)
            rows.append(torch.where(standing, place + first, 0))
            matched = matched + standing
            first += level.shape[1]
        return matched, torch.stack(rows, dim=1) if rows else lengths.new_zeros(len(lengths), 0), matched.tolist()
