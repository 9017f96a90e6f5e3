"""What the command says to a newcomer: one line for every mistake, exit 1 or 2, and no traceback."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl")

from training_fixtures import ENVIRONMENT, ROOT
from transformers import TrainerState

from transformers_msd.cli import main
from transformers_msd.trainer.progress import Progress, ProgressCallback, duration


CHECKPOINTS = ROOT / "training/tiny_world/checkpoints"
CPU = "--use_cpu true --bf16 false"
TARGET, DRAFT = f"--target_model {CHECKPOINTS}/target", f"--draft_model {CHECKPOINTS}/draft"
MISTAKES = {
    "train --config nowhere.yaml": "A recipe must be a file",
    f"train {TARGET}": "`datasets` must name a dataset at least",
    f"train {TARGET} --datasets ./no.json {CPU}": "got './no.json', where nothing is",
    f"train {TARGET} --datasets no.parquet {CPU}": "got 'no.parquet', where nothing is",
    f"train --target_model ./no --datasets a/b {CPU}": "`target_model` must be a path or a repository",
    f"train {TARGET} --datasets a/b --draft_vlm ./no {CPU}": "`draft_vlm` must be a path or a repository",
    f"train {TARGET} --datasets a/b --dtype float33": "`dtype` must be `auto` or a floating-point dtype",
    f"train {TARGET} --datasets a/b --dtype int8": "`dtype` must be `auto` or a floating-point dtype",
    f"tune {TARGET} {DRAFT} --device no": "`device` must be one of this machine, got 'no'",
    f"tune {TARGET} {DRAFT} --dtype float33": "`dtype` must be `auto` or a floating-point dtype",
    f"tune --target_model ./no {DRAFT}": "`target_model` must be a path or a repository",
    f"tune {TARGET} --draft_model ./no": "`draft_model` must be a path or a repository",
    "train --target ./no": "`target` is no field of `DraftArguments` or `MSDTrainingConfig`, and no option of `accel",
    f"train {TARGET} --dataset a/b": "Did you mean `datasets`?",
    f"bench {TARGET} --drafts a": "`drafts` is no field of `BenchArguments`. Did you mean `draft_models`?",
    f"bench {TARGET} --num_prompts 2": "`num_prompts` is no field of `BenchArguments`. Did you mean `num_rows`?",
    "bench --target_model ./no": "`target_model` must be a path or a repository",
    f"bench {TARGET} --draft_models ./no": "`draft_models` must be a path or a repository",
    f"bench {TARGET} --datasets ./no.json": "`datasets` must be a path or a repository",
    f"trace {TARGET} {DRAFT} --device no": "`device` must be one of this machine, got 'no'",
    f"trace {TARGET} {DRAFT} --dtype float33": "`dtype` must be `auto` or a floating-point dtype",
    "trace --target_model ./no": "`target_model` must be a path or a repository",
    f"trace {TARGET} --draft_model ./no": "`draft_model` must be a path or a repository",
    f"trace {TARGET} {DRAFT} --output no/trace.html": "`output` must be a file in a folder that exists",
    f"trace {TARGET} {DRAFT} --image no.png": "`image` must be a picture's file, got 'no.png', where nothing is",
    f"check-parity {TARGET} --datasets a/b --device no": "`device` must be one of this machine",
    f"generate-data {TARGET} --datasets a/b --output here --device no": "`device` must be one of this machine",
    f"bench {TARGET} --draft_models {CHECKPOINTS}/draft --device no": "`device` must be one of this machine",
    f"convert ./no --target_model {CHECKPOINTS}/target --output here": "`checkpoint` must be a path or a repository",
    f"convert {CHECKPOINTS} --target_model ./no --output here": "`target_model` must be a path or a repository",
    f"convert {CHECKPOINTS}/draft {TARGET} --output here --to speculators": "must be given an EAGLE-3 draft",
    f"convert {CHECKPOINTS}/draft {TARGET} --output here --to sglang": "it would lose rows of pictures",
    f"convert {CHECKPOINTS}/draft {TARGET} --output {ROOT}/README.md": "`output` must be a folder, new or not",
    f"convert {CHECKPOINTS}/draft {TARGET} --output {ROOT}/README.md/a --to sglang": "/README.md, a file. Choose an",
    f"generate-data {TARGET} --datasets a/b --output {ROOT}/README.md": "/README.md, which is a file. Choose another",
    f"bench {TARGET} {DRAFT.replace('model', 'models')} --output {ROOT}/README.md": "`output` must be a folder",
    f"train {TARGET} --datasets a/b {CPU} --output_dir {ROOT}/README.md": "`output_dir` must be a folder",
    f"trace {TARGET} {DRAFT} --output {ROOT}": "`output` must be a file in a folder that exists",
    f"check-parity --target_model {CHECKPOINTS}/draft --datasets {ROOT}/README.md": "of a target, got MSDConfig",
    "generate-data --target_model ./no --datasets a/b --output here": "`target_model` must be a path or a repository",
    f"generate-data --target_model {CHECKPOINTS}/draft --datasets {ROOT}/README.md --output here": "the tokenizer of",
    f"serve {CHECKPOINTS}/target --continuous-batching": "never calls `generate`, which drafts",
    f"serve {CHECKPOINTS}/target --chat-template-kwargs {{bad": "`chat_template_kwargs` must be JSON",
    "serve ./no": "`target_model` must be a path or a repository",
    f"serve {CHECKPOINTS}/target --draft_model ./no": "`draft_model` must be a path or a repository",
}
USAGE = {
    "nonsense": "invalid choice: 'nonsense'",
    "train": "--target_model",
    f"train {TARGET} --datasets a/b --draft_config 8": "must be fields and values, as '{draft_vocab_",
    f"train {TARGET} --datasets a/b --draft_config {{a": "got '{a'",
    f"tune {TARGET} {DRAFT} --prompt_length 0": "must be at least 1, got 0",
    f"tune {TARGET} {DRAFT} --tolerance 0": "must be above 0, got 0",
    f"trace {TARGET} --temperature -1": "must be 0 or above, got -1; 0 is greedy",
    f"trace {TARGET} --max_new_tokens 0": "must be at least 1, got 0",
    f"trace {TARGET} --draft {CHECKPOINTS}/draft": "Did you mean `draft_model`?",
    f"tune {TARGET} {DRAFT} --wat 1": "`wat` is no option of transformers-msd tune. `--help` lists them all.",
    f"tune {TARGET} {DRAFT} more": "unrecognized arguments: more",
    "convert a --target b --output c": "`target` is no option of transformers-msd convert. Did you mean `target_mod",
    "convert a --target_model b --output c --to vllm": "invalid choice: 'vllm'",
    "serve": "the following arguments are required: target_model",
    f"serve {CHECKPOINTS}/target --cb-block-size 4": "`cb_block_size` is no option of transformers-msd serve",
    f"serve {CHECKPOINTS}/target --log-level loud": "invalid choice: 'loud'",
    "check-parity --target_dtype float32": "Did you mean `dtype`?",
    f"generate-data {TARGET} --use_cpu": "`use_cpu` is no option of transformers-msd generate-data",
    f"generate-data {TARGET} --datasets a/b --output here --num_rows -1": "must be at least 1, got -1",
    f"check-parity {TARGET} --datasets a/b --num_rows 0": "must be at least 1, got 0",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_told_in_one_line(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(command.split())
    said = str(error.value)
    assert said.startswith("transformers-msd: ")
    assert MISTAKES[command] in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_exits_with_2(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        main(command.split())
    assert error.value.code == 2
    assert USAGE[command] in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "bench", "tune", "generate-data", "check-parity", "convert", "trace", "serve"]
)
def test_help_names_every_option(command: str, capsys: pytest.CaptureFixture) -> None:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    names = {"train": ("--stage", "--datasets", "--dry_run", "--learning_rate"), "bench": ("--trees", "--output")}
    names |= {"serve": ("target_model", "--draft_model", "--port")}
    for name in names.get(command, ("--target_model",)):
        assert name in said


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3590, "1 h 0 min"), (7800, "2 h 10 min"), (100_000, "1 d 3 h")],
)
def test_durations_are_written_in_their_largest_units(seconds: float, written: str) -> None:
    assert duration(seconds) == written


def test_progress_in_a_log_is_told_in_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("transformers_msd.trainer.progress.time.perf_counter", lambda: clock[-1])
    with Progress("step", 600, start=100) as progress:
        for now, number, about in ((110, 101, None), (120, 200, "loss 1.5"), (121, 201, None), (200, 600, None)):
            clock.append(now)
            progress.update(number, about)
    assert capsys.readouterr().err.splitlines() == [
        "step 200 of 600, loss 1.5, 1 min left",
        "step 600 of 600, loss 1.5, took 2 min",
    ]


def test_progress_in_a_terminal_is_a_bar(capsys: pytest.CaptureFixture) -> None:
    with Progress("run", 3, has_bar=True) as progress:
        for number in range(1, 4):
            progress.update(number, "greedy")
    said = capsys.readouterr().err
    assert "0/3" in said
    assert "took" not in said


def test_one_process_tells_how_far_a_run_is(capsys: pytest.CaptureFixture) -> None:
    for is_shown in (False, True):
        state = TrainerState(max_steps=4, is_world_process_zero=is_shown)
        callback = ProgressCallback()
        callback.on_train_begin(None, state, None)
        state.global_step = 2
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs={"loss": 1.25})
        callback.on_log(None, state, None, logs={"eval_acceptance_length": 2.5, "eval_runtime": 3.0})
        callback.on_train_end(None, state, None)
        said = capsys.readouterr().err
        assert said == (
            "step 2 of 4, eval_acceptance_length 2.5, 0 s left\nstep 2 of 4, loss 1.25, took 0 s\n" if is_shown else ""
        )


def test_a_command_that_is_wrong_is_told_in_one_line(capsys: pytest.CaptureFixture) -> None:
    for command in ("train --stage ramps", "train --max_steps twenty", "tune", "bench --num_rows x"):
        with pytest.raises(SystemExit):
            main(command.split())
        assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_that_is_not_there_is_told_before_anything_is_launched(tmp_path: Path) -> None:
    missing = tmp_path / "checkpoint-9"
    with pytest.raises(SystemExit, match="checkpoint-9 is no whole checkpoint"):
        main(f"train {TARGET} --datasets {ROOT} {CPU} --resume_from_checkpoint {missing}".split())
    with pytest.raises(SystemExit, match="must be a folder, or true for the newest whole checkpoint, got ''"):
        main([*f"train {TARGET} --datasets {ROOT} {CPU} --resume_from_checkpoint".split(), ""])


def test_versions_are_told(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("transformers-msd", "torch", "Transformers"))


def test_hyphens_are_underscores(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="got './no', where nothing is"):
        main(["tune", "--target-model", "./no", "--draft-model=./no"])


# One process for all commands: it takes longer to start than to say what is missing.
WITHOUT_TRL = f"""
import json, sys
sys.modules["trl"] = None
from transformers_msd.cli import main
said = {{}}
for command, options in {{"train": [], "bench": [], "tune": {f"{TARGET} {DRAFT}".split()!r}}}.items():
    try:
        main([command, *options])
    except SystemExit as error:
        said[command] = error.code
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said_without_trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What commands end with where trl is missing."""
    folder = tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-c", WITHOUT_TRL]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("bench", "bench"), ("tune", "train")])
def test_a_missing_extra_is_named(command: str, extra: str, said_without_trl: dict[str, str]) -> None:
    # A text as exit code is printed, and the code is 1.
    assert f"trl is missing: `pip install 'transformers-msd[{extra}]'`" in said_without_trl[command]
    assert "\n" not in said_without_trl[command]
