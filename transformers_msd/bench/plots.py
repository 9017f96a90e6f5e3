"""Plots of a benchmark."""

from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transformers_msd.bench.methods import COMPILED_PLAIN, PLAIN
from transformers_msd.bench.report import step_time


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c564b", "#7f7f7f")
MARKERS = "osD^vP*Xh"
PHASE_COLOURS = {"draft": "#56b4e9", "verify": "#0072b2", "commit": "#009e73", "rest": "#b0b0b0"}


def plot_speedups(report: dict[str, Any], path: Path) -> None:
    """Draw the speed-up of decoding by τ, one panel for each temperature and batch size."""
    figure, panels = _panels(report, "Speed-up of decoding by acceptance length; bars: range over the passes")
    styles = _styles(report)
    for cell, axes in panels:
        for method in cell["methods"]:
            tau, rates = method["acceptance_length"], method["decode"]
            if tau is None or method["is_too_noisy"]:
                continue
            low, high = rates["speedup_range"]
            speedup = rates["speedup"]
            # The median of a ratio may lie outside its range by a little.
            spread = [[max(speedup - low, 0)], [max(high - speedup, 0)]]
            axes.errorbar(tau, speedup, yerr=spread, capsize=3, linestyle="none", **styles[method["name"]])
        axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
        axes.set(xlabel="acceptance length τ, tokens per round", ylabel="speed-up, times plain generate")
        axes.margins(0.1)
        axes.set(xlim=(0, None), ylim=(0, None))
    _save(figure, panels, path)


def plot_acceptance(report: dict[str, Any], path: Path) -> None:
    """Draw the share of rounds that accept tokens to each depth."""
    figure, panels = _panels(report, "Drafted tokens that are accepted, by their depth")
    styles = _styles(report)
    for cell, axes in panels:
        curves = [(method["name"], method["acceptance_by_depth"]) for method in cell["methods"]]
        for number, (name, shares) in enumerate(curves):
            if shares:
                # Wider than the same curve of a later method, which is drawn over it.
                more = sum(shares == later for _, later in curves[number + 1 :])
                width = {"linewidth": 1.5 + 3 * more, "markersize": 6 + 4 * more}
                axes.plot(range(1, len(shares) + 1), shares, **styles[name], **width)
        axes.set(xlabel="depth, drafted tokens", ylabel="share of rounds that accept it", ylim=(0, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _save(figure, panels, path)


def plot_split(report: dict[str, Any], path: Path) -> None:
    """Draw the time of a round by its phases beside that of a plain step, eager and compiled."""
    rows = max(len(_split_methods(cell)) + len(_steps(cell)) for cell in report["cells"])
    title = "Time of a round by its phases; in plain steps beside the bars"
    figure, panels = _panels(report, title, height=1.2 + 0.42 * rows, width=7.5)
    for cell, axes in panels:
        steps, methods = _steps(cell), _split_methods(cell)
        bars = [({"plain step": 1.0}, {"plain step": "#d55e00"}) for _ in steps]
        bars += [(method["split_seconds"], PHASE_COLOURS) for method in methods]
        for place, (method, (seconds, colours)) in enumerate(zip((*steps, *methods), bars, strict=True)):
            # What is left can be a little below nothing on a noisy machine.
            widths = {phase: max(seconds[phase], 0.0) for phase in colours}
            # Phases are timed in runs of their own: here they divide a round as it takes without.
            scale = method["round_seconds"] * 1e3 / sum(widths.values())
            start = 0.0
            for phase, colour in colours.items():
                width = widths[phase] * scale
                axes.barh(place, width, left=start, color=colour, label=phase, height=0.65)
                start += width
            if place > 0:
                cost = "too noisy" if method["is_too_noisy"] else f"{method['round_cost']:.2f} steps"
                axes.text(start, place, f" {cost}", va="center", fontsize=8)
        names = [method["name"] for method in (*steps, *methods)]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="time of a round or plain step, ms")
        # Room for the text behind the longest bar.
        axes.set_xlim(0, 1.3 * axes.dataLim.x1)
    _save(figure, panels, path)


def _steps(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [method for method in cell["methods"] if method["name"] in (PLAIN.name, COMPILED_PLAIN)]


def _split_methods(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [method for method in cell["methods"] if method["split_seconds"]]


def _panels(
    report: dict[str, Any], title: str, height: float = 4.0, width: float = 5.5
) -> tuple[Figure, list[tuple[dict[str, Any], Axes]]]:
    """Make a figure of a title, and of a panel for each cell, in rows of one temperature."""
    cells = report["cells"]
    num_columns = len({cell["batch_size"] for cell in cells})
    num_rows = -(-len(cells) // num_columns)
    size = (width * num_columns, height * num_rows + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    about = f"{report['target']}, {report['dtype']}, {report['hardware']}"
    num_letters = int(14 * size[0])  # of a line, at this size
    figure.suptitle("\n".join(fill(text, num_letters) for text in (title, about)), fontsize=9)
    all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in all_axes[len(cells) :]:  # of a report that is not finished
        axes.set_visible(False)
    panels = list(zip(cells, all_axes, strict=False))
    for cell, axes in panels:
        axes.set_title(f"{cell['label']}; plain step, ms: {step_time(cell['methods'][0])}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def _styles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give each method one look in all panels; simulated ones are hollow."""
    methods = {method["name"]: method for cell in report["cells"] for method in cell["methods"]}
    styles = {}
    for number, (name, method) in enumerate(methods.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}
        styles[name] = style | {"label": name} | ({"markerfacecolor": "white"} if method["is_simulated"] else {})
    return styles


def _save(figure: Figure, panels: list[tuple[dict[str, Any], Axes]], path: Path) -> None:
    """Add one legend for all panels below them, and write the file."""
    entries = {
        label: handle for _, axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    # In inches, at the legend's size of letters.
    width = 0.7 + 0.075 * max(map(len, entries), default=0)
    num_columns = max(1, min(len(entries), int(figure.get_figwidth() // width)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=num_columns, fontsize=8)
    figure.savefig(path, dpi=120)
