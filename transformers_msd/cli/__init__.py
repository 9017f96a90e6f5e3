"""The command `transformers-msd`."""

import argparse
import sys

from transformers_msd.cli import convert


def main(arguments: list[str] | None = None) -> None:
    """Run the sub-command named by the arguments, those of the process by default."""
    parser = argparse.ArgumentParser(prog="transformers-msd", description="Drafts for vision-language models.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in (convert,):
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        sys.exit(f"transformers-msd: {error}")
