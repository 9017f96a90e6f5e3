"""Train the target of the glyph world from scratch: `python -m training.glyph_world.train_target --output FOLDER`."""

import argparse
import time
from itertools import islice
from math import cos, pi
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from training.glyph_world.world import CELL_SIZE, CELLS, KINDS, PICTURE_SIZE, build_processor, prompts, rows
from training.tiny_world.build.target import answer_prompts
from training.tiny_world.build.train_target import collate, encode_row


BATCH_SIZE = 32


def build_model(processor: LlavaProcessor, num_layers: int = 6) -> LlavaForConditionalGeneration:
    """Build an untrained target, in float32."""
    tokenizer = processor.tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=PICTURE_SIZE,
            patch_size=CELL_SIZE,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **ids,
        ),
        image_token_id=processor.image_token_id,
        image_seq_length=CELLS**2,
        vision_feature_layer=-1,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, num_prompts: int = 20) -> dict:
    """Return the share of held-out prompts that are answered right to the last token, by kind."""
    found = {}
    for kind in KINDS:
        asked = prompts((kind,), num_prompts)
        answers = answer_prompts(model, processor, asked)
        found[kind] = sum(row["answer"] == answer for row, answer in zip(asked, answers, strict=True)) / num_prompts
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor)
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.01)
    endless, start, mean = rows(seed=0), time.time(), None
    for step in range(1, arguments.steps + 1):
        for group in optimizer.param_groups:
            decayed = 0.5 + 0.5 * cos(pi * step / (arguments.steps + 1))
            group["lr"] = arguments.rate * min(step / 100, 1) * decayed
        encoded = [encode_row(processor, row) for row in islice(endless, BATCH_SIZE)]
        loss = model(**collate(encoded, processor.tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 250 == 0 or step == arguments.steps:
            left = (time.time() - start) / step * (arguments.steps - step) / 60
            found = accuracy(model.eval(), processor)
            model.train()
            print(f"step {step} of {arguments.steps}, loss {mean:.4f}, right {found}, {left:.0f} min left", flush=True)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
