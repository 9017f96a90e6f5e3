"""Reports of a benchmark as text: tables for the screen and for Markdown."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from transformers_msd.costs.settling import LEAST_PASSES


# The share of a figure by which passes may differ before the report says so.
MUCH = 0.2
STEP = "plain step, ms"
HEADER = ("method", "τ", STEP, "round cost", "speed-up, decode", "speed-up, end to end", "equal")
DETAILS = (
    *("method, times in ms", "tokens/s", "end to end", "first token"),
    *("draft", "verify", "commit", "rest", "plain steps", "memory, GiB"),
)
ROUNDS = ("method, a round", "ms", STEP, "in plain steps", "in compiled steps", "in floors", "warm-up, s", "captures")
GIB = 2**30
NOTES = """\
τ: tokens emitted by rounds over rounds, over unfinished rows; the prefill and its token are not in it. Plain step: the
step of plain `generate` that ratios are to, measured in the same passes. Round cost: time of a round over that of a
plain step, the first of each answer left out. Decode: from the first token on, the start of the draft included; end to
end: with vision encoder and prefill. Ratios are of medians over the passes, in brackets the range of the ratios in
single passes; of times, the range of the passes. Settled: the interquartile range of a ratio in single passes, over
the square root of their number, is at most so much of its median. Too noisy: a round took far less than a plain step,
which can't be, as a forward of the target is in it. Equal: rows whose tokens are those of plain `generate`; a dash
where a method draws other samples. Draft, verify, commit and rest divide the time of a round, timed in runs of their
own in which the device is waited for after each. Plain steps: rounds in which drafting rested. Memory: what a call
takes at most above all weights; it is not measured on a CPU. In compiled steps: against plain `generate` with a static
cache, compiled. Floor: the time in which the weights of the target that a step needs are read once. Warm-up: time of
the calls that do not count, with compilation. Captures: functions that our runtime compiled, each for one shape."""
SIMULATED = (
    "Methods marked *simulated* drafted with a real draft, whose time is in all figures, but its tokens were replaced "
    "by the target's own continuation with the probability p at each depth. Their τ says nothing about a draft."
)


def tables(cell: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], list[list[str]]]]:
    """Yield the tables of a cell as headers and rows of text."""
    plain = cell["methods"][0]
    yield HEADER, [_row(method, plain) for method in cell["methods"]]
    yield DETAILS, [_details(method) for method in cell["methods"]]
    yield ROUNDS, [_rounds(method, plain) for method in cell["methods"]]


def _row(method: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    return [
        method["name"],
        _number(method["acceptance_length"]),
        step_time(plain),
        _ratio(method, method["round_cost"], method["round_cost_range"]),
        *(_ratio(method, rates["speedup"], rates["speedup_range"], "x") for rates in _rates(method)),
        f"{method['num_equal']} of {method['num_rows']}" if "num_equal" in method else "-",
    ]


def _rates(method: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return method["decode"], method["end_to_end"]


def _details(method: dict[str, Any]) -> list[str]:
    seconds, peak = method["split_seconds"], method["peak_memory"]
    return [
        method["name"],
        _number(method["decode"]["tokens_per_second"], 1),
        _number(method["end_to_end"]["tokens_per_second"], 1),
        _number(method["first_token_seconds"] * 1e3, 1),
        *(_number(seconds[phase] * 1e3 if seconds else None) for phase in ("draft", "verify", "commit", "rest")),
        str(method["num_plain_steps"]),
        _number(None if peak is None else peak / GIB),
    ]


def _rounds(method: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    num_captures = method["num_captures"]
    ratios = ("round_cost", "compiled_round_cost", "num_floors")
    return [
        method["name"],
        step_time(method),
        step_time(plain),
        *(_ratio(method, method[ratio], method[f"{ratio}_range"]) for ratio in ratios),
        _number(method["warm_up_seconds"], 1),
        "-" if num_captures is None else str(num_captures),
    ]


def step_time(method: dict[str, Any]) -> str:
    """Write the time of a round, or of a plain step, in ms, with the range of the passes."""
    seconds = method["round_seconds"]
    return "-" if seconds is None else _spread(seconds * 1e3, [each * 1e3 for each in method["round_seconds_range"]])


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(value: float, ends: list[float], unit: str = "") -> str:
    return f"{value:.2f}{unit} ({ends[0]:.2f} to {ends[1]:.2f})"


def _ratio(method: dict[str, Any], value: float | None, ends: list[float] | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return "too noisy" if method["is_too_noisy"] else _spread(value, ends, unit)


def print_report(report: dict[str, Any], console: Console) -> None:
    """Show a report on the screen."""
    console.print(_origin(report), highlight=False)
    if _is_simulated(report):
        console.print(SIMULATED.replace("*", ""), highlight=False)
    for cell in report["cells"]:
        for header, rows in tables(cell):
            table = Table(title=cell["label"], title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for number, name in enumerate(header):
                table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for line in about(cell):
            console.print(line, highlight=False)
    for line in _counts(report):
        console.print(line, highlight=False)


def to_markdown(report: dict[str, Any]) -> str:
    """Write a report as Markdown."""
    parts = [f"# {report['target']}", _origin(report), f"```bash\n{report['command']}\n```"]
    if _is_simulated(report):
        parts.append(SIMULATED)
    for cell in report["cells"]:
        parts.append(f"## {cell['label']}")
        for header, rows in tables(cell):
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts.append("\n".join(f"- {line}" for line in about(cell)))
    if lines := list(_counts(report)):
        parts += ["## Generations that differ", "\n".join(f"- {line}" for line in lines)]
    names = {"speedup": "speed-up by τ", "acceptance_by_depth": "acceptance by depth", "time_split": "time of a round"}
    return "\n\n".join([*parts, NOTES, *(f"![{text}]({name}.png)" for name, text in names.items())]) + "\n"


def _is_simulated(report: dict[str, Any]) -> bool:
    return any(method["is_simulated"] for cell in report["cells"] for method in cell["methods"])


def _origin(report: dict[str, Any]) -> str:
    floor = ""
    if report["floor_seconds"] is not None:
        floor = (
            f" A step reads {report['num_bytes_per_step'] / 1e9:.3g} GB of weights; at "
            f"{report['settings']['memory_bandwidth']:g} GB/s, the floor is {report['floor_seconds'] * 1e3:.3g} ms."
        )
    return (
        f"{report['target']} ({report['num_parameters']:,} parameters), {report['dtype']}, {report['attention']} "
        f"attention, {report['hardware']}; torch {report['torch']}, transformers {report['transformers']}, "
        f"transformers-msd {report['transformers_msd']}, commit {report['commit']}; {report['num_prompts']} prompts, "
        f"{report['settings']['max_new_tokens']} new tokens at most."
        f"{floor}"
    )


def about(cell: dict[str, Any]) -> list[str]:
    """List what is said of a cell below its tables: its passes, what to be wary of, what is not there or differs."""
    return [_passes(cell), *_noise(cell), *_left_out(cell), *_divergences(cell)]


def _passes(cell: dict[str, Any]) -> str:
    number, names = cell["num_passes"], cell["unsettled"]
    line = f"{number} timed pass{'es' if number > 1 else ''}"
    if not names:
        return f"{line}; every ratio is settled to {cell['tolerance']:.0%}."
    if number < LEAST_PASSES:
        return f"{line}, too few to tell whether ratios are settled."
    return f"{line}; not settled to {cell['tolerance']:.0%}: {', '.join(names)}."


def _noise(cell: dict[str, Any]) -> Iterator[str]:
    """Warn of passes that differ, and of what can't be."""
    plain, *others = cell["methods"]
    differ = [plain["name"]] if _differs(plain["round_seconds"], plain["round_seconds_range"]) else []
    differ += [
        method["name"]
        for method in others
        if any(_differs(rates["speedup"], rates["speedup_range"]) for rates in _rates(method))
        or _differs(method["round_cost"], method["round_cost_range"])
    ]
    if differ:
        yield (
            f"WARNING: passes differ by more than {MUCH:.0%}: {', '.join(differ)}. Trust no ratio further than its "
            "range; measure on a quieter machine, or in more passes."
        )
    if names := [method["name"] for method in others if method["is_too_noisy"]]:
        yield (
            f"WARNING: the machine was too noisy for {', '.join(names)}: a round took far less than a plain step, and "
            "a forward of the target is in both. Measure again, with nothing else running."
        )


