"""`transformers-msd bench`: measure methods of decoding side by side."""

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from transformers_msd.cli.options import check_fields


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command; `--help` lists the fields of its settings."""
    parser = subparsers.add_parser("bench", help="measure drafts and baselines side by side", add_help=False)
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and save."""
    from rich.console import Console

    from transformers_msd.bench.report import print_report, save_report
    from transformers_msd.bench.run import run_benchmark
    from transformers_msd.bench.settings import BenchArguments
    from transformers_msd.trainer.progress import Progress, keep_bars_out_of_logs
    from transformers_msd.trainer.run import RecipeParser

    parser = RecipeParser([BenchArguments], prog="transformers-msd bench", allow_abbrev=False)
    check_fields(arguments.rest, [BenchArguments], "field of `BenchArguments`")
    (settings,) = parser.parse_args_and_config(arguments.rest)
    command = f"transformers-msd bench {shlex.join(arguments.rest)}"
    keep_bars_out_of_logs()
    with ExitStack() as stack:
        progress: list[Progress] = []

        def on_run(label: str, number: int, total: int) -> None:
            if not progress:  # what is compared is known when the models are loaded
                progress.append(stack.enter_context(Progress("run", total, start=number)))
            progress[0].update(number, label)

        report = run_benchmark(settings, command, on_run)
    if settings.output:
        save_report(report, Path(settings.output))
    # A file has no width.
    print_report(report, Console(width=None if sys.stdout.isatty() else 160))
    if settings.output:
        print(f"Written to {settings.output}.")
