"""Compiled forwards, and the tensors of fixed shapes that they work on: what may outlive a call."""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import ModelOutput

from transformers_msd.compat import CACHE
from transformers_msd.fixed_cache import FixedRoom
from transformers_msd.tree import TokenTree, TreeConfig


class StaticRuntime:
    """
    Drafts by compiled code, which it keeps from call to call: pass it as `assistant_model` in place of what it wraps.

    ```python
    runtime = StaticRuntime(draft)
    target.generate(**inputs, assistant_model=runtime)                                 # drafting is compiled
    target.generate(**inputs, assistant_model=runtime, cache_implementation="static")  # and so is the target
    ```

    The first calls compile, once for every size of trees, batch and cache (512 columns, 1024, and so on). How is told
    by `compile_config`, as for plain `generate` with a static cache; on a GPU its default makes CUDA graphs. A call
    that comes while another uses the runtime runs eagerly, and so does one of another thread on a GPU, where graphs
    belong to the thread that made them.

    Args:
        assistant ([`TreeAssistant`]):
            What drafts.
    """

    def __init__(self, assistant: Any) -> None:
        self.assistant = assistant
        self._lock = threading.Lock()
        self.free()

    @property
    def tree_config(self) -> TreeConfig | None:
        """Tree of what drafts, where it has any."""
        return getattr(self.assistant, "tree_config", None)

    @property
    def num_captures(self) -> int:
        """Functions compiled so far, one for each shape of their inputs and each way to sample."""
        return len(self._compiled)

    def free(self) -> None:
        """Give back the memory of compiled code and its tensors; the next call compiles again."""
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._buffers: dict[Hashable, dict[Any, torch.Tensor]] = {}
        self._thread: int | None = None

    def candidate_generator(self, target: Any, inputs: Any) -> Any:
        """Make the candidate generator of one `generate` call."""
        return self.assistant.candidate_generator(target, inputs)

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the assistant can't draft for this model, called with these arguments."""
        if hasattr(self.assistant, "check_target"):
            self.assistant.check_target(target, arguments)

    def take(self, device: torch.device) -> bool:
        """Take the runtime for a call, if it is free."""
        if not self._lock.acquire(blocking=False):
            return False
        if device.type != "cpu" and self._thread not in (None, threading.get_ident()):
            self._lock.release()
            return False
        self._thread = threading.get_ident()
        return True

    def give_back(self) -> None:
        """End the call that took the runtime."""
        self._lock.release()


class Captures:
    """
    Compiles for one call, or finds what earlier calls have compiled.

    Args:
        runtime ([`StaticRuntime`]):
            Keeps it.
        compile_config (`CompileConfig`, *optional*):
            How to compile; nothing is without it, only the shapes are fixed.
        is_kept (`bool`):
            Whether the runtime outlives the call.
    """

    def __init__(self, runtime: StaticRuntime, compile_config: CompileConfig | None, is_kept: bool) -> None:
        self._runtime = runtime
        self._is_kept = is_kept
        self._settings: dict[str, Any] | None = None
        if compile_config is not None:
            self._settings = compile_config.to_dict()
            if self._settings["dynamic"] is None:
                self._settings["dynamic"] = False
        self._settings_key = repr(self._settings)
        self._num_rooms: dict[nn.Module, int] = {}

    def open_room(
        self,
        model: nn.Module,
        cache: Cache,
        lengths: torch.Tensor,
        host_lengths: list[int],
        is_real: torch.Tensor | None = None,
    ) -> FixedRoom:
        """Open a [`Room`] for a model on tensors that are kept for it, others for each room of this call."""
        number = self._num_rooms.get(model, 0)
        self._num_rooms[model] = number + 1
        buffers = self._runtime._buffers.setdefault((model, number), {})
        return FixedRoom(cache, lengths, host_lengths, is_real, buffers=buffers, run=self.run)

    def num_nodes(self, tree: TokenTree) -> int:
        """Nodes to fill trees up to: a power of two, but no more than the settings ask for."""
        if tree.num_nodes == 1:
            return 1
        rounded = 1 << (tree.num_nodes - 1).bit_length()
        config = self._runtime.tree_config
        if isinstance(config, TreeConfig) and config.num_nodes >= tree.num_nodes:
            return min(rounded, config.num_nodes)
        return rounded

    def forward(self, model: PreTrainedModel, model_inputs: dict[str, Any]) -> ModelOutput:
        """Run a model on inputs of fixed shapes."""
        width = model_inputs["attention_mask"].shape[-1]
        key = (model, tuple(model_inputs["input_ids"].shape), width)
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
        compiled = self._runtime._compiled
        key = (function, key, self._settings_key)
        if key not in compiled:
            if self._is_kept:
                # `torch.compile` keeps what it makes with the code of a function, and only so much of it.
                function = FunctionType(function.__code__.replace(), function.__globals__)
            compiled[key] = torch.compile(function, **self._settings)
        return compiled[key](*args)


def _forward(model: PreTrainedModel, model_inputs: dict[str, Any]) -> ModelOutput:
    return model(**model_inputs, return_dict=True)


@contextmanager
def open_captures(
    assistant: Any, model: PreTrainedModel, cache: Cache, generation_config: GenerationConfig
) -> Iterator[Captures | None]:
    """
    Find out what of a call is compiled, and on which tensors.

    Args:
        assistant ([`TreeAssistant`]):
            What the user passed as `assistant_model`.
        model (`PreTrainedModel`):
            The target.
        cache (`Cache`):
            The target's cache.
        generation_config (`GenerationConfig`):
            The settings of the call.

    Returns:
        [`Captures`], or `None` for a call all of whose shapes may change.
    """
    compile_config = generation_config.compile_config or CompileConfig()
    if isinstance(assistant, StaticRuntime):
        if not assistant.take(model.device):
            yield None
            return
        try:
            yield Captures(assistant, None if generation_config.disable_compile else compile_config, is_kept=True)
        finally:
            assistant.give_back()
    elif isinstance(cache, StaticCache):
        compiles = model._valid_auto_compile_criteria({CACHE: cache}, generation_config)
        yield Captures(StaticRuntime(assistant), compile_config if compiles else None, is_kept=False)
    else:
        yield None
