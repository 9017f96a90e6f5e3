"""Train the tiny world's target from scratch: `python -m training.tiny_world.train_target`."""

import argparse
import copy
import logging
import time
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from training.tiny_world.evaluate_target import evaluate
from training.tiny_world.target import CHECKPOINT, build_model, build_processor
from training.tiny_world.vision_warm_up import pixel_values, warm_up_tower
from training.tiny_world.world import training_rows


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


def batches(processor: LlavaProcessor, num_batches: int, num_tokens: int, seed: int) -> Iterator[dict]:
    """Yield batches of about `num_tokens` tokens, of rows of similar length."""
    random, rows, ready = Random(seed), training_rows(10**9, seed), []
    for _ in range(num_batches):
        if not ready:
            pool = sorted((encode_row(processor, next(rows)) for _ in range(768)), key=lambda row: len(row["labels"]))
            ready = [[]]
            for row in pool:
                if len(row["labels"]) * (len(ready[-1]) + 1) > num_tokens:
                    ready.append([])
                ready[-1].append(row)
            random.shuffle(ready)
        yield collate(ready.pop(), processor.tokenizer.pad_token_id)


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


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    num_steps: int,
    peak: float,
    decay: bool,
    seed: int,
    save_to: Path,
) -> None:
    """Train all but the vision tower on the assistant's turns; the rate warms up, then stays or falls to zero."""
    model.train()
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    start, mean = time.time(), None
    for step, batch in enumerate(batches(processor, num_steps, 2400, seed)):
        rate = min((step + 1) / 100, 1) * (0.5 + 0.5 * cos(pi * step / num_steps) if decay else 1)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 25 == 0:
            logger.info("step %d loss %.4f, %.0f s", step + 1, mean, time.time() - start)
        if (step + 1) % 250 == 0:
            model.save_pretrained(save_to)
            processor.save_pretrained(save_to)
            logger.info("accuracy %s", evaluate(model, processor, 100)["right"])
            model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_world"), help="where unfinished models are saved")
    parser.add_argument("--shallow-steps", type=int, default=2400)
    parser.add_argument("--deep-steps", type=int, default=1500)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor, num_layers=8)
    warm_up_tower(model)
    train(model, processor, arguments.shallow_steps, 1.5e-3, False, 10, arguments.work / "shallow")
    model = deepen(model, build_model(processor))
    train(model, processor, arguments.deep_steps, 1.5e-3, True, 11, arguments.work / "deep")
    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    logger.info("rounded to bfloat16: %s", evaluate(copy.deepcopy(model).float(), processor))


if __name__ == "__main__":
    main()
