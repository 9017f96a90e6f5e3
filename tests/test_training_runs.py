"""Processes, accumulation and interruptions change nothing about a training run; it leaves whole checkpoints."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock


pytest.importorskip("trl")

from safetensors.torch import load_file
from training_fixtures import (
    TWO_PROCESSES,
    block_recipe,
    eagle3_recipe,
    finish,
    launch,
    recipe,
    vlm_recipe,
    write_recipe,
    write_world,
)

from transformers_msd import MSDDraftModel
from transformers_msd.cli.train import children_end_with_us
from transformers_msd.trainer.checkpoints import last_checkpoint
from transformers_msd.trainer.run import make_parser, train


NUM_STEPS = 6
# Several epochs, the rows of which do not fill whole steps.
CURVE = {
    "stage": "ramp",
    "max_steps": NUM_STEPS,
    "num_unroll_steps": 2,
    "num_eval_prompts": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_max_new_tokens": 6,
}
# Kinds of drafts on features besides MSD, for which a few steps will do.
OTHER_KINDS = {"eagle3": (eagle3_recipe, {"num_unroll_steps": 2}), "block": (block_recipe, {"num_blocks": 6})}
SHORT_CURVE = {"stage": "multimodal", "max_steps": 2}
# Sums in another order, over rows padded to another length.
TOLERANCE = {"rtol": 2e-4, "atol": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def run(world: Path, output: str, make_recipe=recipe, **settings):
    return train(*make_parser().parse_dict(make_recipe(world, output, **settings)))


def curve(log_history: list[dict]) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in log_history if "loss" in entry])


@pytest.fixture(scope="module", params=[recipe, vlm_recipe], ids=["msd", "vlm"])
def make_recipe(request):
    return request.param


@pytest.fixture(scope="module")
def unbroken(world, make_recipe):
    """Losses of one process that is left alone."""
    losses = curve(run(world, "unbroken", make_recipe, **CURVE).state.log_history)
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[0]
    return losses


def test_accumulation_leaves_the_curve(world, make_recipe, unbroken):
    settings = CURVE | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    accumulated = run(world, "accumulated", make_recipe, **settings).state.log_history
    torch.testing.assert_close(curve(accumulated), unbroken, **TOLERANCE)


def test_noise_and_coins_follow_from_the_seed(world, make_recipe, unbroken):
    losses = curve(run(world, "again", make_recipe, **CURVE).state.log_history)
    assert torch.equal(losses, unbroken)
    assert not torch.equal(curve(run(world, "other", make_recipe, **CURVE, seed=7).state.log_history), unbroken)


@pytest.fixture(scope="session")
def joint(tmp_path_factory):
    """
    Where one launch of two processes has trained by each recipe, beside a whole target and a sharded one, and what it
    saw. It is done once, whichever of several workers of pytest comes first.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "joint"
    with FileLock(f"{folder}.lock"):
        results = folder / "results.json"
        if not results.exists():
            folder.mkdir(exist_ok=True)
            results.write_text(train_jointly(folder))
    return folder, json.loads(results.read_text())


def train_jointly(folder: Path) -> str:
    """Train in two processes; return what they saw, as JSON."""
    write_world(folder)
    two = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
    saving = {"save_strategy": "steps", "save_steps": NUM_STEPS}
    recipes = {}
    for each in (recipe, vlm_recipe):
        recipes[f"whole_{each.__name__}"] = each(folder, f"whole_{each.__name__}", **CURVE | two | saving)
        recipes[f"sharded_{each.__name__}"] = each(folder, f"sharded_{each.__name__}", **CURVE | two)
    for kind, (make_recipe, own) in OTHER_KINDS.items():
        recipes[f"whole_{kind}"] = make_recipe(folder, f"whole_{kind}", **SHORT_CURVE | own | two)
    script = str(Path(__file__).parent / "joint_training.py")
    output = finish(launch([*TWO_PROCESSES, script, json.dumps(recipes)]))
    return next(line for line in output.splitlines() if line.startswith('{"whole'))


