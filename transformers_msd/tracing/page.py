"""One file that shows a trace: its styles, its script and its data inside."""

import json
from pathlib import Path
from typing import Any


_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = ("words.js", "layout.js", "tree.js", "page.js")
# What could end a script element, or begin a comment in it; as an escape it is the same text to JSON.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(trace: dict[str, Any]) -> str:
    """
    Write the page of a trace.

    Args:
        trace (`dict[str, Any]`):
            What `SpeculativeTrace.to_dict` gives.
    """
    data = json.dumps(trace, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES)
    parts = {"/* style */": _read("page.css"), "/* data */": data, "/* script */": "\n".join(map(_read, _SCRIPTS))}
    page, filled = _read("page.html"), []
    # From the top down, each place once: what is put in may read like a place.
    for place, part in parts.items():
        before, _, page = page.partition(place)
        filled += [before, part]
    return "".join([*filled, page])


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
