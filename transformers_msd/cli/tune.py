"""`transformers-msd tune`: measure what rounds cost here, so that trees are sized by it."""

import argparse
from itertools import accumulate, count

import torch

from transformers_msd import VLMDrafter
from transformers_msd.cli.options import positive
from transformers_msd.costs.calibration import conditions, costs_path, read_costs, save_costs
from transformers_msd.costs.rounds import Costs
from transformers_msd.drafters.loading import check_fits, is_published, load_draft
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.places import check_place
from transformers_msd.tuning import MAX_PASSES, NUM_PASSES, SIZES, TOLERANCE, measure_costs, num_calls


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "tune",
        help="measure what rounds cost on this machine",
        description="Measure the target's time for verifying trees and the draft's time for growing them. Calls of "
        "this pair on this machine then draft where it pays by it, and with one prompt choose the size of every tree. "
        f"All trees are measured in turn, in {NUM_PASSES} to {MAX_PASSES} passes, until every round is settled as a "
        "ratio to a plain step: the interquartile range of the ratio in single passes, over the square root of their "
        "number, is at most `--tolerance` of its median. Where that is not reached, nothing is stored.",
    )
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--draft_model", required=True, help="a draft, whoever published it, or a small model")
    parser.add_argument("--dtype", default="auto", help="dtype both are loaded in, the target's by default")
    parser.add_argument("--device", help="device both run on, CUDA by default if there is one")
    parser.add_argument("--prompt_length", type=positive, default=256, help="tokens of the prompt")
    parser.add_argument("--tolerance", type=_share, default=TOLERANCE, help="share by which ratios may be uncertain")
    parser.add_argument("--show", action="store_true", help="measure nothing: print what is stored, and where")
    parser.add_argument("--forget", action="store_true", help="measure nothing: remove what is stored")
    parser.set_defaults(run=run)


def _share(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}; 0.05 is 5 per cent")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Measure, save, and print."""
    from transformers_msd.bench.models import load_model
    from transformers_msd.trainer.loading import check_dtype, device_of
    from transformers_msd.trainer.progress import Progress, keep_bars_out_of_logs

    check_dtype(arguments.dtype, "dtype")
    device = device_of(arguments.device)
    for name in ("target_model", "draft_model"):
        check_place(getattr(arguments, name), name)
    keep_bars_out_of_logs()
    if arguments.show or arguments.forget:
        _look(arguments, torch.device(device))
        return
    check_fits(arguments.draft_model, arguments.target_model)
    target = load_model(arguments.target_model, arguments.dtype, device)
    draft = load_draft(arguments.draft_model, target)
    assistant = draft if isinstance(draft, FeatureDraftModel) else VLMDrafter(draft)
    measured: list[Costs] = []
    ends = list(accumulate(map(num_calls, SIZES), initial=0))
    with Progress("call", ends[-1]) as progress:
        for start, batch_size in zip(ends, SIZES, strict=False):
            about, numbers = f"batch size {batch_size}", count(start + 1)
            measured.append(
                measure_costs(
                    *(target, assistant, arguments.prompt_length, batch_size),
                    on_call=lambda about=about, numbers=numbers: progress.update(next(numbers), about),
                    tolerance=arguments.tolerance,
                )
            )
    path = save_costs(measured, [draft], target)
    _print_costs(measured)
    print(f"Written to {path}.")


def _look(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print, or remove, what is stored for a pair."""
    from transformers_msd.bench.models import outline_model

    target = outline_model(arguments.target_model, arguments.dtype)
    name = arguments.draft_model
    draft = load_draft(name, target) if is_published(name) else outline_model(name, arguments.dtype)
    path = costs_path([draft], target, device)
    pair = f"{arguments.draft_model} and {arguments.target_model}, {', '.join(conditions(target, device))}"
    if not path.exists():
        print(f"Nothing is stored for {pair}: {path} would hold it.")
        return
    if arguments.show:
        print(f"Stored for {pair}:")
        _print_costs(read_costs(path))
        print(f"Stored in {path}.")
    if arguments.forget:
        path.unlink()
        print(f"Removed {path}.")


def _print_costs(measured: list[Costs]) -> None:
    for costs in measured:
        print(f"With {costs.batch_size} prompts at a time:" if costs.batch_size > 1 else "With one prompt:")
        print(f"A plain step takes {costs.step * 1e3:.2f} ms, a further level of a tree {costs.level * 1e3:.2f} ms.")
        for num_nodes, seconds in zip(costs.num_nodes, costs.rounds, strict=True):
            ratio = f"{seconds / costs.step:.2f} plain steps"
            print(f"A round of {num_nodes:3} nodes in {costs.depth} levels: {seconds * 1e3:.2f} ms, {ratio}")
        if costs.uncertainty is not None:
            print(f"Ratios are uncertain by {costs.uncertainty:.1%} at the most.")
