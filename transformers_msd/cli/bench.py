"""`transformers-msd bench`: measure methods of decoding side by side."""

import argparse
import shlex
import sys
from pathlib import Path

from transformers.utils import logging

from transformers_msd.cli.options import check_fields


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command; `--help` lists the fields of its settings."""
    parser = subparsers.add_parser("bench", help="measure drafts and baselines side by side", add_help=False)
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and save."""
    from rich.console import Console
    from rich.progress import Progress

    from transformers_msd.bench.report import print_report, save_report
    from transformers_msd.bench.run import run_benchmark
    from transformers_msd.bench.settings import BenchArguments
    from transformers_msd.trainer.run import RecipeParser

    parser = RecipeParser([BenchArguments], prog="transformers-msd bench", allow_abbrev=False)
    check_fields(arguments.rest, [BenchArguments], "field of `BenchArguments`")
    (settings,) = parser.parse_args_and_config(arguments.rest)
    command = f"transformers-msd bench {shlex.join(arguments.rest)}"
    logging.disable_progress_bar()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("loading", total=None)
        report = run_benchmark(
            settings,
            command,
            lambda label, number, total: progress.update(task, description=label, completed=number, total=total),
        )
    if settings.output:
        save_report(report, Path(settings.output))
    # A file has no width.
    print_report(report, Console(width=None if sys.stdout.isatty() else 160))
    if settings.output:
        print(f"Written to {settings.output}.")
