"""Prompts to benchmark with: the user's, a built-in set, or random ones for random weights."""

import math
from itertools import cycle, islice
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import LlavaConfig, PreTrainedConfig
from trl.data_utils import prepare_multimodal_messages

from transformers_msd.bench.settings import BenchArguments
from transformers_msd.trainer.callbacks import prompt_of
from transformers_msd.trainer.loading import is_multimodal
from transformers_msd.trainer.recipe import DraftArguments
from transformers_msd.trainer.rows import load_rows


QUESTIONS = (
    "Describe this picture in detail.",
    "Explain in a few paragraphs how a bicycle stays upright.",
    "Which shapes do you see, in which colours, and where are they?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List everything in this picture from left to right.",
    "Give step-by-step instructions for baking bread.",
    "Write a caption for this picture, then explain your choice.",
    "Compare trains and aeroplanes for a journey of 500 kilometres.",
)
COLOURS = ("crimson", "royalblue", "seagreen", "gold", "darkorange", "purple", "teal", "black")


def load_prompts(arguments: BenchArguments, config: PreTrainedConfig) -> list[list[dict[str, Any]]]:
    """
    Load the prompts of a benchmark, each as its messages, for the target of a config.

    Raises:
        ValueError: If there are none.
    """
    multimodal = is_multimodal(config)
    if not arguments.datasets:
        return builtin_prompts(multimodal)[: arguments.num_rows]
    source = DraftArguments(
        target_model=str(arguments.target_model),
        datasets=arguments.datasets,
        dataset_split=arguments.dataset_split,
        image_folder=arguments.image_folder,
    )
    source.check_places()
    rows = load_rows(source, multimodal)
    if len(rows) == 0:
        raise ValueError(
            f"`datasets` must hold a prompt at least, got none that the target can read in {arguments.datasets}. Name "
            "others."
        )
    return [prompt_of(row) for row in rows.select(range(min(arguments.num_rows, len(rows))))]


def builtin_prompts(multimodal: bool) -> list[list[dict[str, Any]]]:
    """Make the built-in prompts as messages, every other one with a picture where the target sees."""
    prompts = []
    for number, question in enumerate(QUESTIONS):
        if not multimodal:
            prompts.append([{"role": "user", "content": question.replace("this picture", "the view of a harbour")}])
            continue
        images = [draw_picture(number)] if number % 2 == 0 else []
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        prompts.append(prepare_multimodal_messages([{"role": "user", "content": content}], images=images))
    return prompts


def draw_picture(seed: int) -> Image.Image:
    """Draw a picture of five shapes, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (336, 336), "white")
    canvas = ImageDraw.Draw(image)
    for number in range(5):
        x, y, size, colour = (torch.rand(4, generator=generator) * torch.tensor([240, 240, 60, 8])).int().tolist()
        box = (x, y, x + 30 + size, y + 30 + size)
        shape = (canvas.ellipse, canvas.rectangle, canvas.rounded_rectangle)[number % 3]
        shape(box, **({"radius": 12} if number % 3 == 2 else {}), fill=COLOURS[colour])
    return image


def random_prompts(
    config: PreTrainedConfig, num_prompts: int, length: int, dtype: torch.dtype, device: str, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Make prompts of random tokens, for LLaVA behind those of a picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = min(config.get_text_config().vocab_size, 32000) - 3
    prompts = []
    for _ in range(num_prompts):
        ids = torch.randint(3, vocab_size, (1, length), generator=generator)
        inputs = {}
        if isinstance(config, LlavaConfig):
            side, patch = config.vision_config.image_size, config.vision_config.patch_size
            ids = ids.where(ids != config.image_token_id, 3)
            image = torch.full((1, (side // patch) ** 2), config.image_token_id)
            ids = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)
            pixels = torch.randn(1, config.vision_config.num_channels, side, side, generator=generator)
            inputs = {"pixel_values": pixels.to(device, dtype)}
        prompts.append({"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), **inputs})
    return prompts


def batched(prompts: list[Any], batch_size: int) -> list[list[Any]]:
    """Cut prompts into full batches; the last is filled up with the first prompts."""
    num_batches = math.ceil(len(prompts) / batch_size)
    filled = list(islice(cycle(prompts), num_batches * batch_size))
    return [filled[start : start + batch_size] for start in range(0, len(filled), batch_size)]
