"""The command `transformers-msd`."""

import argparse
import sys

from transformers_msd.cli import bench, check_parity, convert, generate_data, train, tune


def main(arguments: list[str] | None = None) -> None:
    """Run the sub-command named by the arguments, those of the process by default."""
    parser = argparse.ArgumentParser(prog="transformers-msd", description="Drafts for vision-language models.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in (train, generate_data, check_parity, convert, tune, bench):
        command.add_parser(subparsers)
    parsed, parsed.rest = parser.parse_known_args(arguments)
    if parsed.rest and not getattr(parsed, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(parsed.rest)}")
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        sys.exit(f"transformers-msd: {error}")
