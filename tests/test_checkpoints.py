"""Which checkpoint a run goes on from: the newest whole one, and what it lacks is said."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


pytest.importorskip("trl")

from safetensors.torch import save_file
from training_fixtures import make_trainer

from training.tiny_world.build.target import build_model, build_processor
from training.tiny_world.world.rows import training_dataset
from transformers_msd.trainer.checkpoints import is_whole, last_checkpoint, tell_what_is_missing


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


def write(folder: Path, step: int | str) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    weights = {"fc.weight": torch.zeros(64, 64)}
    for name in FILES:
        if name.endswith(".safetensors"):
            save_file(weights, checkpoint / name)
        else:
            torch.save(weights, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def cut(name: str) -> Callable[[Path], None]:
    def break_it(checkpoint: Path) -> None:
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: len(data) // 2])

    return break_it


BROKEN = {name: cut(name) for name in (*FILES, "trainer_state.json")} | {
    "no trainer_state.json": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "empty weights": lambda checkpoint: (checkpoint / "model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    whole, broken = write(tmp_path, 9), write(tmp_path, 10)
    assert last_checkpoint(tmp_path) == str(broken)
    BROKEN[name](broken)
    assert is_whole(whole)
    assert not is_whole(broken)
    assert last_checkpoint(tmp_path) == str(whole)
    assert f"{broken} was not written to its end" in caplog.text
    assert broken.exists()


def test_other_names_do_no_harm(tmp_path: Path) -> None:
    for step in ("best", "3-old", "", "12.bak"):
        write(tmp_path, step)
    (tmp_path / "checkpoint-99").write_text("a file")
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(write(tmp_path, 2).parent) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_is_missing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    checkpoint = write(tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        tell_what_is_missing(checkpoint)
        assert not caplog.text
        (checkpoint / name).unlink()
        tell_what_is_missing(checkpoint)
    assert f"has no state of {name.split('.')[0]}" in caplog.text


def test_a_run_goes_on_from_whole_checkpoints_alone(tmp_path: Path) -> None:
    processor, dataset = build_processor(num_rows=100), training_dataset(16)
    target = build_model(processor, num_layers=1).eval()
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(target, dataset, processor, tmp_path, **settings).train()
    cut("optimizer.pt")(tmp_path / "checkpoint-2")
    trainer = make_trainer(target, dataset, processor, tmp_path, **settings)
    with pytest.raises(ValueError, match="checkpoint-2 is no whole checkpoint"):
        trainer.train(str(tmp_path / "checkpoint-2"))
    trainer.train(True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
