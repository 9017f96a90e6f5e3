"""Docstrings as Transformers writes them, turned into what mkdocstrings reads."""

import re
from typing import Any

import griffe

import transformers_msd
from transformers_msd import trainer


PUBLIC = {name: f"transformers_msd.{name}" for name in transformers_msd.__all__} | {
    name: f"transformers_msd.trainer.{name}" for name in trainer.__all__
}
PUBLIC["DraftTrainer"] = "transformers_msd.trainer.base.DraftTrainer"
# ``name (`type` of shape `(rows, columns)`, *optional*, defaults to 1):``
ARGUMENT = re.compile(r"^(    \*{0,2}\w+(?:, \w+)*) \((.+)\):$", re.MULTILINE)
SHAPE = re.compile(r"of shape `[^`]+`")
DEFAULT = re.compile(r"defaults to (.+)$")
# ``    `type` of shape `(rows, columns)`: words``, or without a shape
RETURNED = re.compile(r"^(Returns:\n +)\[?`~?([^`]+)`\]?( of shape `[^`]+`)?: ", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\[)")


def argument(match: re.Match[str], with_default: bool) -> str:
    """Write an argument as Google's style has it."""
    name, said = match.groups()
    kinds = SHAPE.sub("", said).partition(", *optional*")[0]
    notes = [f"O{shape[1:]}." for shape in SHAPE.findall(said)]
    if with_default and "*optional*" in said:
        default = DEFAULT.search(said)
        notes.append(f"Optional, defaults to {default[1]}." if default else "Optional.")
    return f"{name} ({' | '.join(re.findall('`~?([^`]+)`', kinds))}): {' '.join(notes)}".rstrip()


def returned(match: re.Match[str]) -> str:
    """Write what is returned as Google's style has it."""
    start, kind, shape = match.groups()
    return f"{start}{kind}: {'' if shape is None else f'O{shape[2:]}. '}"


def link(match: re.Match[str]) -> str:
    """Link what has a place in the reference; a member leads to its class."""
    name = match[1].partition(".")[0]
    shown = f"`{match[1] if name in PUBLIC else match[1].rpartition('.')[2]}`"
    return f"[{shown}][{PUBLIC[name]}]" if name in PUBLIC else shown


class TransformersStyle(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and not obj.is_class:
            rewrite(obj.docstring, with_defaults=False)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            # Configs of Transformers have fields and no signature that would show their defaults.
            has_signature = "__init__" in cls.members or any("dataclass" in str(one.value) for one in cls.decorators)
            rewrite(cls.docstring, with_defaults=not has_signature)


def rewrite(docstring: griffe.Docstring, with_defaults: bool) -> None:
    """Rewrite a docstring in place."""
    text = ARGUMENT.sub(lambda match: argument(match, with_defaults), docstring.value)
    text = RETURNED.sub(returned, text)
    docstring.value = REFERENCE.sub(link, text)
