"""Reports in a folder: written as they grow, and gone on with."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import transformers_msd
from transformers_msd.bench.plots import plot_acceptance, plot_speedups, plot_split
from transformers_msd.bench.report import to_markdown
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.costs.provenance import commit, hardware
from transformers_msd.models.places import check_output


# What may differ between two calls that go on with each other: which comparisons, and where they are written.
FREE = ("temperatures", "batch_sizes", "output")


def origin(arguments: BenchArguments) -> dict[str, Any]:
    """Say where figures come from, in what has to be the same for two to stand in one report."""
    return {
        "hardware": hardware(torch.device(arguments.device)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_msd": transformers_msd.__version__,
        "commit": commit(),
    }


def save_report(report: dict[str, Any], folder: Path, has_plots: bool = True) -> None:
    """Write `bench.json` and `bench.md`, and the plots where they are wanted and anything was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "bench.json.unfinished"
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(folder / "bench.json")  # whole or not there
    (folder / "bench.md").write_text(to_markdown(report))
    if has_plots and report["cells"]:
        plot_speedups(report, folder / "speedup.png")
        plot_acceptance(report, folder / "acceptance_by_depth.png")
        plot_split(report, folder / "time_split.png")


def find_report(folder: Path, arguments: BenchArguments) -> dict[str, Any] | None:
    """
    Read the report that a call goes on with, None where there is none.

    Args:
        folder (`Path`):
            Where reports are written.
        arguments ([`BenchArguments`]):
            Settings of the call.

    Raises:
        ValueError: If the folder holds a report of other settings, or of another machine or version, or no report.
    """
    check_output(folder, "output")
    path = folder / "bench.json"
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
        found = [*_differences(report["settings"], asdict(arguments)), *_differences(report, origin(arguments))]
        num_cells = len(report["cells"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"`output` must be a new folder, or hold a report, got {path}, which is none.") from None
    if found:
        raise ValueError(
            f"`output` must be a new folder, or hold a report of the same settings, got {folder} with {num_cells} "
            f"comparisons measured otherwise: {'; '.join(found)}. Name another folder, or remove {path}."
        )
    return report


def _differences(found: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    for name, value in own.items():
        if name not in FREE and found.get(name) != value:
            yield f"`{name}` was {found.get(name)!r}, and is {value!r}"


def is_measured(report: dict[str, Any], temperature: float, batch_size: int) -> bool:
    """Tell whether a report has a comparison."""
    return any((cell["temperature"], cell["batch_size"]) == (temperature, batch_size) for cell in report["cells"])


def is_whole(report: dict[str, Any], arguments: BenchArguments) -> bool:
    """Tell whether a report has all that a call asks for."""
    counted = arguments.temperatures if arguments.num_divergences else []
    return set(counted) <= set(report["counted_temperatures"]) and all(
        is_measured(report, temperature, batch_size)
        for temperature in arguments.temperatures
        for batch_size in arguments.batch_sizes
    )
