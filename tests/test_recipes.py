"""Recipes: all that are shipped can be read, one is found on the Hub, and mistakes in them are told."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml


pytest.importorskip("trl")

from datasets import Dataset
from PIL import Image
from training_fixtures import (
    ENVIRONMENT,
    ROOT,
    TWO_PROCESSES,
    finish,
    launch,
    recipe,
    vlm_recipe,
    write_recipe,
    write_world,
)
from transformers import AutoConfig, LlamaConfig, LlavaForConditionalGeneration

from transformers_msd import MSDConfig, MSDDraftModel
from transformers_msd.cli import main
from transformers_msd.trainer import MSDTrainingConfig
from transformers_msd.trainer.dataset import split_rows
from transformers_msd.trainer.plan import GIB, memory_of_step, num_parameters
from transformers_msd.trainer.recipe import (
    MOST_BYTES,
    DraftArguments,
    check_hub_recipe,
    find_recipe,
    load_draft_vlm,
    read_recipe,
)
from transformers_msd.trainer.report import write_card
from transformers_msd.trainer.rows import hold_out, load_rows
from transformers_msd.trainer.run import make_parser, plan, train


RECIPES = sorted((ROOT / "training/recipes").glob("*.yaml"))
LLAVA = ROOT.parent / "shared/data/processors/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_can_be_read(path):
    settings = yaml.safe_load(path.read_text()) | {"use_cpu": True, "bf16": False}
    arguments, args = make_parser().parse_dict(settings)
    assert arguments.target_model
    assert args.stage == ("multimodal" if arguments.draft_vlm else "ramp")


def test_plan_tells_what_a_run_will_do(world, capsys):
    path = write_recipe(world, "planned", num_eval_prompts=2, stage="multimodal", num_train_epochs=2)
    main(["train", "--config", str(path), "--dry_run"])
    printed = capsys.readouterr().out
    assert "rows: 8 of text, 28 with pictures" in printed
    assert "steps: 18 of 4 rows" in printed
    draft = MSDConfig.from_target(AutoConfig.from_pretrained(world / "target"), intermediate_size=32)
    assert f"draft: {num_parameters(draft):,} parameters" in printed
    assert not (world / "planned").exists()


def test_plan_counts_the_rows_that_are_trained_on(world):
    settings = {"stage": "multimodal", "max_length": 110}
    parsed = make_parser().parse_dict(recipe(world, "counted", **settings, max_steps=1))
    rows = train(*parsed).train_dataset
    planned = plan(*parsed, num_processes=1)
    text_rows, visual_rows = split_rows(rows)
    assert 0 < len(visual_rows) < 30
    assert (planned.num_text_rows, planned.num_visual_rows) == (len(text_rows), len(visual_rows))


def test_plan_of_a_draft_vlm(world, capsys):
    path = write_recipe(world, "planned-vlm", vlm_recipe, stage="multimodal")
    main(["train", "--config", str(path), "--dry_run"])
    printed = capsys.readouterr().out
    assert f"draft: {num_parameters(AutoConfig.from_pretrained(world / 'draft_vlm')):,} parameters" in printed
    with pytest.raises(SystemExit, match="are of MSD's features"):
        main(["train", "--config", str(path), "--dry_run", "--num_unroll_steps", "2"])


@pytest.mark.parametrize("beside", [{"draft_model": "a draft"}, {"draft_config": {"intermediate_size": 32}}])
def test_draft_vlm_beside_a_draft_of_msd_raises(world, beside):
    with pytest.raises(ValueError, match="`draft_vlm` takes the place of a draft of MSD"):
        make_parser().parse_dict(vlm_recipe(world, "both") | beside)


def test_draft_vlm_reads_what_its_target_reads(world):
    arguments = DraftArguments(target_model=str(world / "target"), datasets=["none"], draft_vlm=str(world / "lm"))
    target = AutoConfig.from_pretrained(world / "target")
    LlamaConfig().save_pretrained(world / "lm")
    with pytest.raises(ValueError, match="got llama for llava, one of which reads text alone"):
        load_draft_vlm(arguments, target)


def test_draft_vlm_is_given_the_targets_vocabulary(world):
    arguments = DraftArguments(target_model="none", datasets=["none"], draft_vlm=str(world / "draft_vlm"))
    target = AutoConfig.from_pretrained(world / "target")
    target.text_config.vocab_size += 64
    draft = load_draft_vlm(arguments, target)
    assert draft.config.text_config.vocab_size == target.text_config.vocab_size
    assert len(draft.get_output_embeddings().weight) == target.text_config.vocab_size
    trained = {name for name, parameter in draft.named_parameters() if parameter.requires_grad}
    assert any("multi_modal_projector" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)


@pytest.mark.skipif(not LLAVA.exists(), reason="needs ../shared/data: the config of LLaVA-1.5-7B")
def test_llava_trains_in_less_than_40_gb():
    target = AutoConfig.from_pretrained(LLAVA)
    args = MSDTrainingConfig(output_dir="none", use_cpu=True, bf16=True, per_device_train_batch_size=1)
    memory = memory_of_step(target, MSDConfig.from_target(target), args, torch.bfloat16)
    assert memory["target"] == pytest.approx(7.06e9 * 2, rel=0.01)
    assert 14e9 < sum(memory.values()) < 40e9
    assert sum(memory.values()) / GIB == pytest.approx(19, abs=3)


@pytest.mark.parametrize("unknown", ["learning_rat: 0.1", "num_epochs: 3"])
def test_unknown_key_raises(world, unknown, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(write_recipe(world, "unknown").read_text() + unknown)
    with pytest.raises(SystemExit, match="options of `accelerate launch`, got"):
        main(["train", "--config", str(path), "--dry_run"])


@pytest.mark.parametrize("name", ["no_such.yaml", "folder/no_such.yaml", "a/b/c", "org/repo:recipe.txt"])
def test_wrong_recipe_name_raises(name):
    with pytest.raises(ValueError, match="must be a file, `org/repo` or `org/repo:file.yaml`"):
        find_recipe(name)


def test_recipe_without_data_raises(world):
    with pytest.raises(ValueError, match="`datasets` must name a dataset"):
        make_parser().parse_dict(recipe(world, "none") | {"datasets": []})


WRONG = {
    "env: {LD_PRELOAD: any.so}": "can't set environment variables",
    "datasets: rows": "`datasets` must be a list of names",
    "datasets: [1]": "`datasets` must be a list of names",
    "num_eval_prompts: -1": "`num_eval_prompts` must be a whole number, 0 at least",
    "eval_max_new_tokens: 0": "`eval_max_new_tokens` must be a whole number, 1 at least",
    "max_rows_per_dataset: 0": "`max_rows_per_dataset` must be a whole number, 1 at least",
    "max_steps: 0": "`max_steps` must be at least 1",
    "learning_rate: -0.1": "`learning_rate` must be a number that is not negative",
    "learning_rate: .nan": "`learning_rate` must be a finite value",
    "token_loss_weight: .inf": "`token_loss_weight` must be a finite value",
    "feature_noise: -1.0": "`feature_noise` must be a number that is not negative",
    "a: &a [1]\nb: *a": "must not refer to itself",
    "stage: [": "is no recipe",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_a_recipe_cannot_say_is_told(world, tmp_path, line):
    path, before = tmp_path / "wrong.yaml", dict(os.environ)
    names = [part.split(":")[0] for part in line.splitlines()]
    said = {name: value for name, value in recipe(world, "wrong").items() if name not in names}
    path.write_text(yaml.safe_dump(said) + line)
    with pytest.raises(SystemExit, match=WRONG[line]):
        main(["train", "--config", str(path), "--dry_run"])
    assert os.environ == before


def test_a_huge_recipe_and_a_list_are_told(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("a: " + "b" * MOST_BYTES)
    with pytest.raises(ValueError, match=f"must have {MOST_BYTES} bytes at most"):
        read_recipe(str(path))
    path.write_text("[a, b]")
    with pytest.raises(ValueError, match="must be a mapping of names to values, got list"):
        read_recipe(str(path))


@pytest.mark.parametrize(
    "line",
    ["output_dir: /etc", "push_to_hub: true", "report_to: wandb", "deepspeed: a.json", "main_process_ip: 203.0.113.9"],
)
def test_a_recipe_from_the_hub_says_what_to_learn_and_nothing_else(tmp_path, line):
    path, name = tmp_path / "recipe.yaml", line.split(":")[0]
    path.write_text(f"target_model: a/b\ndatasets: [c/d]\nlearning_rate: 0.1\n{line}")
    with pytest.raises(ValueError, match=f"can't set `{name}`.*--{name}"):
        check_hub_recipe(str(path), ["--max_steps", "3"])
    check_hub_recipe(str(path), [f"--{name}=mine"])


def test_shipped_recipes_may_lie_on_the_hub():
    for path in RECIPES:
        check_hub_recipe(str(path), ["--output_dir", "here", "--report_to", "none"])


class Hub(BaseHTTPRequestHandler):
    """A repository `org/drafts` as the Hub serves it."""

    files: dict[str, bytes] = {}

    def do_HEAD(self):
        self._send(body=False)

    def do_GET(self):
        self._send(body=True)

    def _send(self, body: bool):
        prefix, _, name = self.path.partition("/resolve/main/")
        content = self.files.get(name) if prefix == "/org/drafts" else None
        self.send_response(200 if content else 404)
        if content:
            self.send_header("ETag", f'"{hash(content):x}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("name", ["org/drafts", "org/drafts:small.yaml"])
def test_recipe_from_the_hub(world, tmp_path, name):
    said = recipe(world, "from-hub")
    del said["output_dir"], said["report_to"]
    content = yaml.safe_dump(said).encode()
    Hub.files = {"recipe.yaml" if ":" not in name else "small.yaml": content}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = ENVIRONMENT | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "transformers_msd.cli", "train", "--config", name, "--dry_run"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps:" in done.stdout


def test_conversations_of_llava_and_sharegpt_are_read(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "picture.png")
    talks = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A picture."},
    ]
    rows = [
        {"id": "1", "image": "picture.png", "conversations": talks},
        {"id": "2", "conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    arguments = DraftArguments(target_model="none", datasets=[str(tmp_path / "mix.json")])
    [seen, told] = load_rows(arguments, is_multimodal=True)
    assert [part["type"] for part in seen["messages"][0]["content"]] == ["image", "text"]
    assert seen["messages"][0]["content"][1]["text"] == "What is it?"
    assert seen["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "A picture."}]}
    assert [picture.size for picture in seen["images"]] == [(8, 6)]
    assert told["images"] == []
    [text] = load_rows(arguments, is_multimodal=False)
    assert text["messages"][0] == {"role": "user", "content": "Hello."}


@pytest.mark.parametrize("is_list", [False, True], ids=["texts", "turns"])
def test_prompts_and_completions_are_read(tmp_path, is_list):
    row = {"prompt": "Who?", "completion": "I."}
    if is_list:
        row = {"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": "I."}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    arguments = DraftArguments(target_model="none", datasets=[str(tmp_path / "rows.json")])
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    assert load_rows(arguments, is_multimodal=False)["messages"] == [turns]
    parts = [turn["content"] for turn in load_rows(arguments, is_multimodal=True)["messages"][0]]
    assert [part["text"] for (part,) in parts] == ["Who?", "I."]


def test_a_template_that_marks_no_answer_is_told_before_training(world, tmp_path):
    shutil.copytree(world / "target", tmp_path / "target")
    template = tmp_path / "target/chat_template.jinja"
    marked = template.read_text()
    template.write_text(re.sub(r"\{%-? *(end)?generation *-?%\}", "", marked))
    assert template.read_text() != marked
    path = write_recipe(world, "unmarked", target_model=str(tmp_path / "target"), stage="multimodal")
    with pytest.raises(SystemExit, match="must mark the assistant's turns"):
        main(["train", "--config", str(path), "--dry_run"])
    main(["train", "--config", str(path), "--dry_run", "--assistant_only_loss", "false"])


def test_held_out_rows_are_of_both_kinds_and_not_trained_on(world):
    rows = load_rows(DraftArguments(**{"target_model": "none", "datasets": [str(world / "rows")]}), True)
    rest, held_out = hold_out(rows, 3, seed=0)
    assert sorted(bool(row["images"]) for row in held_out) == [False] * 3 + [True] * 3
    assert len(rest) == len(rows) - 6
    with pytest.raises(ValueError, match="would hold out all 10 rows of one kind"):
        hold_out(rows, 10, seed=0)


def test_file_of_another_kind_raises(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match="must be JSON, JSONL or Parquet"):
        load_rows(DraftArguments(target_model="none", datasets=[str(tmp_path / "rows.csv")]), True)
    Dataset.from_list([{"text": "hello"}]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="must have a column `messages` or `conversations`"):
        load_rows(DraftArguments(target_model="none", datasets=[str(tmp_path / "rows.jsonl")]), True)


ROWS = {
    "an unknown role": ({"role": "critic", "content": "No."}, "got 'critic' in row 1"),
    "a null text": ({"role": "user", "content": None}, "got null in row 1"),
    "too few pictures": ({"role": "user", "content": "<image> and <image>"}, "got 1 for 2 in row 1"),
    "too many pictures": ({"role": "user", "content": "<image>"}, "got 2 for 1 in row 1"),
    "a picture cut off": ({"role": "user", "content": "<image>"}, "A picture of row 1 can't be read"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cannot_be_trained_on_are_found_before_training(world, tmp_path, name):
    message, reason = ROWS[name]
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:20])
    pictures = {
        "too few pictures": ["red.png"],
        "too many pictures": ["red.png"] * 2,
        "a picture cut off": ["cut.png"],
    }
    answer = {"role": "assistant", "content": "Yes."}
    rows = [
        {"messages": [{"role": "user", "content": "Is it?"}, answer], "images": []},
        {"messages": [message, answer], "images": pictures.get(name, [])},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path = write_recipe(world, "rows-wrong", datasets=[str(tmp_path / "rows.json")], stage="multimodal")
    with pytest.raises(SystemExit, match=reason):
        main(["train", "--config", str(path), "--dry_run"])


def test_a_readme_of_ones_own_stays(tmp_path, caplog):
    values = {"base_model": "a/b", "is_multimodal": True, "tags": []}
    values |= dict.fromkeys(
        ("target_class", "imports", "loading", "method", "tree", "hardware", "dtype", "dataset"), ""
    )
    values |= dict.fromkeys(("num_steps", "rows_per_step", "stage", "num_unroll_steps", "learning_rate"), 1)
    path = tmp_path / "README.md"
    write_card(path, "first", values, [])
    write_card(path, "second", values, [])
    assert "# second" in path.read_text()
    path.write_text("# Mine")
    write_card(path, "third", values, [])
    assert path.read_text() == "# Mine"
    assert "no model card was written" in caplog.text


@pytest.mark.parametrize(
    ("make_recipe", "draft_class"), [(recipe, MSDDraftModel), (vlm_recipe, LlavaForConditionalGeneration)]
)
def test_command_launches_a_run(world, make_recipe, draft_class):
    name = draft_class.__name__
    path = write_recipe(world, name, make_recipe, stage="multimodal", num_processes=1)
    finish(launch(["-m", "transformers_msd.cli", "train", "--config", str(path), "--max_steps", "1"]))
    card = (world / name / "README.md").read_text()
    assert "1 steps of 4 rows" in card
    assert f'{name}.from_pretrained("{name}"' in card
    assert draft_class.from_pretrained(world / name).num_parameters() > 0


@pytest.mark.parametrize("num_processes", [1, 2])
def test_command_generates_data_in_the_targets_words(world, tmp_path, num_processes):
    output = tmp_path / "answered"
    command = ["-m", "transformers_msd.cli", "generate-data", "--target_model", str(world / "target")]
    command += ["--datasets", str(world / "rows"), "--output", str(output), "--num_rows", "6"]
    command += ["--max_new_tokens", "4", "--rows_per_chunk", "2", "--use_cpu"]
    printed = finish(launch([*(TWO_PROCESSES if num_processes == 2 else []), *command]))
    assert "Wrote 6 rows" in printed
    rows = load_rows(DraftArguments(target_model="none", datasets=[str(output)]), is_multimodal=True)
    asked = load_rows(DraftArguments(target_model="none", datasets=[str(world / "rows")]), is_multimodal=True)
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in asked.select(range(6))]
    assert all(row["messages"][1]["role"] == "assistant" for row in rows)
