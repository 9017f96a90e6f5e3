"""`transformers-msd check-parity`: does the decoder feed a draft what training fed it?"""

import argparse
import sys

from transformers import ProcessorMixin

from transformers_msd.cli.options import positive


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("check-parity", help="does the decoder feed a draft what training fed it?")
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--draft_model", help="folder or Hub repository of the draft; a random one by default")
    parser.add_argument("--datasets", nargs="+", required=True, help="as in recipes: folders, files or Hub datasets")
    parser.add_argument("--dataset_split", default="train", help="split of Hub datasets")
    parser.add_argument("--image_folder", help="folder that paths of pictures are relative to")
    parser.add_argument("--num_rows", type=positive, default=4, help="rows of text, and with pictures, to compare")
    parser.add_argument("--dtype", default="float32", help="dtype the target is loaded in")
    parser.add_argument("--device", help="device both run on, CUDA by default if there is one")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference that is let pass")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print, and exit with 1 where training and decoding differ."""
    from transformers_msd.trainer.callbacks import prompt_of
    from transformers_msd.trainer.loading import device_of, encode_prompts
    from transformers_msd.trainer.parity import check_parity, has_equal_prompt
    from transformers_msd.trainer.progress import keep_bars_out_of_logs
    from transformers_msd.trainer.recipe import DraftArguments, check_draft, load_target, make_draft
    from transformers_msd.trainer.rows import draw, load_rows

    names = ("target_model", "draft_model", "datasets", "dataset_split", "image_folder", "dtype")
    recipe = DraftArguments(**{name: getattr(arguments, name) for name in names})
    keep_bars_out_of_logs()
    device = device_of(arguments.device)
    check_draft(recipe)
    target, processor = load_target(recipe)
    draft = make_draft(recipe, target.config).to(device, target.dtype).eval()
    target = target.to(device).eval()
    rows = load_rows(recipe, isinstance(processor, ProcessorMixin))
    rows = rows.select(draw(rows, arguments.num_rows, seed=0))
    holds = True
    for row in rows:
        inputs = encode_prompts(processor, [prompt_of(row)]).to(device)
        parity = check_parity(target, draft, inputs)
        equal_prompt = has_equal_prompt(processor, row, inputs["input_ids"].cpu())
        print(parity if equal_prompt else f"{parity}: training begins the row with other tokens than its prompt's")
        holds &= parity.holds(arguments.tolerance) and equal_prompt
    print("Training and decoding feed the draft the same." if holds else "Training and decoding differ.")
    sys.exit(not holds)
