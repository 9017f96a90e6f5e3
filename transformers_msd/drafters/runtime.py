"""Compiled forwards, and the tensors of fixed shapes that they work on: what may outlive a call."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from transformers_msd.caches.captures import Captured, Captures
from transformers_msd.compat import can_compile
from transformers_msd.drafters.base import TreeAssistant, tree_config_of
from transformers_msd.drafters.wrapped import Wrapped


class StaticRuntime(Wrapped):
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
        super().__init__(assistant)
        self._lock = threading.Lock()
        self.free()

    @property
    def num_captures(self) -> int:
        """Functions compiled so far, one for each shape of their inputs and each way to sample."""
        return len(self.captured.functions)

    def free(self) -> None:
        """Give back the memory of compiled code and its tensors; the next call compiles again."""
        self.captured = Captured()
        self._thread: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"assistant": self.assistant}  # a copy, or a file, has compiled nothing yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["assistant"])

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


@contextmanager
def open_captures(
    assistant: TreeAssistant, model: PreTrainedModel, cache: Cache, generation_config: GenerationConfig
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
            compile_config = None if generation_config.disable_compile else compile_config
            yield Captures(assistant.captured, compile_config, assistant.tree_config, is_kept=True)
        finally:
            assistant.give_back()
    elif isinstance(cache, StaticCache):
        compiles = can_compile(model, cache, generation_config)
        yield Captures(Captured(), compile_config if compiles else None, tree_config_of(assistant))
    else:
        yield None
