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
    """The hooks and flags that our calls bring to one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_calls = 0
        self.is_wanted = False
        self._flag = _Flag(self)
        # Kept from call to call: code that was compiled with these hooks is found again with the same ones only.
        self._modules: list[ReferenceType[nn.Module]] = []
        self._flagged: list[ReferenceType[nn.Module]] = []
        self._hooks: list[tuple[ReferenceType[nn.Module], int, Callable[..., Any]]] = []

    def enter(self, model: nn.Module) -> None:
        """Begin a call; the first hooks all parts of the model that Transformers has not hooked."""
        with output_capturing._hook_installation_lock, self.lock:
            self.num_calls += 1
            if self.num_calls > 1:
                return
            self.is_wanted = False
            modules = list(model.modules())
            parts = [part for part in modules if isinstance(part, PreTrainedModel) and FLAG not in vars(part)]
            if [module() for module in self._modules] != modules or [part() for part in self._flagged] != parts:
                self._modules, self._flagged = [ref(module) for module in modules], [ref(part) for part in parts]
                self._hooks = [hook for part in parts for hook in _hook(part)]
            for module, key, hook in self._hooks:
                module()._forward_hooks[key] = hook
            for part in parts:
                vars(part)[FLAG] = self._flag

    def leave(self) -> None:
        """End a call; the last takes off what the first brought."""
        with self.lock:
            self.num_calls -= 1
            if self.num_calls:
                return
            if self.is_wanted:
                for part in self._flagged:
                    vars(part())[FLAG] = True
                self._modules, self._flagged, self._hooks = [], [], []
            for module, key, _ in self._hooks:
                module()._forward_hooks.pop(key, None)
            for part in self._flagged:
                vars(part()).pop(FLAG, None)


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


def _hook(part: PreTrainedModel) -> list[tuple[ReferenceType[nn.Module], int, Callable[..., Any]]]:
    """Hook a model, down to the models inside it, and set no flag."""
    hooks = []

    def twin_of(module: nn.Module) -> nn.Module:
        # Shares the module's hooks, and nothing else that Transformers would change.
        twin = object.__new__(type(module))
        children = {name: child for name, child in module.named_children() if not isinstance(child, PreTrainedModel)}
        twin.__dict__.update(vars(module), _modules={name: twin_of(child) for name, child in children.items()})
        twins.append((module, twin, set(module._forward_hooks)))
        return twin

    twins: list[tuple[nn.Module, nn.Module, set[int]]] = []
    output_capturing.install_all_output_capturing_hooks(twin_of(part))
    for module, twin, before in twins:
        hooks += [(ref(module), key, hook) for key, hook in twin._forward_hooks.items() if key not in before]
    return hooks


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
        hooks.leave()
        _ours.reset(token)
