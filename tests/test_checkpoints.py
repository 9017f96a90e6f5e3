"""Which checkpoint a run goes on from: the newest whole one, and what it lacks is said."""

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


pytest.importorskip("trl")

from safetensors.torch import save_file
from training_fixtures import make_trainer
from transformers import PreTrainedModel

from training.tiny_world.build.target import build_model, build_processor
from training.tiny_world.world.rows import training_dataset
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer.checkpoints import check_same_draft, is_whole, last_checkpoint, tell_what_is_missing
from transformers_msd.trainer.recipe import KINDS


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


def small_vlm(target: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = copy.deepcopy(target.config)
    for name, value in fields.items():
        setattr(config.get_text_config(), name, value)
    return type(target)(config)


def of(kind: str, **fields: Any) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Make drafts of a kind: of a target, in a few lines that differ."""
    draft_class = KINDS[kind]
    return lambda target: draft_class(draft_class.config_class.from_target(target.config, **fields))


SMALL, BLOCK = {"intermediate_size": 32}, {"intermediate_size": 32, "block_size": 4}
OTHER_DRAFTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "a size": (of("msd", **SMALL), of("msd", intermediate_size=48), "text_config.intermediate_size': 32.*: 48"),
    "what no weight shows": (of("msd", **SMALL), of("msd", **SMALL, decoupled=False), "'decoupled': True.*: False"),
    "positions": (
        of("msd", **SMALL),
        of("msd", **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "text_config.rope_parameters.rope_theta': .*: 500000.0",
    ),
    "layers that are read": (
        of("eagle3", **SMALL),
        of("eagle3", **SMALL, feature_layers=[0, 1, 1]),
        "'feature_layers': .*0, 1, 1",
    ),
    "a block": (of("block", **BLOCK), of("block", **BLOCK | {"block_size": 3}), "'block_size': 4}.*'block_size': 3"),
    "a kind": (of("msd", **SMALL), of("eagle3", **SMALL), "'model_type': 'msd_draft'.*'model_type': 'eagle3_draft'"),
    "a small VLM": (
        lambda target: small_vlm(target),
        lambda target: small_vlm(target, rms_norm_eps=1e-3),
        "'text_config.rms_norm_eps': .*: 0.001",
    ),
}


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("name", OTHER_DRAFTS)
def test_a_run_goes_on_with_its_own_draft_alone(name: str, by_name: bool, tmp_path: Path) -> None:
    before, after, message = OTHER_DRAFTS[name]
    processor, dataset = build_processor(num_rows=100), training_dataset(16)
    target = build_model(processor, num_layers=1).eval()
    checkpoint = write(tmp_path, 1)
    before(target).save_pretrained(checkpoint)
    losses = {"feature_loss_weight": 0.0, "token_loss_weight": 1.0, "feature_noise": 0.0}
    if name == "a small VLM":
        losses = {}
    trainer = make_trainer(target, dataset, processor, tmp_path, draft=after(target), **losses)
    weights = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"must be the one of .*checkpoint-1 to go on from there, of .*{message}"):
        trainer.train(str(checkpoint) if by_name else True)
    assert all(torch.equal(value, weights[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", OTHER_DRAFTS)
def test_what_says_nothing_of_a_draft_may_differ(name: str, tmp_path: Path) -> None:
    make, other, _ = OTHER_DRAFTS[name]
    processor = build_processor(num_rows=100)
    target = build_model(processor, num_layers=1)
    draft, again = make(target), make(target)
    draft.save_pretrained(tmp_path)
    again.config.name_or_path, again.config.dtype, again.config.get_text_config().use_cache = "a/b", "bfloat16", False
    if isinstance(again, FeatureDraftModel):
        again.tree_config = {"num_nodes": 5, "depth": 2, "top_k": 2}
    check_same_draft(tmp_path, again.config)
    (tmp_path / "config.json").unlink()
    check_same_draft(tmp_path, other(target).config)


NO_CONFIGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "a list": lambda fields: "[1, 2]",
    "cut": lambda fields: json.dumps(fields)[:40],
    "empty": lambda fields: "",
    "a number as kind": lambda fields: json.dumps(fields | {"model_type": 3}),
    "a number as part": lambda fields: json.dumps(fields | {"text_config": 3}),
    "a list as part": lambda fields: json.dumps(fields | {"text_config": [1]}),
    "another kind of field": lambda fields: json.dumps(fields | {"tree_config": "deep", "vision_config": "wide"}),
}


@pytest.mark.parametrize("name", ["a size", "a small VLM"])
@pytest.mark.parametrize("broken", NO_CONFIGS)
def test_a_checkpoint_whose_config_is_broken_names_it(broken: str, name: str, tmp_path: Path) -> None:
    target = build_model(build_processor(num_rows=100), num_layers=1)
    draft = OTHER_DRAFTS[name][0](target)
    draft.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    check_same_draft(tmp_path, draft.config)
    file.write_text(NO_CONFIGS[broken](json.loads(file.read_text())))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        check_same_draft(tmp_path, draft.config)


def test_a_run_goes_on_from_whole_checkpoints_alone(tmp_path: Path) -> None:
    processor, dataset = build_processor(num_rows=100), training_dataset(16)
    target = build_model(processor, num_layers=1).eval()
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(target, dataset, processor, tmp_path, **settings).train()
    cut("optimizer.pt")(tmp_path / "checkpoint-2")
    trainer = make_trainer(target, dataset, processor, tmp_path, **settings)
    with pytest.raises(ValueError, match="checkpoint-2 is no whole checkpoint"):
        trainer.train(str(tmp_path / "checkpoint-2"))
    for wrong in ("", 3):
        with pytest.raises(ValueError, match=f"must be a folder, or true for the newest .*, got {wrong!r}"):
            trainer.train(wrong)
    trainer.train(True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
