"""`transformers-msd trace`: answer one prompt, and show every round of it as a page."""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from transformers_msd import NgramDrafter, speculative_trace
from transformers_msd.cli.options import positive
from transformers_msd.drafters.loading import check_fits, load_assistant
from transformers_msd.models.places import check_place
from transformers_msd.traits.support import is_multimodal


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "trace",
        help="show every round of an answer as a page",
        description="Answer one prompt, and write what every round did into one file that any browser shows: the tree "
        "that was drafted, which of its tokens the target took, and where the time went.",
    )
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--draft_model", help="draft of any kind, or a VLM or language model; n-grams without one")
    parser.add_argument("--image", type=Path, help="a picture to ask about")
    parser.add_argument("--prompt", help="what is asked; without it and a picture, one is drawn where the target sees")
    parser.add_argument("--output", type=Path, default=Path("trace.html"), help="the page, or its data as .json")
    parser.add_argument("--max_new_tokens", type=positive, default=256, help="tokens of the answer at the most")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="temperature of the answer; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of a sampled answer")
    parser.add_argument("--dtype", default="auto", help="dtype both are loaded in")
    parser.add_argument("--device", help="device both run on, CUDA by default if there is one")
    parser.set_defaults(run=run)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or above, got {text}; 0 is greedy")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Answer, write, and print."""
    from transformers_msd.bench.models import load_model
    from transformers_msd.trainer.loading import check_dtype, device_of, encode_prompts, load_processor
    from transformers_msd.trainer.progress import keep_bars_out_of_logs

    check_dtype(arguments.dtype, "dtype")
    device = device_of(arguments.device)
    for name in ("target_model", "draft_model"):
        if getattr(arguments, name) is not None:
            check_place(getattr(arguments, name), name)
    if arguments.image is not None and not arguments.image.is_file():
        raise ValueError(f"`image` must be a picture's file, got {str(arguments.image)!r}, where nothing is.")
    if arguments.output.is_dir() or not arguments.output.absolute().parent.is_dir():
        raise ValueError(
            f"`output` must be a file in a folder that exists, got {arguments.output}. Make the folder, or "
            "name a file in it."
        )
    if arguments.draft_model is not None:
        check_fits(arguments.draft_model, arguments.target_model)
    keep_bars_out_of_logs()
    sees = is_multimodal(AutoConfig.from_pretrained(arguments.target_model))
    messages, pictures = _ask(arguments.prompt, arguments.image, sees)
    processor = load_processor(arguments.target_model)
    inputs = encode_prompts(processor, [messages]).to(device)
    target = load_model(arguments.target_model, arguments.dtype, device)
    assistant = NgramDrafter()
    if arguments.draft_model is not None:
        assistant = load_assistant(arguments.draft_model, target)
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature:
        settings |= {"temperature": arguments.temperature, "top_k": 0, "top_p": 1.0}
    target.generate(**inputs, **settings | {"max_new_tokens": 8}, assistant_model=assistant)  # warms up
    torch.manual_seed(arguments.seed)
    with speculative_trace(processor, pictures) as trace:
        output = target.generate(**inputs, **settings, assistant_model=assistant, return_dict_in_generate=True)
    trace.save(arguments.output)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"{output.speculative_stats.mean_acceptance_length:.2f} tokens a round. Written to {arguments.output}.")


def _ask(prompt: str | None, image: Path | None, sees: bool) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Make the messages of a prompt, and its pictures."""
    from trl.data_utils import prepare_multimodal_messages

    from transformers_msd.bench.prompts import builtin_prompts, draw_picture

    if image is not None and not sees:
        raise ValueError(f"`image` must be left out for a target that reads text alone, got {image}.")
    pictures = []
    if image is not None:
        pictures = [Image.open(image).convert("RGB")]
    elif prompt is None and sees:
        pictures = [draw_picture(0)]
    if not sees:
        return ([{"role": "user", "content": prompt}] if prompt else builtin_prompts(False)[0]), []
    text = {"type": "text", "text": prompt or "Describe this picture in detail."}
    content = [*({"type": "image"} for _ in pictures), text]
    return prepare_multimodal_messages([{"role": "user", "content": content}], images=pictures), pictures
