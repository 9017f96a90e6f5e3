"""
Train the tiny world's draft, on text and then on all rows: `python -m training.tiny_world.build.train_draft`.

`--draft block` trains a block of two layers on the same rows.
"""

import argparse
import logging
from itertools import islice
from pathlib import Path
from random import Random

import torch
from datasets import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback

from training.tiny_world.build.target import CHECKPOINT, answer_prompts, load_target
from training.tiny_world.world.rows import FEATURES, evaluation_prompts, training_rows
from transformers_msd import BlockDraftConfig, BlockDraftModel, MSDConfig, MSDDraftModel
from transformers_msd.trainer import MSDTrainer, MSDTrainingConfig


logger = logging.getLogger(__name__)
DRAFT_CHECKPOINT, BLOCK_CHECKPOINT = CHECKPOINT.parent / "draft", CHECKPOINT.parent / "block"
SHIPPED = {"msd": DRAFT_CHECKPOINT, "block": BLOCK_CHECKPOINT}
TREE = {"num_nodes": 24, "depth": 6, "top_k": 4}
BLOCK_TREE = TREE | {"depth": 8}  # a block says all levels in one forward
NUM_UNROLL_STEPS = 4
BATCH_SIZE = 16
BLOCK = {"block_size": 8, "num_hidden_layers": 2, "edge_rank": 32}
TRAINING = {
    "msd": {"learning_rate": 4e-3, "num_unroll_steps": NUM_UNROLL_STEPS},
    # A block learns from tokens alone.
    "block": {"learning_rate": 2e-3, "num_unroll_steps": 1, "unroll_decay": 0.8, "feature_loss_weight": 0.0},
}
# Of all trainings of drafts in the tiny world.
COMMON_SETTINGS = {
    "max_grad_norm": 1.0,
    # Small heads give flat distributions, of which features alone teach little.
    "token_loss_weight": 1.0,
    "head_chunk_size": 4096,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
}


class LogCallback(TrainerCallback):
    """Writes what the trainer logs, and the acceptance length a drafted chain would have."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = " ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float))
        agreements = [logs.get(f"eval_agreement_{step + 1}") for step in range(NUM_UNROLL_STEPS)]
        if None not in agreements:
            lengths = torch.tensor([1.0, *agreements]).cumprod(0)
            values += f" chain {lengths.sum():.3f}"
        logger.info("step %d %s", state.global_step, values)


def answered_prompts(
    target: LlavaForConditionalGeneration, processor: LlavaProcessor, num_per_group: int = 16
) -> Dataset:
    """Let the target answer held-out prompts."""
    rows = evaluation_prompts(num_per_group)
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        for row, answer in zip(batch, answer_prompts(target, processor, batch), strict=True):
            row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Dataset.from_list([{name: row[name] for name in FEATURES} for row in rows], features=FEATURES)


def training_batches(stage: str, num_batches: int, batch_size: int, seed: int) -> Dataset:
    """Make training rows whose order groups rows of similar length into batches."""
    random, batches = Random(seed), []
    rows = training_rows(10**9, seed)
    if stage == "text":
        rows = (row for row in rows if not row["images"])
    while len(batches) < num_batches:
        pool = sorted(islice(rows, 32 * batch_size), key=row_length)
        pool = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        random.shuffle(pool)
        batches += pool
    return Dataset.from_list([row for batch in batches[:num_batches] for row in batch], features=FEATURES)


def row_length(row: dict) -> int:
    """Return the length of a row in characters, a picture counted like the 150 characters its tokens stand for."""
    texts = [content["text"] or "" for message in row["messages"] for content in message["content"]]
    return len("".join(texts)) + 150 * len(row["images"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--draft", choices=list(TRAINING), default="msd")
    parser.add_argument("--output", type=Path, help="the shipped draft's folder by default")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_world/draft"), help="checkpoints and log")
    parser.add_argument("--text-steps", type=int, default=200)
    parser.add_argument("--multimodal-steps", type=int, default=1000)
    parser.add_argument("--num-threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", filename=arguments.work / "log.txt", force=True
    )
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(0)
    target, processor = load_target(arguments.target)
    if arguments.draft == "block":
        draft = BlockDraftModel(BlockDraftConfig.from_target(target.config, tree_config=BLOCK_TREE, **BLOCK))
    else:
        draft = MSDDraftModel(MSDConfig.from_target(target.config, tree_config=TREE))
    logger.info("draft of %d parameters", draft.num_parameters())
    eval_dataset = answered_prompts(target, processor)
    for stage, num_steps, schedule in (
        ("text", arguments.text_steps, "constant_with_warmup"),
        ("multimodal", arguments.multimodal_steps, "cosine"),
    ):
        if num_steps == 0:
            continue
        args = MSDTrainingConfig(
            output_dir=str(arguments.work / stage),
            stage=stage,
            max_steps=num_steps,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            lr_scheduler_type=schedule,
            warmup_steps=50,
            feature_noise=0.0,  # short rows need none
            logging_steps=25,
            eval_strategy="steps",
            eval_steps=150,
            save_steps=150,
            save_only_model=True,
            save_total_limit=2,
            **TRAINING[arguments.draft],
            **COMMON_SETTINGS,
        )
        trainer = MSDTrainer(
            model=draft,
            target=target,
            args=args,
            train_dataset=training_batches(stage, num_steps, BATCH_SIZE, seed=20 if stage == "text" else 21),
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=[LogCallback()],
        )
        trainer.train()
        logger.info("%s done", stage)
    draft.to(torch.bfloat16).save_pretrained(arguments.output or SHIPPED[arguments.draft])


if __name__ == "__main__":
    main()
