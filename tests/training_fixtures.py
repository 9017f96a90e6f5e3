"""A small target, its processor and rows, in folders as users have them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from training.tiny_world.build.target import build_model, build_processor
from training.tiny_world.build.train_draft_vlm import build_draft_vlm
from training.tiny_world.world.rows import training_dataset
from transformers_msd import MSDConfig, MSDDraftModel
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer import MSDTrainer, MSDTrainingConfig, VLMDraftTrainer
from transformers_msd.trainer.base import DraftTrainer


ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": str(ROOT),
}
# They meet at a port that is free.
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]


@pytest.fixture(name="processor", scope="module")
def tiny_processor():
    return build_processor(num_rows=200)


@pytest.fixture(name="dataset", scope="module")
def tiny_dataset():
    return training_dataset(24)


def write_world(folder: Path, num_rows: int = 40) -> None:
    """Write an untrained target of one layer, a draft VLM and rows of the tiny world below a folder."""
    torch.manual_seed(0)
    processor = build_processor(num_rows=200)
    target = build_model(processor, num_layers=1)
    target.lm_head.weight.data.mul_(10)  # sure of itself: there is something to learn
    target.save_pretrained(folder / "target")
    build_draft_vlm(target).save_pretrained(folder / "draft_vlm")
    processor.save_pretrained(folder / "target")
    training_dataset(num_rows).save_to_disk(folder / "rows")


def recipe(folder: Path, output: str, **settings) -> dict:
    """Make a recipe for what `write_world` wrote."""
    return {
        "target_model": str(folder / "target"),
        "dtype": "float32",
        "datasets": [str(folder / "rows")],
        "draft_config": {"intermediate_size": 32},
        "num_eval_prompts": 0,
        "output_dir": str(folder / output),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        **settings,
    }


def eagle3_recipe(folder: Path, output: str, **settings) -> dict:
    """Make such a recipe for a draft of EAGLE-3, with half of the vocabulary."""
    losses = {"feature_loss_weight": 0.0, "token_loss_weight": 1.0, "unroll_decay": 0.8, "feature_noise": 0.0}
    own = {"draft": "eagle3", "draft_config": {"intermediate_size": 32, "draft_vocab_size": 96}}
    return recipe(folder, output, **{"num_unroll_steps": 3, **settings, **losses, **own})


def block_recipe(folder: Path, output: str, **settings) -> dict:
    """Make such a recipe for a block draft."""
    losses = {"feature_loss_weight": 0.0, "token_loss_weight": 1.0, "unroll_decay": 0.8, "feature_noise": 0.0}
    own = {"draft": "block", "draft_config": {"intermediate_size": 32, "block_size": 4, "edge_rank": 4}}
    return recipe(folder, output, **{**settings, **losses, **own})


def vlm_recipe(folder: Path, output: str, **settings) -> dict:
    """Make such a recipe for a draft VLM."""
    settings = recipe(folder, output, **settings) | {"draft_vlm": str(folder / "draft_vlm"), "draft_config": None}
    settings.pop("num_unroll_steps", None)
    return settings


def write_recipe(folder: Path, output: str, make_recipe: Callable[..., dict] = recipe, **settings) -> Path:
    """Write such a recipe as YAML."""
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(make_recipe(folder, output, **settings)))
    return path


def make_trainer(target, dataset, processor, output_dir, draft_for=None, draft=None, **settings) -> DraftTrainer:
    """Make a trainer of a small draft, for another target on demand, or of the draft given."""
    torch.manual_seed(0)
    draft = draft or MSDDraftModel(MSDConfig.from_target((draft_for or target).config, intermediate_size=32))
    trainer_class = MSDTrainer if isinstance(draft, FeatureDraftModel) else VLMDraftTrainer
    defaults = {
        "max_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = MSDTrainingConfig(output_dir=str(output_dir), **defaults | settings)
    return trainer_class(
        model=draft, target=target, args=args, train_dataset=dataset, processing_class=processor, eval_dataset=dataset
    )


def launch(arguments: list[str], **kwargs) -> subprocess.Popen:
    """Start Python with these arguments, its output kept."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """Wait for a process that must succeed; return what it printed. Where it hangs, it says where."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output