def test_two_processes_leave_the_curve(make_recipe, unbroken, joint):
    name = f"whole_{make_recipe.__name__}"
    state = json.loads((joint[0] / name / f"checkpoint-{NUM_STEPS}/trainer_state.json").read_text())
    torch.testing.assert_close(curve(state["log_history"]), unbroken, **TOLERANCE)
    measured = [entry["step"] for entry in state["log_history"] if "eval_acceptance_length_image" in entry]
    assert measured == [3, 6]


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_processes_accumulation_and_interruptions_leave_the_curves_of_other_kinds(world, kind, joint):
    make_recipe, own = OTHER_KINDS[kind]

    def losses(output: str, **settings) -> torch.Tensor:
        return curve(run(world, f"{kind}_{output}", make_recipe, **SHORT_CURVE | own | settings).state.log_history)

    unbroken = losses("unbroken", save_strategy="steps", save_steps=1)
    assert len(unbroken) == 2
    accumulated = losses("accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(accumulated, unbroken, **TOLERANCE)
    resumed = losses("resumed", resume_from_checkpoint=str(world / f"{kind}_unbroken/checkpoint-1"))
    torch.testing.assert_close(resumed, unbroken, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.tensor(joint[1][f"whole_{kind}"]["losses"]), unbroken, **TOLERANCE)


def test_killed_run_goes_on_where_it_was(world, make_recipe, unbroken):
    settings = CURVE | {"save_strategy": "steps", "save_steps": 2}
    path = write_recipe(world, "killed", make_recipe, **settings, resume_from_checkpoint=True)
    shutil.rmtree(world / "killed", ignore_errors=True)
    process = launch(["-m", "transformers_msd.trainer.run", "--config", str(path)])
    saved = world / "killed/checkpoint-2/trainer_state.json"
    deadline = time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # What a kill in the middle of a save leaves behind.
    broken = world / "killed/checkpoint-5"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half of it")
    run(world, "killed", make_recipe, **settings, resume_from_checkpoint=True)
    state = json.loads((world / f"killed/checkpoint-{NUM_STEPS}/trainer_state.json").read_text())
    torch.testing.assert_close(curve(state["log_history"]), unbroken, rtol=1e-6, atol=0.0)


def test_sharded_target_trains_and_drafts_alike(make_recipe, unbroken, joint):
    result = joint[1][f"sharded_{make_recipe.__name__}"]
    torch.testing.assert_close(torch.tensor(result["losses"]), unbroken, **TOLERANCE)
    assert set(result["parameter_types"]) == {"DTensor"}
    assert result["acceptance_lengths"][-1] >= 1


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_the_curve(world, make_recipe, unbroken, stage):
    output = f"zero{stage}"
    settings = {"save_strategy": "steps", "save_steps": NUM_STEPS, "per_device_train_batch_size": 1}
    path = write_recipe(world, output, make_recipe, **CURVE | settings, gradient_accumulation_steps=2)
    command = ["-m", "transformers_msd.cli", "train", "--config", str(path), "--mixed_precision", "no"]
    command += ["--accelerate_config", f"training/accelerate_configs/zero{stage}.yaml"]
    process = launch([*command, "--num_processes", "2", "--main_process_port", "0"])
    if make_recipe is vlm_recipe:
        with pytest.raises(AssertionError, match="A draft VLM must be trained by DDP"):
            finish(process)
        return
    finish(process)
    state = json.loads((world / output / f"checkpoint-{NUM_STEPS}/trainer_state.json").read_text())
    torch.testing.assert_close(curve(state["log_history"]), unbroken, **TOLERANCE)
    measured = [entry["step"] for entry in state["log_history"] if "eval_acceptance_length_image" in entry]
    assert measured == [3, 6]
    saved, expected = (load_file(world / folder / "model.safetensors") for folder in (output, "unbroken"))
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5)  # of steps of 3e-3


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_deepspeed_leaves_the_curves_of_other_kinds(world, kind, stage):
    make_recipe, own = OTHER_KINDS[kind]
    settings = SHORT_CURVE | own
    unbroken = run(world, f"{kind}_alone", make_recipe, **settings)
    name = f"{kind}_zero{stage}"
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    path = write_recipe(world, name, make_recipe, **settings | halves | {"save_strategy": "steps", "save_steps": 2})
    command = ["-m", "transformers_msd.cli", "train", "--config", str(path), "--mixed_precision", "no"]
    command += ["--accelerate_config", f"training/accelerate_configs/zero{stage}.yaml"]
    finish(launch([*command, "--num_processes", "2", "--main_process_port", "0"]))
    state = json.loads((world / name / "checkpoint-2/trainer_state.json").read_text())
    torch.testing.assert_close(curve(state["log_history"]), curve(unbroken.state.log_history), **TOLERANCE)
    saved, expected = (load_file(world / folder / "model.safetensors") for folder in (name, f"{kind}_alone"))
    assert saved.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(saved[key], weight, rtol=0, atol=1e-4)  # of steps of 3e-3


def test_full_disk_leaves_no_half_checkpoint(world):
    settings = CURVE | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # the weights alone are larger
    try:
        with pytest.raises(OSError, match="could not be written"):
            run(world, "full", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((world / "full").glob("checkpoint-*")) == []
    assert last_checkpoint(world / "full") is None


def test_run_reports_and_loads(world):
    trainer = run(
        world,
        "reported",
        **CURVE | {"max_steps": 4, "num_eval_prompts": 2, "eval_steps": 2},
    )
    logged = [entry for entry in trainer.state.log_history if "eval_acceptance_length_image" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 4]
    assert all(entry["eval_acceptance_length"] >= 1 for entry in logged)
    assert all(logged[-1][f"eval_speedup{kind}"] > 0 for kind in ("", "_text", "_image"))
    folder = world / "reported"
    card = (folder / "README.md").read_text()
    for expected in (
        "a local `LlavaForConditionalGeneration`",
        "MSDDraftModel.from_pretrained",
        "| text |",
        "| image |",
        "commit:",
        "4 steps",
    ):
        assert expected in card
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    loaded = MSDDraftModel.from_pretrained(folder)
    assert torch.equal(loaded.fc.weight, trainer.model.fc.weight)


def test_best_draft_is_loaded_at_the_end(world, make_recipe):
    steps = {"max_steps": 2, "num_eval_prompts": 1, "eval_max_new_tokens": 2, "save_only_model": True}
    steps |= {
        f"{kind}_{name}": value for kind in ("eval", "save") for name, value in (("strategy", "steps"), ("steps", 1))
    }
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = run(world, "best", make_recipe, **CURVE | steps | best)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    final, first, last = (
        load_file(world / "best" / folder / "model.safetensors") for folder in ("", "checkpoint-1", "checkpoint-2")
    )
    assert all(torch.equal(final[name], weight) for name, weight in first.items())
    assert any(not torch.equal(final[name], weight) for name, weight in last.items())


def launch_and_wait(pids: Connection) -> None:
    with children_end_with_us():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        pids.send(child.pid)
        child.wait()


def test_processes_that_were_launched_end_with_the_command() -> None:
    ours, theirs = Pipe()
    # A fork: a process that imports everything anew takes seconds.
    command = get_context("fork").Process(target=launch_and_wait, args=(theirs,))
    command.start()
    child = ours.recv()
    command.terminate()
    command.join(30)
    assert command.exitcode == 143
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the launched process goes on alone")