def _differs(value: float | None, ends: list[float] | None) -> bool:
    return value is not None and ends[1] - ends[0] > MUCH * value


def _left_out(cell: dict[str, Any]) -> list[str]:
    return [f"Left out: {entry['name']}: {entry['reason']}." for entry in cell["left_out"]]


def _divergences(cell: dict[str, Any]) -> Iterator[str]:
    for method in cell["methods"]:
        for found in method.get("divergences", [])[:1]:
            gap = "no second token" if found["logit_gap"] is None else f"a logit gap of {found['logit_gap']:.4g}"
            yield (
                f"{method['name']}: {method['num_rows'] - method['num_equal']} answers differ, the first after "
                f"{found['step']} tokens at {gap}."
            )


def _counts(report: dict[str, Any]) -> Iterator[str]:
    for count in report["divergences"]:
        mode = "greedy" if count["temperature"] == 0 else f"T = {count['temperature']:g}"
        line = f"{count['name']}, {mode}: {count['num_different']} of {count['num_generations']} generations differ"
        gaps = [found["logit_gap"] for found in count["divergences"] if found["logit_gap"] is not None]
        if gaps:
            line += f", logit gaps {min(gaps):.4g} to {max(gaps):.4g}, median {median(gaps):.4g}"
        yield line + f" ({count['num_tokens']} tokens)."
