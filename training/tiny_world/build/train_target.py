"""Train the tiny world's target from scratch: `python -m training.tiny_world.build.train_target`."""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from training.tiny_world.build.accuracy import accuracy, evaluate
from training.tiny_world.build.induction import plant_induction
from training.tiny_world.build.target import CHECKPOINT, build_model, build_processor, load_target
from training.tiny_world.build.vision_warm_up import average_gradients, pixel_values, warm_up_tower
from training.tiny_world.world.rows import attribute_questions, training_rows


logger = logging.getLogger(__name__)


def encode_row(processor: LlavaProcessor, row: dict) -> dict:
    """Tokenize a row, its image tokens expanded; labels are -100 outside the assistant's turns."""
    encoded = processor.tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"])
    side = processor.image_processor.crop_size["height"] // processor.patch_size
    repeats = torch.where(ids == processor.image_token_id, side**2, 1)
    ids, mask = ids.repeat_interleave(repeats), mask.repeat_interleave(repeats)
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "images": row["images"]}


def batches(
    processor: LlavaProcessor, num_batches: int, num_tokens: int, seed: int, **shares: float
) -> Iterator[dict]:
    """Yield this process's part of batches of about `num_tokens` tokens, of rows of similar length."""
    random, rows, ready = Random(seed), training_rows(10**9, seed, **shares), []
    for _ in range(num_batches):
        if not ready:
            pool = sorted((encode_row(processor, next(rows)) for _ in range(768)), key=lambda row: len(row["labels"]))
            ready = [[]]
            for row in pool:
                if len(row["labels"]) * (len(ready[-1]) + 1) > num_tokens:
                    ready.append([])
                ready[-1].append(row)
            ready = [rows_of_batch for rows_of_batch in ready if len(rows_of_batch) >= dist.get_world_size()]
            random.shuffle(ready)
        rows_of_batch = ready.pop()
        yield collate(rows_of_batch[dist.get_rank() :: dist.get_world_size()], processor.tokenizer.pad_token_id)


def collate(rows: list[dict], pad_token_id: int) -> dict:
    """Pad rows on the right to one batch."""
    pad = nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True, padding_value=pad_token_id),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(row["labels"]) for row in rows], batch_first=True),
    }
    images = [image for row in rows for image in row["images"]]
    return batch | {"pixel_values": pixel_values(images)} if images else batch


def deepen(model: LlavaForConditionalGeneration, deep: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Copy a trained model into one twice as deep; every second layer adds nothing yet, so the outputs stay equal."""
    shallow_layers = model.model.language_model.layers
    deep.load_state_dict(
        {n: p for n, p in model.state_dict().items() if ".layers." not in n or "vision" in n}, strict=False
    )
    for i, layer in enumerate(deep.model.language_model.layers):
        layer.load_state_dict(shallow_layers[i // 2].state_dict())
        if i % 2:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep


@dataclass(frozen=True)
class Stage:
    """
    A stretch of training at one depth, on rows with these shares of exercises (see `training_rows`). The rate warms
    up, then stays or falls to zero along a cosine.
    """

    name: str
    num_layers: int
    num_steps: int
    learning_rate: float
    shares: dict[str, float]
    decay: bool = False


STAGES = (
    Stage("exercises", 8, 400, 1.5e-3, {"cells": 0.2, "copies": 0.2}),
    Stage("world", 8, 500, 1e-3, {"cells": 0.1, "copies": 0.05}),
    Stage("deep", 16, 400, 8e-4, {"cells": 0.05, "copies": 0.02}),
    Stage("questions", 16, 300, 8e-4, {"questions": 0.35, "copies": 0.02}),
    Stage("searches", 16, 500, 7e-4, {"questions": 0.35}),
    Stage("lists", 16, 400, 7e-4, {"questions": 0.35}, decay=True),
    Stage("polish", 16, 280, 5e-4, {"questions": 0.35}, decay=True),
    Stage("look-ups", 16, 350, 7e-4, {"questions": 0.25, "look_ups": 0.35}, decay=True),
    Stage("finish", 16, 250, 4e-4, {"questions": 0.4, "look_ups": 0.1}, decay=True),
    Stage("practice", 16, 450, 7e-4, {"questions": 0.35, "look_ups": 0.3}, decay=True),
)
STAGE_NAMES = ("tower", *(stage.name for stage in STAGES))


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, stage: Stage, seed: int, work: Path
) -> None:
    """Train all but the vision tower on the assistant's turns, and keep saving the model below `work`."""
    model.train()
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    start, mean = time.time(), None
    for step, batch in enumerate(batches(processor, stage.num_steps, 1600, seed, **stage.shares), 1):
        rate = stage.learning_rate * min(step / 50, 1)
        if stage.decay:
            rate *= 0.5 + 0.5 * cos(pi * step / stage.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if dist.get_rank() == 0 and step % 25 == 0:
            logger.info("%s step %d loss %.4f, %.0f s", stage.name, step, mean, time.time() - start)
        if dist.get_rank() == 0 and (step % 100 == 0 or step == stage.num_steps):
            model.save_pretrained(work / stage.name)
            processor.save_pretrained(work / stage.name)
            logger.info("accuracy %s", accuracy(model.eval(), processor, attribute_questions(100)))
            model.train()


def work(rank: int, num_processes: int, arguments: argparse.Namespace) -> None:
    """Run all stages in one of the processes, and save the rounded model in the first."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(message)s")
    arguments.work.mkdir(parents=True, exist_ok=True)
    meeting = f"tcp://127.0.0.1:{arguments.port}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_processes)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.after is None:
        processor = build_processor()
        model, first = build_model(processor, STAGES[0].num_layers), 0
        plant_induction(model)
        warm_up_tower(model)
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
        if rank == 0:
            model.save_pretrained(arguments.work / "tower")
            processor.save_pretrained(arguments.work / "tower")
    else:
        model, processor = load_target(arguments.work / arguments.after)
        first = STAGE_NAMES.index(arguments.after)
    for i, stage in enumerate(STAGES[first:], first):
        if stage.num_layers > model.config.text_config.num_hidden_layers:
            model = deepen(model, build_model(processor, stage.num_layers))
        train(model, processor, stage, 10 + i, arguments.work)
    if rank == 0:
        model = model.to(torch.bfloat16)
        model.save_pretrained(arguments.output)
        processor.save_pretrained(arguments.output)
        logger.info("rounded to bfloat16: %s", evaluate(model.float(), processor))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_world"), help="where each stage's model is saved")
    parser.add_argument(
        "--after", choices=["tower", *(stage.name for stage in STAGES)], help="go on from this stage's model"
    )
    parser.add_argument("--port", type=int, default=29571, help="where the processes meet")
    mp.spawn(work, args=(2, parser.parse_args()), nprocs=2)


if __name__ == "__main__":
    main()
