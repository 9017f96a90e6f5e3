"""The page about targets, docs/targets.md, from what was found out about them, docs/targets.json."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import fill


DOCS = Path(__file__).parents[2] / "docs"
WIDTH = 119

Rows = dict[str, dict[str, str]]


def kind(said: str) -> str:
    """Shorten what came of a model to what must not change."""
    return said.partition(":")[0]


def kinds_of(found: dict[str, str]) -> dict[str, str]:
    """Shorten all that came of a model."""
    return {name: "not tried" if name.startswith("not tried") else kind(said) for name, said in found.items()}


def write_page() -> None:
    """Write docs/targets.md from docs/targets.json."""
    results = json.loads((DOCS / "targets.json").read_text())
    (DOCS / "targets.md").write_text("\n".join(page(results)) + "\n")


def page(results: dict[str, Rows]) -> Iterator[str]:
    """Yield the lines of the page."""
    newest = results[max(results)]
    yield "# Which targets are served"
    yield ""
    yield from paragraph(
        "A tiny model of random weights of every architecture, with an MSD draft and as its own draft: two prompts in "
        "a batch, one padded, of text and, where it takes them, with a picture each, some with a video each, greedy "
        "and sampled, against plain `generate`. Written by `make targets`, on Transformers "
        f"{' and '.join(sorted(results))}; the lists are of {max(results)}. What is tested with every option stands "
        "in [generate.md](generate.md)."
    )
    for seen in ("", "pictures", "videos"):
        heading, column = (f"Equal with {seen}", f"MSD draft, {seen}") if seen else ("Equal", "MSD draft")
        names = [name for name, found in newest.items() if found.get(column) == "equal"]
        yield from section(heading, len(names), listed(names))
    refused = list(refusals(newest))
    num_refused = len({name for name, found in newest.items() if "refused" in kinds_of(found).values()})
    yield from section("Refused before anything runs", num_refused, refused)
    faults = [
        f"- `{name}`, {column}: {said}"
        for name, found in sorted(newest.items())
        for column, said in found.items()
        if kinds_of(found)[column] not in ("equal", "refused", "not tried")
    ]
    yield from section("Faults", len(faults), faults or ["None."])
    untried = [
        f"| `{name}`{column.replace('not tried,', ' with').removeprefix('not tried')} | {reason(said)} |"
        for name, found in sorted(newest.items())
        for column, said in found.items()
        if column.startswith("not tried")
    ]
    yield from section("Not tried", len(untried), ["| model | reason |", "|---|---|", *untried])
    differing = [
        f"- `{name}` on {version}: {rows[name]}"
        for version, rows in sorted(results.items())
        for name in sorted(rows.keys() & newest.keys())
        if kinds_of(rows[name]) != kinds_of(newest[name])
    ]
    yield from ["", "## Where the versions differ", "", *(differing or ["Nowhere."])]


def section(heading: str, number: int, lines: Iterable[str]) -> list[str]:
    """Lines under a heading that counts what they name."""
    return ["", f"## {heading}: {number}", "", *lines]


def refusals(rows: Rows) -> Iterator[str]:
    """Lines of a table of reasons, each with the models that are refused for it; in brackets, what of them alone."""
    reasons: dict[str, list[str]] = {}
    for name, found in rows.items():
        refused = {column: reason(said) for column, said in found.items() if kind(said) == "refused"}
        for fact in sorted(set(refused.values())):
            columns = [column for column in refused if refused[column] == fact]
            alone = f" ({'; '.join(columns)})" if {*refused} != {*found} else ""
            reasons.setdefault(fact, []).append(f"`{name}`{alone}")
    yield from ["| reason | models |", "|---|---|"]
    for fact, models in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair)):
        yield f"| {fact} | {', '.join(models)} |"


def reason(said: str) -> str:
    """Cut what was said to the reason, without the name of the model and the ways out."""
    fact = re.sub(r"^refused: |(?<=: )\w*(?:Error|Exception): ", "", said)
    fact = re.sub(r"^(?:The draft, \w+,|(?!Drafting|The|A\b)\w*[A-Z]\w+)(?= \w)", "The model", fact)
    fact = re.split(r"\. (?:Otherwise|Choose|Sliding|Quantised|Pass|You can)", fact)[0]
    return fact.replace("|", "\\|")[:300]


def paragraph(text: str) -> list[str]:
    """Lines of text."""
    return fill(text, WIDTH, break_on_hyphens=False).splitlines()


def listed(names: Iterable[str]) -> list[str]:
    """Lines of names."""
    return paragraph(", ".join(f"`{name}`" for name in names))
