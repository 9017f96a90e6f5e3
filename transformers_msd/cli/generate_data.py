"""`transformers-msd generate-data`: let the target answer the prompts of a dataset."""

import argparse
from pathlib import Path

from transformers import ProcessorMixin

from transformers_msd import attach
from transformers_msd.cli.options import positive
from transformers_msd.drafters.loading import check_fits, load_assistant
from transformers_msd.models.places import check_output, check_place


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "generate-data",
        help="let the target answer the prompts of a dataset",
        description="Let the target answer the prompts of a dataset. An interrupted run goes on where it stopped; "
        "under `accelerate launch -m transformers_msd.cli generate-data ...` the processes share the rows.",
    )
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--draft_model", help="draft of any kind, or a VLM or language model: sooner, the same")
    parser.add_argument("--datasets", nargs="+", required=True, help="as in recipes: folders, files or Hub datasets")
    parser.add_argument("--dataset_split", default="train", help="split of Hub datasets")
    parser.add_argument("--image_folder", help="folder that paths of pictures are relative to")
    parser.add_argument("--output", type=Path, required=True, help="folder to save the dataset to")
    parser.add_argument("--num_rows", type=positive, help="answer only so many rows")
    parser.add_argument("--dtype", default="auto", help="dtype the target is loaded in")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts answered together")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--rows_per_chunk", type=int, default=256, help="rows saved together")
    parser.add_argument("--device", help="device it runs on, CUDA by default if there is one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Generate and save."""
    from accelerate import PartialState

    from transformers_msd.trainer.generation import GenerationSettings, generate_data
    from transformers_msd.trainer.loading import device_of
    from transformers_msd.trainer.progress import keep_bars_out_of_logs
    from transformers_msd.trainer.recipe import DraftArguments, load_target
    from transformers_msd.trainer.rows import load_rows

    check_output(arguments.output, "output")
    if arguments.draft_model is not None:
        for name in ("target_model", "draft_model"):
            check_place(getattr(arguments, name), name)
        check_fits(arguments.draft_model, arguments.target_model)
    keep_bars_out_of_logs()
    settings = GenerationSettings(
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        rows_per_chunk=arguments.rows_per_chunk,
    )
    state = PartialState(cpu=arguments.device == "cpu")
    if state.num_processes > 1 and arguments.device not in (None, "cpu"):
        raise ValueError(
            f"`device` must be left out or `cpu` where processes share the rows, got {arguments.device!r}: each has a "
            "device of its own. Remove it."
        )
    device = state.device if arguments.device is None else device_of(arguments.device)
    names = ("target_model", "datasets", "dataset_split", "image_folder", "dtype")
    recipe = DraftArguments(**{name: getattr(arguments, name) for name in names})
    target, processor = load_target(recipe)
    rows = load_rows(recipe, isinstance(processor, ProcessorMixin))
    if arguments.num_rows:
        rows = rows.select(range(min(arguments.num_rows, len(rows))))
    target = target.to(device).eval()
    if arguments.draft_model is not None:
        attach(target, load_assistant(arguments.draft_model, target))
    dataset = generate_data(target, processor, rows, arguments.output, settings)
    if dataset is not None:
        print(f"Wrote {len(dataset):,} rows to {arguments.output}.")
