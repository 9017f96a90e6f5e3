"""A model of its own as one call drafts with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from transformers_msd.caches.captures import Captures
from transformers_msd.drafters.prompts import has_pictures
from transformers_msd.target.target import Target
from transformers_msd.traits.support import last_learned_position
from transformers_msd.traits.tokens import encoded_token_ids, visual_token_ids
from transformers_msd.trees.masks import causal_mask


class DraftModel(Target):
    """A model that drafts, as one call uses it: the rows it has settled, and those of the tree behind them."""

    @classmethod
    def start(
        cls, model: PreTrainedModel, inputs: Mapping[str, Any], num_copies: int = 1, captures: Captures | None = None
    ) -> "DraftModel":
        """
        Run a prompt, its pictures encoded once.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model.
            inputs (`dict[str, Any]`):
                Prompts as for `generate`, left-padded.
            num_copies (`int`, *optional*, defaults to 1):
                Rows to draft for each prompt.
            captures ([`Captures`], *optional*):
                Compiles the forwards after the prompt.
        """

        def prefilled(
            twin: PreTrainedModel,
            input_ids: torch.Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **model_kwargs: Any,
        ) -> "DraftModel":
            draft = cls(model, model_kwargs, generation_config, captures)
            draft._model_kwargs["output_hidden_states"] = None
            draft._last_position = last_learned_position(model.config)
            draft._run_prompt(model, input_ids)
            draft._settle_prompt(len(input_ids), input_ids.device)
            return draft

        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        settings = GenerationConfig(
            max_new_tokens=1,
            do_sample=True,  # nothing is sampled: it lets a prompt have several rows
            num_return_sequences=num_copies,
            pad_token_id=0,
            eos_token_id=None,
        )
        return _without_settings(model).generate(**moved, generation_config=settings, custom_generate=prefilled)

    def extend(self, token_ids: torch.Tensor, counts: torch.Tensor, host_counts: list[int]) -> torch.Tensor:
        """
        Settle further tokens.

        Args:
            token_ids (`torch.Tensor` of shape `(batch_size, num_tokens)`):
                Tokens, fillers behind the first `counts` of them.
            counts (`torch.Tensor` of shape `(batch_size,)`):
                Tokens of each sequence.
            host_counts (`list[int]`):
                The same where the device need not be asked.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, vocab_size)`: Logits after each of them.
        """
        rows = torch.arange(token_ids.shape[1], device=token_ids.device)
        visible = None
        if not self._is_packed or self._captures is not None:
            visible = causal_mask(*token_ids.shape, token_ids.device)
        logits = self.forward_rows(token_ids, rows, visible).logits
        self.room.extend(counts, host_counts)
        return logits

    def _reachable(self, position_ids: torch.Tensor) -> torch.Tensor:
        # A draft whose context is full drafts badly, and the call goes on.
        return position_ids if self._last_position is None else position_ids.clamp(max=self._last_position)

    def pause(self) -> None:
        """End a call: what remains are tensors and settings, from which another can go on."""
        self.room.leave(trims=False)
        self.model = self.room = self._captures = self._table = None

    def resume(self, model: PreTrainedModel, lengths: torch.Tensor, captures: Captures | None) -> None:
        """Go on in another call from so many settled columns `(batch_size,)` of each sequence."""
        self.model, self._table, self._captures = model, model.get_input_embeddings(), captures
        self._open_room(lengths, lengths.tolist())

    def readable(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Bring tokens to where the draft is, those replaced that its vocabulary lacks, or for which towers run."""
        token_ids = token_ids.to(self.lengths.device).clamp(max=self.model.config.get_text_config().vocab_size - 1)
        for unfit in encoded_token_ids(self.model.config):
            token_ids = token_ids.masked_fill(token_ids == unfit, 0)
        return token_ids


def _without_settings(model: PreTrainedModel) -> PreTrainedModel:
    """Make a twin of a model that shares all it has but its `generation_config`, which is for its own answers."""
    twin = object.__new__(type(model))
    twin.__dict__.update(vars(model), generation_config=GenerationConfig())
    return twin


@contextmanager
def telling_of_others(model: PreTrainedModel, target: PreTrainedModel, arguments: Mapping[str, Any]) -> Iterator[None]:
    """
    Run a prompt with pictures, as the target's processor has made it, by a draft.

    Args:
        model (`PreTrainedModel`):
            The draft.
        target (`PreTrainedModel`):
            The target.
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate`, where they are what the draft reads.

    Raises:
        ValueError: If the body raises, and the draft is of another class than the target.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each model has its own, for what others take
        if type(model) is type(target) or not visual_token_ids(model.config) or not has_pictures(arguments):
            raise
        raise ValueError(
            f"The draft must read the pictures that the target's processor made for {type(target).__name__}, got "
            f"{type(model).__name__}, which could not: {' '.join(str(error).split())}. Pass what its own processor "
            "makes of the prompt: `draft_inputs=...`."
        ) from error
