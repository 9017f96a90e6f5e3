"""Drafting with a small model of its own: any language model or VLM of the target's vocabulary (Spec-LLaVA)."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from transformers_msd.configuration_msd import visual_token_ids
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.target import Committed, Target
from transformers_msd.tree import TokenTree, TreeConfig, grow_tree


# Models of one tokenizer pad their vocabularies to different multiples.
MOST_PADDING = 512
# Inputs of a forward that belong to the target's own run.
_NOT_PROMPT = ("past_key_values", "inputs_embeds", "position_ids", "labels", "use_cache", "logits_to_keep")


class VLMDrafter:
    """
    Drafts with a small independent model, which sees the same prompt and the same pictures (Spec-LLaVA, arXiv
    2509.11961).

    ```python
    >>> target.generate(**inputs, assistant_model=VLMDrafter(small_model))
    ```

    Args:
        draft_vlm ([`~transformers.PreTrainedModel`]):
            A VLM or language model with the target's tokens. One without pictures drafts from the text alone.
        draft_inputs (`dict[str, Any]`, *optional*):
            What the draft's own processor makes of the prompt, where it differs from the target's. They belong to one
            prompt: make a drafter for each call, the model is shared.
        tree_config ([`TreeConfig`], *optional*):
            Tree to draft, 32 nodes by default.
    """

    def __init__(
        self,
        draft_vlm: PreTrainedModel,
        draft_inputs: Mapping[str, Any] | None = None,
        tree_config: TreeConfig | None = None,
    ) -> None:
        self.draft_vlm = draft_vlm
        self.draft_inputs = draft_inputs
        self.tree_config = tree_config or TreeConfig(num_nodes=32, depth=6, top_k=4)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "VLMCandidateGenerator":
        """Make the candidate generator of one `generate` call."""
        return VLMCandidateGenerator(self, target, inputs)

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """
        Raise a `ValueError` unless the draft shares the target's vocabulary and can read the prompt.

        Args:
            target (`PreTrainedModel`):
                Model to draft for.
            arguments (`dict[str, Any]`):
                The keyword arguments of `generate`.
        """
        ours, theirs = (model.config.get_text_config().vocab_size for model in (self.draft_vlm, target))
        if abs(ours - theirs) > MOST_PADDING:
            raise ValueError(
                f"The draft must have the target's vocabulary, got {ours} tokens for the draft and {theirs} for "
                f"{type(target).__name__}. Choose a draft of the same tokenizer."
            )
        if self.draft_inputs is None and prompt_ids(arguments) is None:
            raise ValueError(
                "A draft model can't read `inputs_embeds` of the target, got no `input_ids`. Pass them, too, or what "
                "the draft's processor makes of the prompt: `VLMDrafter(draft_vlm, draft_inputs=...)`."
            )


def prompt_ids(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the ids of the prompt among the arguments of `generate`."""
    ids = arguments.get("input_ids", arguments.get("inputs"))
    return ids if torch.is_tensor(ids) and ids.ndim == 2 and ids.shape[1] > 0 and not ids.is_floating_point() else None


