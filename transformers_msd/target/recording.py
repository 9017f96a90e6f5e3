"""What a call asks of the target's outputs: hidden states of some layers, of every part of a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class Recorder:
    """Stands in for a model where Transformers calls it, and keeps the outputs of every call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.outputs: list[ModelOutput] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        self.outputs.append(self._model(*args, **kwargs))
        return self.outputs[-1]


def with_layers(output_hidden_states: bool | int | list[int] | None, layers: Sequence[int]) -> bool | list[int]:
    """Add the input embeddings, the last hidden state, and what a draft reads, to what the user asked for."""
    if output_hidden_states is True:
        return True
    if isinstance(output_hidden_states, int) and not isinstance(output_hidden_states, bool):
        output_hidden_states = [output_hidden_states]
    return sorted({0, -1, *layers, *(output_hidden_states or [])})


def side_by_side(features: list[torch.Tensor]) -> torch.Tensor:
    """Lay what is read of several layers behind one another, `(batch_size, num_rows, num_layers * hidden_size)`."""
    return features[0] if len(features) == 1 else torch.cat(features, dim=-1)
