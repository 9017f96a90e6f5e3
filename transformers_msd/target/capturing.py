"""
The hooks by which Transformers captures outputs, taken off a model after the calls that needed them.

Asked for hidden states, Transformers hooks a model once and sets a flag that says so; both stay. A hooked model can't
be pickled, and a flag without hooks gives empty hidden states in silence. So hooks and flags go together, when the
last of our calls on the model has ended, and only if nobody else has asked for them meanwhile.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing


FLAG = "_output_capturing_hooks_installed"


class _Hooks:
    """The hooks and flags that our calls brought to one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_calls = 0
        self.is_wanted = False
        self._flag = _Flag(self)
        self._module_ids: list[int] = []
        self._flagged_before: set[int] = set()
        # Kept from call to call: code that was compiled with these hooks is found again with the same ones only.
        self._flagged: list[ReferenceType[nn.Module]] = []
        self._hooks: list[tuple[ReferenceType[nn.Module], int, Callable[..., Any]]] = []

    def enter(self, model: nn.Module) -> None:
        """Begin a call; the first brings back what the last had."""
        with self.lock:
            self.num_calls += 1
            if self.num_calls > 1:
                return
            modules = list(model.modules())
            module_ids = [id(module) for module in modules]
            self._flagged_before = {id(module) for module in modules if FLAG in vars(module)}
            kept = [module() for module in (*self._flagged, *(module for module, _, _ in self._hooks))]
            is_hooked = any(id(module) in self._flagged_before for module in kept)
            if module_ids != self._module_ids or None in kept or is_hooked:
                self._flagged, self._hooks = [], []
            self._module_ids = module_ids
            self.is_wanted = False
            for module, key, hook in self._hooks:
                module()._forward_hooks[key] = hook
            for module in self._flagged:
                vars(module())[FLAG] = self._flag

    def adopt(self, model: nn.Module) -> None:
        """Take what has come since the first call began for the calls'."""
        with self.lock:
            self._adopt(model)

    def leave(self, model: nn.Module) -> None:
        """End a call; the last takes off what the calls brought."""
        with self.lock:
            self.num_calls -= 1
            if self.num_calls:
                return
            self._adopt(model)
            if self.is_wanted:
                for module in self._flagged:
                    vars(module())[FLAG] = True
                self._flagged, self._hooks = [], []
            for module in self._flagged:
                vars(module()).pop(FLAG, None)
            for module, key, _ in self._hooks:
                module()._forward_hooks.pop(key, None)

    def _adopt(self, model: nn.Module) -> None:
        # A flag stands for the hooks below it, down to the next model that has a flag of its own.
        owners: dict[str, nn.Module] = {"": model}
        for name, module in model.named_modules():
            is_owner = isinstance(module, PreTrainedModel) or not name
            owners[name] = owner = module if is_owner else owners[name.rpartition(".")[0]]
            if vars(owner).get(FLAG) is True and id(owner) not in self._flagged_before:
                self._hooks += [
                    (ref(module), key, hook)
                    for key, hook in module._forward_hooks.items()
                    if getattr(hook, "__module__", None) == output_capturing.__name__
                ]
        for module in {id(owner): owner for owner in owners.values()}.values():
            if vars(module).get(FLAG) is True and id(module) not in self._flagged_before:
                vars(module)[FLAG] = self._flag
                self._flagged.append(ref(module))


class _Flag:
    """Stands for `True` where Transformers looks whether a model is hooked, and notes who looks besides our calls."""

    def __init__(self, hooks: _Hooks) -> None:
        self._hooks = hooks

    def __bool__(self) -> bool:
        if torch.compiler.is_compiling() or self._hooks in _ours.get():
            return True
        with self._hooks.lock:
            # Who looked the flag up before the hooks went, and asks now, is told to hook the model anew.
            self._hooks.is_wanted = self._hooks.num_calls > 0
            return self._hooks.is_wanted

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return bool, (True,)


_lock = threading.Lock()
_hooks_of: WeakKeyDictionary[nn.Module, _Hooks] = WeakKeyDictionary()
# Of the models that this thread, or task, is inside a call on.
_ours: ContextVar[tuple[_Hooks, ...]] = ContextVar("transformers_msd_hooks", default=())


@contextmanager
def capturing(model: nn.Module) -> Iterator[None]:
    """
    Let a call capture outputs of a model, and leave the model as it was when the last such call has ended.

    Args:
        model (`torch.nn.Module`):
            The model.
    """
    with _lock:
        hooks = _hooks_of.setdefault(model, _Hooks())
    token = _ours.set((*_ours.get(), hooks))
    hooks.enter(model)
    try:
        yield
    finally:
        hooks.leave(model)
        _ours.reset(token)


def adopt_hooks(model: nn.Module) -> None:
    """Note, inside `capturing`, that the model has run: from here on it is told who else relies on its hooks."""
    _hooks_of[model].adopt(model)
