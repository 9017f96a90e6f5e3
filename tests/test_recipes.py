"""Recipes: all that are shipped can be read, one is found on the Hub, and mistakes in them are told."""

import copy
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
from huggingface_hub import ModelCard
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from training_fixtures import (
    ENVIRONMENT,
    ROOT,
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
from transformers import AutoConfig, LlamaConfig, LlavaForConditionalGeneration

from transformers_msd import Eagle3Config, MSDConfig, MSDDraftModel
from transformers_msd.cli import main
from transformers_msd.trainer import MSDTrainingConfig
from transformers_msd.trainer.arithmetic import measure_throughput, operations_of_step
from transformers_msd.trainer.base import DraftTrainer
from transformers_msd.trainer.dataset import split_rows
from transformers_msd.trainer.plan import GIB, longest_of, memory_of_step, num_parameters
from transformers_msd.trainer.recipe import (
    MOST_BYTES,
    DraftArguments,
    check_hub_recipe,
    find_recipe,
    load_draft_vlm,
    read_recipe,
)
from transformers_msd.trainer.report import write_card
from transformers_msd.trainer.rows import draw, hold_out, load_rows
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
    is_msd = arguments.draft == "msd" and not arguments.draft_vlm
    assert args.stage == ("ramp" if is_msd else "multimodal")
    if arguments.draft in ("eagle3", "block"):
        assert (args.feature_loss_weight, args.token_loss_weight, args.unroll_decay) == (0, 1, 0.8)


def test_fields_of_a_draft_may_stand_on_the_command_line():
    options = ["--target_model", "a/b", "--datasets", "c/d", "--output_dir", "e", "--use_cpu", "--bf16", "false"]
    fields = "{draft_vocab_size: 256, tree_config: {depth: 3}}"
    given = make_parser().parse_args_and_config([*options, "--draft_config", fields])[0]
    assert given.draft_config == {"draft_vocab_size": 256, "tree_config": {"depth": 3}}


def test_plan_tells_what_a_run_will_do(world, capsys):
    path = write_recipe(world, "planned", num_eval_prompts=2, stage="multimodal", num_train_epochs=2)
    main(["train", "--config", str(path), "--dry_run"])
    printed = capsys.readouterr().out
    assert "rows: 8 of text, 28 with pictures" in printed
    assert "steps: 18 of 4 rows" in printed
    assert re.search(r"time: at least \d+ s by arithmetic, [\d.]+ TFLOP at [\d.]+ TFLOP/s\n  as cpu here", printed)
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


def test_plan_goes_by_the_lengths_of_rows(world, monkeypatch):
    monkeypatch.setattr("transformers_msd.trainer.plan.measure_throughput", lambda device, dtype: 1e9)
    plans = {
        length: plan(*make_parser().parse_dict(recipe(world, "short", max_length=length)), num_processes=1)
        for length in (100, 2048, 4096)
    }
    assert plans[2048].memory == plans[4096].memory
    assert 100 < max(plans[2048].lengths) < 300
    assert max(plans[100].lengths) == 100
    assert sum(plans[100].memory.values()) < sum(plans[2048].memory.values())


@pytest.mark.parametrize(
    ("lengths", "num_rows", "longest"), [([5], 3, 5), ([1, 9], 1, 5), ([9, 1], 2, 7), ([1, 9], 99, 9)]
)
def test_batches_are_as_long_as_their_longest_row(lengths, num_rows, longest):
    assert longest_of(lengths, num_rows) == longest


@pytest.mark.parametrize(("device", "share"), [("cpu", 1), ("cuda", 2)])
def test_time_is_operations_over_speed(world, monkeypatch, device, share):
    monkeypatch.setattr("transformers_msd.trainer.plan.measure_throughput", lambda device, dtype: 1e9)
    monkeypatch.setattr("transformers_msd.trainer.run.device_of", lambda name: device)
    parsed = make_parser().parse_dict(recipe(world, "timed", max_steps=7))
    planned = plan(*parsed, num_processes=2)
    assert planned.seconds == pytest.approx(planned.num_operations / 1e9 / share)
    assert planned.num_steps == 7


@pytest.mark.parametrize(
    ("make_recipe", "steps"), [(recipe, 1), (recipe, 3), (eagle3_recipe, 3), (block_recipe, 1), (vlm_recipe, 1)]
)
def test_operations_are_those_that_a_step_makes(world, monkeypatch, make_recipe, steps):
    shapes, compute_loss = [], DraftTrainer.compute_loss

    def noted(self, model, inputs, *args, **kwargs):
        shapes.append((*inputs["input_ids"].shape, int((inputs["labels"] != -100).sum())))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DraftTrainer, "compute_loss", noted)
    settings = make_recipe(world, "counted", stage="multimodal", max_steps=1, num_unroll_steps=steps)
    parsed = make_parser().parse_dict(settings)
    with FlopCounterMode(display=False) as counter:
        trainer = train(*parsed)
    [(num_rows, length, num_supervised)] = shapes
    configs = trainer.target.config, trainer.model.config
    operations = operations_of_step(*configs, parsed[1], num_rows, length, num_supervised / num_rows)
    towers = [own for name, own in counter.get_flop_counts().items() if name.endswith("vision_tower")]
    counted = counter.get_total_flops() - sum(sum(own.values()) for own in towers)
    # Before torch 2.15 the counter sees no attention on a CPU; we leave the ends of unrolled chains in.
    assert sum(operations) == pytest.approx(counted, rel=0.2)


