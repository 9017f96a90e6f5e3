"""Compiled forwards, and the tensors of fixed shapes that they work on: what may outlive a call."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from transformers_msd.caches.captures import Captured, Captures
from transformers_msd.compat import can_be_compiled, compiles_by_itself
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
    by `compile_config`, as for plain `generate` with a static cache; on a GPU its default makes CUDA graphs. It
    compiles on a CPU, too, but not with `disable_compile`, nor where plain `generate` would not compile one of the
    models, as with some quantised weights and with offloaded ones. A call that comes while another uses the runtime
    runs eagerly.

    Args:
        assistant ([`TreeAssistant`] or [`FeatureDraftModel`]):
            What drafts.
    """

    def __init__(self, assistant: Any) -> None:
        super().__init__(assistant)
        self.lock = threading.Lock()
        self.captured = Captured()

    @property
    def num_captures(self) -> int:
        """Functions compiled so far, one for each shape of their inputs and each way to sample."""
        return len(self.captured.functions)

    def free(self) -> int:
        """
        Give back what is kept from call to call; the next call compiles again.

        Given back are the keys and values of fixed shapes, and the compiled functions with the CUDA graphs made of
        them. PyTorch keeps the memory for its own use until `torch.cuda.empty_cache()`, and what it has noted about
        compiled code until `torch.compiler.reset()`.

        Returns:
            `int`: Bytes of the keys and values. The memory of CUDA graphs, which PyTorch doesn't tell, comes on top.
        """
        captured, self.captured = self.captured, Captured()
        return sum(tensor.nbytes for buffers in captured.buffers.values() for tensor in buffers.values())

    def __getstate__(self) -> dict[str, Any]:
        return {"assistant": self.assistant}  # a copy, or a file, has compiled nothing yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["assistant"])


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
        if not assistant.lock.acquire(blocking=False):
            yield None
            return
        try:
            compiles = all(can_be_compiled(each, generation_config) for each in (model, *assistant.models))
            yield Captures(
                assistant.captured, compile_config if compiles else None, assistant.tree_config, is_kept=True
            )
        finally:
            assistant.lock.release()
    elif isinstance(cache, StaticCache):
        compiles = compiles_by_itself(model, cache, generation_config)
        yield Captures(Captured(), compile_config if compiles else None, tree_config_of(assistant))
    else:
        yield None
