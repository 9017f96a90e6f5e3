"""`transformers-msd tune`: measure what rounds cost here, so that trees are sized by it."""

import argparse
from itertools import count

from transformers_msd import MSDDraftModel, VLMDrafter
from transformers_msd.cli.options import positive
from transformers_msd.costs.calibration import save_costs
from transformers_msd.models.places import check_place
from transformers_msd.tuning import SIZES, measure_costs, num_calls


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "tune",
        help="measure what rounds cost on this machine",
        description="Measure the target's time for verifying trees and the draft's time for growing them. Calls of "
        "this pair on this machine then draft where it pays by it, and with one prompt choose the size of every tree.",
    )
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--draft_model", required=True, help="an MSD draft, or a VLM or language model")
    parser.add_argument("--dtype", default="auto", help="dtype both are loaded in")
    parser.add_argument("--device", help="device both run on, CUDA by default if there is one")
    parser.add_argument("--prompt_length", type=positive, default=256, help="tokens of the prompt")
    parser.set_defaults(run=run)


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
    target = load_model(arguments.target_model, arguments.dtype, device)
    draft = load_model(arguments.draft_model, arguments.dtype, device)
    assistant = draft if isinstance(draft, MSDDraftModel) else VLMDrafter(draft)
    measured, numbers = [], count(1)
    with Progress("call", sum(map(num_calls, SIZES))) as progress:
        for batch_size in SIZES:
            about = f"batch size {batch_size}"
            measured.append(
                measure_costs(
                    *(target, assistant, arguments.prompt_length, batch_size),
                    on_call=lambda about=about: progress.update(next(numbers), about),
                )
            )
    path = save_costs(measured, [draft], target)
    for costs in measured:
        print(f"With {costs.batch_size} prompts at a time:" if costs.batch_size > 1 else "With one prompt:")
        print(f"A plain step takes {costs.step * 1e3:.2f} ms, a further level of a tree {costs.level * 1e3:.2f} ms.")
        for num_nodes, seconds in zip(costs.num_nodes, costs.rounds, strict=True):
            print(f"A round of {num_nodes:3} nodes in {costs.depth} levels: {seconds * 1e3:.2f} ms")
    print(f"Written to {path}.")
