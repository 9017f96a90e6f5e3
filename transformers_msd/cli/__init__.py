"""The command `transformers-msd`."""

import argparse
import os
import sys

import torch
import transformers

from transformers_msd import __version__
from transformers_msd.cli import bench, check_parity, convert, generate_data, serve, trace, train, tune
from transformers_msd.cli.options import CommandParser


# What commands need besides the package itself.
_EXTRAS = {"bench": "bench", "serve": "serve"} | dict.fromkeys(
    ("check-parity", "convert", "generate-data", "trace", "train", "tune"), "train"
)


def main(arguments: list[str] | None = None) -> None:
    """Run the sub-command named by the arguments, those of the process by default."""
    parser = argparse.ArgumentParser(prog="transformers-msd", description="Drafts for vision-language models.")
    parser.add_argument("--version", action="version", version=_versions())
    subparsers = parser.add_subparsers(required=True, metavar="command", dest="command", parser_class=CommandParser)
    for command in (train, generate_data, check_parity, convert, tune, bench, trace, serve):
        command.add_parser(subparsers)
    parsed, parsed.rest = parser.parse_known_args(
        [_underscored(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    )
    if parsed.rest and not getattr(parsed, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(parsed.rest)}")
    try:
        parsed.run(parsed)
    except ModuleNotFoundError as error:
        if error.name is None:  # a package of another's that says itself what it lacks
            sys.exit(f"transformers-msd: {' '.join(str(error).split())}")
        name = error.name.partition(".")[0]
        if name == "transformers_msd":
            raise
        extra = _EXTRAS.get(parsed.command, "bench")
        install = f"`pip install 'transformers-msd[{extra}]'`, or '.[{extra}]' in a clone"
        sys.exit(f"transformers-msd: {name} is missing: {install}.")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"transformers-msd: {' '.join(str(error).split())}")


def _underscored(argument: str) -> str:
    """Write the name of an option with underscores, as all of them are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _versions() -> str:
    packages = (("torch", torch.__version__), ("Transformers", transformers.__version__))
    return f"transformers-msd {__version__}, " + ", ".join(f"{name} {own}" for name, own in packages)
