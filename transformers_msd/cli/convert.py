"""`transformers-msd convert`: turn a published MSD checkpoint into a draft folder."""

import argparse

from transformers import AutoConfig

from transformers_msd.models.msd.convert_msd import convert_msd_checkpoint
from transformers_msd.models.places import check_place


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("convert", help="turn a published MSD checkpoint into a draft folder")
    parser.add_argument("checkpoint", help="folder or Hub repository of the published checkpoint")
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--output", required=True, help="folder to write the draft to")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert and save."""
    check_place(arguments.target_model, "target_model")
    draft = convert_msd_checkpoint(arguments.checkpoint, AutoConfig.from_pretrained(arguments.target_model))
    draft.save_pretrained(arguments.output)
    print(f"Wrote a draft of {draft.num_parameters():,} parameters to {arguments.output}.")
