"""Compiled code, and the tensors of fixed shapes that it works on."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import ModelOutput

from transformers_msd.caches.fixed import FixedRoom
from transformers_msd.traits.windows import Window
from transformers_msd.trees.tree import TokenTree, TreeConfig


@dataclass
class Captured:
    """
    What may outlive a call.

    Args:
        functions (`dict[Hashable, Callable]`):
            Compiled functions.
        buffers (`dict[Hashable, dict[Any, torch.Tensor]]`):
            Tensors that they work on, those of each room apart.
    """

    functions: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)
    buffers: dict[Hashable, dict[Any, torch.Tensor]] = field(default_factory=dict)


class Captures:
    """
    Compiles for one call, or finds what earlier calls have compiled.

    Args:
        captured ([`Captured`]):
            Keeps it.
        compile_config (`CompileConfig`, *optional*):
            How to compile; nothing is without it, only the shapes are fixed.
        tree_config ([`TreeConfig`], *optional*):
            Trees that are drafted.
        is_kept (`bool`, *optional*, defaults to `False`):
            Whether what is compiled outlives the call.
    """

    def __init__(
        self,
        captured: Captured,
        compile_config: CompileConfig | None,
        tree_config: TreeConfig | None,
        is_kept: bool = False,
    ) -> None:
        self._captured = captured
        self._tree_config = tree_config
        self._is_kept = is_kept
        self._settings: dict[str, Any] | None = None
        if compile_config is not None:
            self._settings = compile_config.to_dict()
            if self._settings["dynamic"] is None:
                self._settings["dynamic"] = False
        self._settings_key = repr(self._settings)
        self._num_rooms: dict[nn.Module, int] = {}

    def room(
        self,
        model: nn.Module,
        cache: Cache,
        lengths: torch.Tensor,
        host_lengths: list[int],
        is_real: torch.Tensor | None = None,
        windows: Sequence[Window | None] = (),
    ) -> FixedRoom:
        """Make a [`Room`] for a model on tensors that are kept for it, others for each room of this call."""
        number = self._num_rooms.get(model, 0)
        self._num_rooms[model] = number + 1
        buffers = self._captured.buffers.setdefault((model, number), {})
        return FixedRoom(cache, lengths, host_lengths, is_real, windows, buffers=buffers, run=self.run)

    def num_nodes(self, tree: TokenTree) -> int:
        """Nodes to fill trees up to: a power of two, but no more than the settings ask for."""
        if tree.num_nodes == 1:
            return 1
        rounded = 1 << (tree.num_nodes - 1).bit_length()
        if self._tree_config is not None and self._tree_config.num_nodes >= tree.num_nodes:
            return min(rounded, self._tree_config.num_nodes)
        return rounded

    def forward(self, model: PreTrainedModel, model_inputs: dict[str, Any]) -> ModelOutput:
        """Run a model on inputs of fixed shapes."""
        masks = model_inputs["attention_mask"]
        mask = next(iter(masks.values())) if isinstance(masks, dict) else masks
        key = (model, tuple(model_inputs["input_ids"].shape), mask.shape[-1])
        outputs = self.run(_forward, key, model, model_inputs)
        if self._settings is None:
            return outputs
        # The next run of compiled code may write where this one has left its outputs.
        for name, value in outputs.items():
            if torch.is_tensor(value):
                outputs[name] = value.clone()
            elif name == "hidden_states" and value is not None:
                outputs[name] = tuple(state if state is None else state.clone() for state in value)
        return outputs

    def run(self, function: FunctionType, key: Hashable, *args: Any) -> Any:
        """
        Call a function, compiled.

        Args:
            function (`Callable`):
                A function of a module.
            key (`Hashable`):
                Tells calls whose inputs differ in shape, or in numbers that compiled code takes for constants.
            args:
                Its arguments.
        """
        if self._settings is None:
            return function(*args)
        compiled = self._captured.functions
        key = (function, key, self._settings_key)
        if key not in compiled:
            if self._is_kept:
                # `torch.compile` keeps what it makes with the code of a function, and only so much of it.
                function = FunctionType(function.__code__.replace(), function.__globals__)
            compiled[key] = torch.compile(function, **self._settings)
        return compiled[key](*args)


def _forward(model: PreTrainedModel, model_inputs: dict[str, Any]) -> ModelOutput:
    return model(**model_inputs, return_dict=True)
