"""`transformers-msd train`: train a draft by a recipe."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers_msd.cli.options import check_fields


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "train",
        add_help=False,
        help="train a draft by a recipe",
        description="Train a draft by a recipe. Every field of `DraftArguments` and `MSDTrainingConfig` is an option, "
        "too, and stronger than the recipe; options of `accelerate launch` may stand in both.",
    )
    parser.add_argument("--config", help="recipe: a YAML file, or `org/repo` or `org/repo:file.yaml` on the Hub")
    parser.add_argument("--dry_run", action="store_true", help="print steps, tokens, memory and sizes, and stop")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and every field with its default")
    parser.set_defaults(run=run, takes_rest=True, print_help=parser.print_help)


def run(arguments: argparse.Namespace) -> None:
    """Launch the processes of the run, or print its plan."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from transformers_msd.trainer import run as training
    from transformers_msd.trainer.checkpoints import check_whole
    from transformers_msd.trainer.configuration import MSDTrainingConfig
    from transformers_msd.trainer.progress import keep_bars_out_of_logs
    from transformers_msd.trainer.recipe import DraftArguments, check_hub_recipe, find_recipe

    if arguments.help:
        arguments.print_help()
        print(training.make_parser().format_help())
        return
    options = arguments.rest
    if arguments.config:
        path = find_recipe(arguments.config)
        if path != arguments.config:
            check_hub_recipe(path, options)
        options = ["--config", path, *options]
    check_fields(
        options,
        [DraftArguments, MSDTrainingConfig],
        "field of `DraftArguments` or `MSDTrainingConfig`, and no option of `accelerate launch`",
        others=["accelerate_config", *vars(launch_command_parser().parse_args(["module"]))],
    )
    *parsed, of_recipe, of_line = training.make_parser().parse_args_and_config(
        options, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_options = resolve_accelerate_config_argument(of_recipe + of_line)
    launch, unknown = launch_command_parser().parse_known_args([*launch_options, "module"])
    if unknown or launch.training_script != "module":
        raise ValueError(
            f"Options of `accelerate launch` must have values it can read, got {unknown or launch_options}."
        )
    parsed[0].check_places()
    checkpoint = training.checkpoint_of(parsed[1])
    if isinstance(checkpoint, str):
        check_whole(checkpoint)
    if arguments.dry_run:
        keep_bars_out_of_logs()
        print(training.plan(*parsed, num_processes=launch.num_processes or 1))
        return
    if launch.num_cpu_threads_per_process is None:
        # Accelerate would give each process one thread, also where it trains on them.
        every = max((os.cpu_count() or 1) // (launch.num_processes or 1), 1)
        threads = os.environ.get("OMP_NUM_THREADS", every)
        launch_options = ["--num_cpu_threads_per_process", str(threads), *launch_options]
    script_options = _without(options, of_line)
    command = [*launch_options, "--module", "transformers_msd.trainer.run", *script_options]
    try:
        with children_end_with_us():
            launch_command(launch_command_parser().parse_args(command))
    except subprocess.CalledProcessError as error:  # the process has said why
        sys.exit(error.returncode)


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """Pass SIGTERM on to the processes that were launched, which else would go on alone."""
    import psutil

    def end(*args: Any) -> NoReturn:
        for child in psutil.Process().children(recursive=True):
            child.terminate()
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _without(options: list[str], removed: list[str]) -> list[str]:
    """Return the options without those that are for the launcher, which stand among them in the same order."""
    rest, kept = list(removed), []
    for option in options:
        if rest and option == rest[0]:
            rest.pop(0)
        else:
            kept.append(option)
    return kept
