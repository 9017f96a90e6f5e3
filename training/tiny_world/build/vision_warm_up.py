"""Warm up the vision tower: predict what stands in each cell of the picture, before any text is involved."""

import logging
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from training.tiny_world.build.target import PATCH_SIZE
from training.tiny_world.world.pictures import (
    BACKGROUNDS,
    CELL_SIZE,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    random_scene,
)


logger = logging.getLogger(__name__)

_GRID = 96 // PATCH_SIZE
_VALUES = (("", *SHAPES), ("", *COLOURS), ("", *SIZES), tuple(range(9)), tuple(BACKGROUNDS))


def pixel_values(pictures: list) -> torch.Tensor:
    """Return pictures of the tiny world as the processor would, quicker: nothing has to be resized."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (num_images, 3, height, width)


def patch_labels(scene: Scene) -> torch.Tensor:
    """Return, for every patch, the shape, colour and size in its cell, the cell, and the background."""
    cells = {shape.cell: shape for shape in scene.shapes}
    labels = []
    for patch in range(_GRID**2):
        row, column = patch // _GRID * PATCH_SIZE // CELL_SIZE, patch % _GRID * PATCH_SIZE // CELL_SIZE
        shape = cells.get(3 * row + column)
        values = ("", "", "") if shape is None else (shape.shape, shape.colour, shape.size)
        values = (*values, 3 * row + column, scene.background)
        labels.append([options.index(value) for options, value in zip(_VALUES, values, strict=True)])
    return torch.tensor(labels)  # (num_patches, 5)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes."""
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(gradients)
    parts = (gradients / dist.get_world_size()).split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def warm_up_tower(model: LlavaForConditionalGeneration, num_steps: int = 400, batch_size: int = 64) -> None:
    """Train the vision tower with a throw-away linear head until its patches tell what stands in their cells."""
    random = Random(1 + dist.get_rank())
    tower = model.model.vision_tower
    head = nn.Linear(model.config.vision_config.hidden_size, sum(map(len, _VALUES)))
    parameters = [*tower.parameters(), *head.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps, pct_start=0.1)
    for step in range(1, num_steps + 1):
        scenes = [random_scene(random, 1, 6) for _ in range(batch_size // dist.get_world_size())]
        pixels = pixel_values([draw_scene(scene) for scene in scenes])
        labels = torch.stack([patch_labels(scene) for scene in scenes])  # (batch_size, num_patches, 5)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
            logits = head(features[:, 1:]).float().split(list(map(len, _VALUES)), dim=-1)
        losses = [F.cross_entropy(part.flatten(0, 1), labels[..., i].flatten()) for i, part in enumerate(logits)]
        sum(losses).backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        if step % 50 == 0:
            right = torch.stack([part.argmax(-1) == labels[..., i] for i, part in enumerate(logits)], dim=-1)
            logger.info("tower step %d loss %.4f right %.4f", step, sum(losses).item(), right.all(-1).float().mean())