def test_speed_is_measured():
    assert measure_throughput("cpu", torch.float32, seconds=0.01) > 1e8


def test_plan_of_a_draft_vlm(world, capsys):
    path = write_recipe(world, "planned-vlm", vlm_recipe, stage="multimodal")
    main(["train", "--config", str(path), "--dry_run"])
    printed = capsys.readouterr().out
    assert f"draft: {num_parameters(AutoConfig.from_pretrained(world / 'draft_vlm')):,} parameters" in printed
    with pytest.raises(SystemExit, match="are of MSD's features"):
        main(["train", "--config", str(path), "--dry_run", "--num_unroll_steps", "2"])


@pytest.mark.parametrize("beside", [{"draft_model": "a draft"}, {"draft_config": {"intermediate_size": 32}}])
def test_draft_vlm_beside_a_draft_of_msd_raises(world, beside):
    with pytest.raises(ValueError, match="`draft_vlm` takes the place of a draft on features"):
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
    memory = memory_of_step(target, MSDConfig.from_target(target), args, torch.bfloat16, 2048)
    assert memory["target"] == pytest.approx(7.06e9 * 2, rel=0.01)
    assert 14e9 < sum(memory.values()) < 40e9
    assert sum(memory.values()) / GIB == pytest.approx(19, abs=3)


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("learning_rat: 0.1", "learning_rate"),
        ("num_epochs: 3", "num_train_epochs"),
        ("target_dtype: float32", "dtype"),
        ("num_proceses: 2", "num_processes"),
    ],
)
def test_unknown_key_raises(world, unknown, nearest, tmp_path):
    path, name = tmp_path / "wrong.yaml", unknown.partition(":")[0]
    path.write_text(write_recipe(world, "unknown").read_text() + unknown)
    with pytest.raises(SystemExit, match=f"`{name}` is no field of .* Did you mean `{nearest}`?"):
        main(["train", "--config", str(path), "--dry_run"])


@pytest.mark.parametrize("options", [["--dry_run"], []])
def test_a_tree_that_no_block_drafts_is_told_at_once(world, options, tmp_path):
    path = tmp_path / "deep.yaml"
    fields = block_recipe(world, "deep")
    fields["draft_config"] |= {"tree_config": {"num_nodes": 24, "depth": 6, "top_k": 4}}
    path.write_text(yaml.safe_dump(fields))
    if options:
        with pytest.raises(SystemExit, match="`TreeConfig.depth` must be at most 4, .* got 6. Lower it."):
            main(["train", "--config", str(path), *options])
    else:
        arguments, args = make_parser().parse_args_and_config(["--config", str(path)])
        with pytest.raises(ValueError, match="`TreeConfig.depth` must be at most 4, .* got 6. Lower it."):
            train(arguments, args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradient_checkpointing true", "says all levels in one forward, .*`activation_checkpointing=True`"),
        ("--activation_checkpointing true", "says all levels in one forward, .*`activation_checkpointing=True`"),
        ("--num_unroll_steps 2", "says all levels in one forward, .*`num_unroll_steps=2`"),
        ("--prefix_weights true --unroll_decay 0.8", "`prefix_weights` takes the place of `unroll_decay`"),
        ("--feature_loss_weight 1", "does not predict the target's features"),
    ],
)
def test_settings_that_no_block_is_trained_with_are_told_in_a_dry_run(world, options, message, tmp_path):
    path = tmp_path / "block.yaml"
    path.write_text(yaml.safe_dump(block_recipe(world, "block")))
    with pytest.raises(SystemExit, match=message):
        main(["train", "--config", str(path), "--dry_run", *options.split()])


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


