"""What a call asks of the target's outputs: the hidden states at both ends, of every part of a prompt."""

from typing import Any

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


def with_ends(output_hidden_states: bool | int | list[int] | None) -> bool | list[int]:
    """Add the input embeddings and the last hidden state to what the user asked for."""
    if output_hidden_states is True:
        return True
    if isinstance(output_hidden_states, int) and not isinstance(output_hidden_states, bool):
        output_hidden_states = [output_hidden_states]
    return sorted({0, -1, *(output_hidden_states or [])})
