"""
Distil the tiny world's draft VLM: `python -m training.tiny_world.build.train_draft_vlm`.

It has the target's vision tower, as drafts of the target's family have (MASSV, arXiv 2505.10526), and a text model of
two layers, trained on answers in the target's own words.
"""

import argparse
import copy
import logging
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from training.tiny_world.build.target import CHECKPOINT, draw_weights, load_target
from training.tiny_world.build.train_draft import COMMON_SETTINGS
from training.tiny_world.world.rows import balanced_rows
from transformers_msd.trainer import MSDTrainingConfig, VLMDraftTrainer
from transformers_msd.trainer.generation import GenerationSettings, generate_data


logger = logging.getLogger(__name__)
DRAFT_VLM_CHECKPOINT = CHECKPOINT.parent / "draft_vlm"
WIDTH, NUM_LAYERS = 128, 2


def build_draft_vlm(target: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Build a draft VLM that has the target's vision tower, and all else untrained."""
    config = copy.deepcopy(target.config)
    text = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": NUM_LAYERS}
    config.text_config.update(text | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": WIDTH // 4})
    draft = LlavaForConditionalGeneration(config)
    draw_weights(draft)
    draft.model.vision_tower.load_state_dict(target.model.vision_tower.state_dict())
    draft.model.vision_tower.requires_grad_(False)
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft


def answered_rows(target: LlavaForConditionalGeneration, processor: LlavaProcessor, work: Path) -> Dataset:
    """Let the target answer training rows, half of them with pictures; the answers are kept below `work`."""
    output = work / "answered"
    if output.exists():
        return Dataset.load_from_disk(output)
    settings = GenerationSettings(batch_size=64, max_new_tokens=160, rows_per_chunk=512)
    return generate_data(target, processor, balanced_rows(), output, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--output", type=Path, default=DRAFT_VLM_CHECKPOINT)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_world/draft_vlm"), help="answers and log")
    parser.add_argument("--steps", type=int, default=350)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.manual_seed(0)
    target, processor = load_target(arguments.target)
    draft = build_draft_vlm(target)
    logger.info("draft VLM of %d parameters", draft.num_parameters())
    args = MSDTrainingConfig(
        output_dir=str(arguments.work / "run"),
        stage="multimodal",
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        adam_beta2=0.98,
        weight_decay=0.05,
        logging_steps=25,
        save_strategy="no",
        **COMMON_SETTINGS,
    )
    rows = answered_rows(target, processor, arguments.work)
    trainer = VLMDraftTrainer(
        model=draft,
        target=target,
        args=args,
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.train()
    draft.to(torch.bfloat16).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