HUB_NAMES = ("org/drafts", "org/drafts:small.yaml")
# One process for all names: it takes longer to start than to plan.
PLAN_EACH = """
import sys
from transformers_msd.cli import main
for name in sys.argv[1:]:
    print("plan of", name)
    main(["train", "--config", name, "--dry_run"])
"""


@pytest.fixture(scope="module")
def plans(world, tmp_path_factory):
    """What the command prints of recipes on the Hub, by their names."""
    said = recipe(world, "from-hub")
    del said["output_dir"], said["report_to"]
    recipes = {"recipe.yaml": said | {"max_steps": 3}, "small.yaml": said | {"max_steps": 2}}
    Hub.files = {name: yaml.safe_dump(content).encode() for name, content in recipes.items()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = ENVIRONMENT | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", PLAN_EACH, *HUB_NAMES],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(part.split("\n", 1) for part in done.stdout.split("plan of ")[1:])


@pytest.mark.parametrize("name", HUB_NAMES)
def test_recipe_from_the_hub(plans, name):
    assert f"steps: {2 if ':' in name else 3} of" in plans[name]


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
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": row["prompt"]}]))
    arguments = DraftArguments(target_model="none", datasets=[str(tmp_path / "prompts.json")])
    assert load_rows(arguments, is_multimodal=False)["messages"] == [turns[:1]]


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


def other_layers(target_config):
    """A draft that reads layers which its target does not have."""
    target_config = copy.deepcopy(target_config)
    target_config.get_text_config().num_hidden_layers = 32
    return Eagle3Config.from_target(target_config)


def another_width(target_config):
    """An MSD draft of another target."""
    return MSDConfig.from_target(LlamaConfig(hidden_size=16, num_attention_heads=2))


OTHERS = [
    ({"draft": "eagle3", "draft_config": {"feature_layers": [0, 1, 60]}}, r"hidden states \[0, 1, 60\] of its target"),
    (other_layers, r"hidden states \[2, 16, 29\] of its target, got one of 1 layers"),
    (another_width, "made for a target of `hidden_size` 16"),
]


# `check-parity` takes no settings of a new draft.
CASES = [(*other, way) for other in OTHERS for way in ("train", "plan", "check-parity")]
CASES = [(draft, *case) for draft, *case in CASES if callable(draft) or "check-parity" not in case]


@pytest.mark.parametrize(("draft", "message", "way"), CASES)
def test_a_draft_that_is_not_the_targets_is_told_before_weights_are_read(world, tmp_path, draft, message, way):
    shutil.copytree(world / "target", tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {"target_model": str(tmp_path / "target"), "draft_config": None}
    if isinstance(draft, dict):
        settings |= draft
    else:
        draft(AutoConfig.from_pretrained(world / "target")).save_pretrained(tmp_path / "draft")
        settings["draft_model"] = str(tmp_path / "draft")
    arguments, args = make_parser().parse_dict(recipe(world, "other", **settings))
    words = ["--target_model", arguments.target_model, "--draft_model", str(arguments.draft_model)]
    ways = {
        "train": lambda: train(arguments, args),
        "plan": lambda: plan(arguments, args, 1),
        "check-parity": lambda: main(["check-parity", *words, "--datasets", str(world / "rows")]),
    }
    with pytest.raises((SystemExit, ValueError), match=message):
        ways[way]()


def test_held_out_rows_are_of_both_kinds_and_not_trained_on(world):
    rows = load_rows(DraftArguments(**{"target_model": "none", "datasets": [str(world / "rows")]}), True)
    assert len(draw(rows, 99, seed=0)) == len(rows)  # where nothing is trained, all may be looked at
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
    with pytest.raises(ValueError, match="must have a column `messages`, `conversations` or `prompt`"):
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


def card_values(target, datasets=("a/b",)):
    values = {"target": str(target), "datasets": list(datasets), "is_multimodal": True, "tags": ["x"]}
    values |= {"target_class": "LlavaForConditionalGeneration", "relation": "adapter"}
    values |= dict.fromkeys(("imports", "loading", "method", "tree", "hardware", "dtype"), "")
    return values | dict.fromkeys(("num_steps", "rows_per_step", "stage", "num_unroll_steps", "learning_rate"), 1)


LICENCE = "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\n---\n# A target\n"
CARDS = {
    "a model made here": (None, None, {}),
    "a repository": (None, None, {"base_model": "org/target", "base_model_relation": "adapter"}),
    "a folder": ({}, None, {}),
    "a folder with a card": ({}, LICENCE, {"license": "other", "license_name": "llama2"}),
    "a folder with a card that is broken": ({}, "---\nlicense: [\n---\n", {}),
    "a folder whose config tells its licence": ({"license": "mit"}, None, {"license": "mit"}),
    "a copy of a repository": (
        {"_name_or_path": "org/name"},
        LICENCE,
        {
            **{"base_model": "org/name", "base_model_relation": "adapter", "license": "other"},
            **{"license_name": "llama2", "license_link": "https://huggingface.co/org/name/blob/main/LICENSE"},
        },
    ),
    "a copy of who knows what": ({"_name_or_path": "checkpoints"}, None, {}),
}


@pytest.mark.parametrize("name", CARDS)
def test_card_says_of_the_target_what_is_known(tmp_path, name):
    config, readme, expected = CARDS[name]
    target = "org/target" if "base_model" in expected else ""
    if config is not None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if readme is not None:
        (target / "README.md").write_text(readme)
    write_card(tmp_path / "README.md", "draft", card_values(target), [])
    card = ModelCard.load(tmp_path / "README.md")
    about = {"library_name", "pipeline_tag", "tags", "datasets"}
    assert {key: value for key, value in card.data.to_dict().items() if key not in about} == expected
    place = expected.get("base_model", str(target))
    assert f'LlavaForConditionalGeneration.from_pretrained("{place}"' in card.text
    assert (f"huggingface.co/{place})" in card.text) == ("base_model" in expected)


def test_card_names_datasets_of_the_hub_in_its_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows").mkdir()
    names = ["org/rows", "org/more:config", "data/rows", "/no/where", "a dataset of its own", "json"]
    write_card(tmp_path / "README.md", "draft", card_values("org/target", names), [])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["org/rows", "org/more"]
    assert all(f"`{name}`" in card.text for name in names)


def test_a_readme_of_ones_own_stays(tmp_path, caplog):
    path, values = tmp_path / "README.md", card_values("a/b")
    write_card(path, "first", values, [])
    write_card(path, "second", values, [])
    assert "# second" in path.read_text()
    path.write_text("# Mine")
    write_card(path, "third", values, [])
    assert path.read_text() == "# Mine"
    assert "no model card was written" in caplog.text


@pytest.mark.parametrize(
    ("make_recipe", "draft_class"),
    [(recipe, MSDDraftModel), pytest.param(vlm_recipe, LlavaForConditionalGeneration, marks=pytest.mark.slow)],
)
def test_command_launches_a_run(world, make_recipe, draft_class):
    name = draft_class.__name__
    path = write_recipe(world, name, make_recipe, stage="multimodal", num_processes=1)
    path.write_text(path.read_text().replace("disable_tqdm: true\n", ""))
    options = ["--max_steps", "1", "--num_eval_prompts", "1"]
    printed = finish(launch(["-m", "transformers_msd.cli", "train", "--config", str(path), *options]))
    assert re.search(r"^step 1 of 1, loss [\d.]+, took \d+ s$", printed, re.MULTILINE)
    assert "%|" not in printed  # no bar in a log
    card = (world / name / "README.md").read_text()
    assert "1 steps of 4 rows" in card
    assert f'{name}.from_pretrained("{world / name}"' in card
    assert "speed-up on" in printed
    assert draft_class.from_pretrained(world / name).num_parameters() > 0


@pytest.mark.parametrize("num_processes", [1, 2])
def test_command_generates_data_in_the_targets_words(world, tmp_path, capfd, num_processes):
    output = tmp_path / "answered"
    command = ["generate-data", "--target_model", str(world / "target")]
    command += ["--datasets", str(world / "rows"), "--output", str(output), "--num_rows", "6"]
    command += ["--max_new_tokens", "4", "--rows_per_chunk", "2", "--device", "cpu"]
    if num_processes == 1:
        main(command)
        printed = "".join(capfd.readouterr())
    else:
        printed = finish(launch([*TWO_PROCESSES, "-m", "transformers_msd.cli", *command]))
    assert "Wrote 6 rows" in printed
    assert f"row {'of its own 4 of 4' if num_processes == 2 else '6 of 6'}, took" in printed
    assert "%|" not in printed
    rows = load_rows(DraftArguments(target_model="none", datasets=[str(output)]), is_multimodal=True)
    asked = load_rows(DraftArguments(target_model="none", datasets=[str(world / "rows")]), is_multimodal=True)
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in asked.select(range(6))]
    assert all(row["messages"][1]["role"] == "assistant" for row in rows)
