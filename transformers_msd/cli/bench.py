"""`transformers-msd bench`: measure methods of decoding side by side."""

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers_msd.cli.options import check_fields


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command; `--help` lists the fields of its settings."""
    parser = subparsers.add_parser("bench", help="measure drafts and baselines side by side", add_help=False)
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and save."""
    from rich.console import Console

    from transformers_msd.bench.report import print_report
    from transformers_msd.bench.run import run_benchmark
    from transformers_msd.bench.saved import find_report, is_whole, save_report
    from transformers_msd.bench.settings import BenchArguments
    from transformers_msd.trainer.progress import Progress, keep_bars_out_of_logs
    from transformers_msd.trainer.run import RecipeParser

    parser = RecipeParser([BenchArguments], prog="transformers-msd bench", allow_abbrev=False)
    check_fields(arguments.rest, [BenchArguments], "field of `BenchArguments`")
    (settings,) = parser.parse_args_and_config(arguments.rest)
    command = f"transformers-msd bench {shlex.join(arguments.rest)}"
    keep_bars_out_of_logs()
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no width
    folder = Path(settings.output) if settings.output else None
    before = None if folder is None else find_report(folder, settings)
    if before is not None:
        print(f"{folder} holds {_comparisons(before)} of these settings.", file=sys.stderr)
        if is_whole(before, settings):
            print_report(before, console)
            print(f"Nothing is left to measure. Remove {folder / 'bench.json'} to measure again.")
            return
    report: dict[str, Any] | None = None

    def on_cell(measured: dict[str, Any]) -> None:
        nonlocal report
        report = measured
        if folder is not None:
            save_report(measured, folder, has_plots=False)

    try:
        with ExitStack() as stack:
            progress: list[Progress] = []

            def on_run(label: str, number: int, total: int) -> None:
                if not progress:  # what is compared is known when the models are loaded
                    progress.append(stack.enter_context(Progress("run", total, start=number)))
                progress[0].update(number, label)

            report = run_benchmark(settings, command, on_run, on_cell, before)
    except BaseException:
        if report is not None:
            print_report(report, console)
            where = "nowhere: no `output` was given" if folder is None else f"{folder}; the same command goes on"
            print(f"Stopped after {_comparisons(report)}, written to {where}.", file=sys.stderr)
        raise
    if folder is not None:
        save_report(report, folder)
    print_report(report, console)
    if folder is not None:
        print(f"Written to {folder}.")


def _comparisons(report: dict[str, Any]) -> str:
    number = len(report["cells"])
    return f"{number} comparison{'' if number == 1 else 's'}"