def prompt_of(model: PreTrainedModel, target: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Choose from the arguments of `generate` what a draft reads of the prompt.

    A draft without pictures gets the text around them, padded on the left.
    """
    names = set(inspect.signature(type(model).forward).parameters) - set(_NOT_PROMPT)
    inputs = {name: value for name, value in arguments.items() if name in names and torch.is_tensor(value)}
    inputs["input_ids"] = ids = prompt_ids(arguments)
    mask = inputs.get("attention_mask")
    inputs["attention_mask"] = mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    if visual_token_ids(model.config):
        return inputs
    visual = torch.isin(ids, torch.tensor(visual_token_ids(target.config), dtype=ids.dtype, device=ids.device))
    kept = mask.bool() & ~visual
    order = kept.int().sort(dim=1, stable=True).indices[:, -max(int(kept.sum(-1).max()), 1) :]
    kept = kept.gather(1, order)
    return {"input_ids": ids.gather(1, order).masked_fill(~kept, 0), "attention_mask": kept.to(mask.dtype)}


class DraftModel(Target):
    """A model that drafts, as one call uses it: the rows it has settled, and those of the tree behind them."""

    @classmethod
    def start(cls, model: PreTrainedModel, inputs: Mapping[str, Any], num_copies: int = 1) -> "DraftModel":
        """
        Run a prompt, its pictures encoded once.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model.
            inputs (`dict[str, Any]`):
                Prompts as for `generate`, left-padded.
            num_copies (`int`, *optional*, defaults to 1):
                Rows to draft for each prompt.
        """

        def prefilled(
            model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_kwargs
        ) -> "DraftModel":
            draft = cls(model, model_kwargs, generation_config)
            draft._model_kwargs["output_hidden_states"] = None
            type(model)._prefill(model, input_ids, generation_config, draft._model_kwargs)
            draft._settle_prompt(len(input_ids), input_ids.device)
            return draft

        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        settings = GenerationConfig(
            max_new_tokens=1,
            do_sample=True,  # nothing is sampled: it lets a prompt have several rows
            num_return_sequences=num_copies,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation=None,
        )
        return model.generate(**moved, generation_config=settings, custom_generate=prefilled)

    @property
    def lengths(self) -> torch.Tensor:
        """Settled columns of each sequence, padding of the prompt included, of shape `(batch_size,)`."""
        return self._lengths

    def extend(self, token_ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """
        Settle further tokens.

        Args:
            token_ids (`torch.Tensor` of shape `(batch_size, num_tokens)`):
                Tokens, fillers behind the first `counts` of them.
            counts (`torch.Tensor` of shape `(batch_size,)`):
                Tokens of each sequence.

        Returns:
            `torch.Tensor` of shape `(batch_size, vocab_size)`: Logits after the last token of each sequence.
        """
        rows = torch.arange(token_ids.shape[1], device=token_ids.device)
        visible = (rows <= rows[:, None]).expand(len(token_ids), -1, -1)
        logits = self.forward_rows(token_ids, rows, visible).logits
        lengths = self._lengths + counts
        self.settle(rows.expand(len(token_ids), -1), lengths, int(lengths.max()))
        return logits[torch.arange(len(logits)), (counts - 1).clamp(min=0)]


@dataclass(frozen=True)
class _Carried:
    draft: DraftModel
    offset: torch.Tensor
    lengths: torch.Tensor
    pending: Committed
    model: PreTrainedModel


class VLMCandidateGenerator(TreeCandidateGenerator):
    """
    Grows trees with an independent model.

    Rows of the tree that came to stand stay in its cache; only the token after them is run again, which no row of the
    tree holds.

    Args:
        drafter ([`VLMDrafter`]):
            Model and settings.
        target ([`Target`]):
            The target of the call.
        inputs ([`CallInputs`]):
            Inputs of the call.
    """

    def __init__(self, drafter: VLMDrafter, target: Target, inputs: CallInputs) -> None:
        self._drafter = drafter
        self._model = drafter.draft_vlm
        self._target = target
        self._inputs = inputs
        self._sampler = inputs.sampler
        self._draft: DraftModel | None = None
        self._offset: torch.Tensor | None = None
        self._pending: Committed | None = None
        self._levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._vocab_size = target.model.config.get_text_config().vocab_size
        carried = inputs.carried
        if isinstance(carried, _Carried) and carried.model is self._model:
            self._draft, self._offset, self._pending = carried.draft, carried.offset, carried.pending
            no_rows = carried.lengths.new_zeros(len(carried.lengths), 0)
            self._draft.settle(no_rows, carried.lengths, int(carried.lengths.max()), starts_with_first=False)

    def draft(self, committed: Committed) -> TokenTree:
        roots = committed.root_token_ids
        log_probs = self._sampler.rank(self._advance(committed)[:, None], 0)[:, 0]
        depth = 0
        self._levels = []

        def expand(token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            nonlocal depth
            self._levels.append((token_ids, slots))
            logits = self._draft.forward_rows(self._readable(token_ids), torch.tensor(depth), visible).logits
            depth += 1
            return self._sampler.rank(self._fit(logits), depth)

        return grow_tree(self._drafter.tree_config, roots.to(log_probs.device), log_probs, expand)

    def carry(self, committed: Committed, target: Target) -> _Carried | None:
        if self._draft is None or self._pending is not None:
            return None
        # A row that ran ahead of the end of the call may have drafted on more than the target kept.
        kept = target.num_real_rows - committed.lengths + 1 + self._offset
        lengths = torch.minimum(self._draft.lengths, kept.to(self._draft.lengths.device))
        return _Carried(self._draft, self._offset, lengths, committed, self._model)

    def _advance(self, committed: Committed) -> torch.Tensor:
        """Settle what has come to stand since the call before; return the logits after it."""
        if self._pending is not None:
            # A picture in a later turn is no token that could be run on: the whole conversation is.
            restart = bool(committed.visual_mask.any())
            committed, self._pending = self._pending.join(committed), None
            if restart:
                self._draft = self._offset = None
        if self._draft is None:
            self._start(len(committed.lengths))
            token_ids, lengths = committed.root_token_ids[:, None], torch.ones_like(committed.lengths)
        else:
            token_ids, lengths = committed.token_ids, committed.lengths
        device = self._draft.lengths.device
        token_ids, lengths = token_ids.to(device), lengths.to(device)
        matched, rows = self._match(token_ids, lengths)
        settled = self._draft.lengths + matched
        self._draft.settle(rows, settled, int(settled.max()), starts_with_first=False)
        # What is left of each sequence, moved to the left.
        left = lengths - matched
        places = torch.arange(max(int(left.max()), 1), device=device) + matched[:, None]
        token_ids = token_ids.gather(1, places.clamp(max=token_ids.shape[1] - 1))
        logits = self._draft.extend(self._readable(token_ids), left)
        if self._offset is None:
            self._offset = self._draft.lengths.to(lengths.device) - self._target.num_real_rows.to(device) - 1
        return self._fit(logits)

    def _start(self, batch_size: int) -> None:
        inputs = self._drafter.draft_inputs
        if inputs is None:
            inputs = prompt_of(self._model, self._target.model, self._inputs.arguments)
        num_prompts = len(inputs["input_ids"])
        if batch_size % num_prompts:
            raise ValueError(
                f"`draft_inputs` must hold as many prompts as the call, got {num_prompts} for {batch_size} rows."
            )
        self._draft = DraftModel.start(self._model, inputs, batch_size // num_prompts)

    def _match(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Find the rows of the last tree that hold the first tokens that came to stand, all but the very last.

        Returns:
            Their number, of shape `(batch_size,)`, and the rows, of shape `(batch_size, depth)`, fillers behind.
        """
        matched, place, first = torch.zeros_like(lengths), torch.zeros_like(lengths), 0
        standing = torch.ones_like(lengths, dtype=torch.bool)
        rows = []
        for depth, (level, slots) in enumerate(self._levels[: token_ids.shape[1] - 1]):
            hits = (level == token_ids[:, depth, None]) & ((slots == place[:, None]) | (depth == 0))
            standing = standing & hits.any(-1) & (depth + 1 < lengths)
            place = hits.int().argmax(-1)
            rows.append(torch.where(standing, place + first, 0))
            matched = matched + standing
            first += level.shape[1]
        return matched, torch.stack(rows, dim=1) if rows else lengths.new_zeros(len(lengths), 0)

    def _readable(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Replace tokens that the draft's vocabulary lacks."""
        return token_ids.clamp(max=self._model.config.get_text_config().vocab_size - 1)

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Give logits the size of the target's vocabulary; tokens that the draft lacks are not drafted."""
        missing = self._vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
