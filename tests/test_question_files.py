"""Files of questions as benchmarks publish them are read as they are, and answered with or without a draft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch


pytest.importorskip("trl")

from datasets import load_from_disk
from PIL import Image

from training.tiny_world.build.target import CHECKPOINT
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.build.train_draft_vlm import DRAFT_VLM_CHECKPOINT
from transformers_msd import cli
from transformers_msd.trainer.callbacks import prompt_of
from transformers_msd.trainer.recipe import DraftArguments
from transformers_msd.trainer.rows import load_rows


SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval_prompts"
FIRST, SECOND = "Describe the picture.", "How many shapes are there?"
# A row of each file, and where its picture lies beside it.
LAYOUTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "Spec-Bench": ({"question_id": 81, "category": "writing", "turns": [FIRST, SECOND]}, None),
    "MT-Bench": ({"question_id": 81, "category": "writing", "turns": [FIRST, SECOND], "reference": ["", ""]}, None),
    "MMSpec": (
        {"id": "mmspec_001", "image": "1.png", "turns": [FIRST, SECOND], "category": "default", "topic": "vqa"},
        "images/1.png",
    ),
    "LLaVA-Bench": ({"image": "1.png", "text": FIRST, "category": "conv", "question_id": 0}, "1.png"),
}


def write(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    row, picture = LAYOUTS[name]
    if picture is not None:
        (folder / picture).parent.mkdir(exist_ok=True)
        Image.new("RGB", (96, 96), "white").save(folder / picture)
    path = folder / "question.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path, row


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read(name: str, tmp_path: Path) -> None:
    path, row = write(tmp_path, name)
    rows = load_rows(DraftArguments(target_model="a/b", datasets=[str(path)]), is_multimodal=True)
    messages = rows[0]["messages"]
    has_picture = "image" in row
    assert [message["role"] for message in messages] == ["user"] * len(row.get("turns", [0]))
    kinds = [part["type"] for part in messages[0]["content"]]
    assert kinds == (["image"] if has_picture else []) + ["text"]
    assert messages[0]["content"][-1]["text"] == FIRST
    assert [picture.size for picture in rows[0]["images"]] == [(96, 96)] * has_picture
    # Asked is the first question: what follows refers to an answer that nobody gave.
    prompt = prompt_of(rows[0])
    assert len(prompt) == 1
    assert prompt[0]["content"][-1]["text"] == FIRST
    answered = {"messages": [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "Two."}]}]}
    assert len(prompt_of(answered | {"images": rows[0]["images"]})) == 1


def said_in(path: Path) -> list[list[tuple[str, str]]]:
    rows = load_rows(DraftArguments(target_model="a/b", datasets=[str(path)]), is_multimodal=False)
    return [[(message["role"], message["content"]) for message in row["messages"]] for row in rows]


ASKED, ANSWERED = ("user", FIRST), ("assistant", "Two.")
# Columns that stand beside one another, and what is read of them.
COLUMNS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "a text that repeats prompt and completion": (
        {"text": f"{FIRST} Two.", "prompt": FIRST, "completion": "Two."},
        [ASKED, ANSWERED],
    ),
    "a prompt that other rows have": ({"turns": [FIRST], "prompt": None}, [ASKED]),
    "one turn without a list": ({"turns": f" {FIRST}\n"}, [ASKED]),
    "turns of a talk with answers": (
        {
            "turns": [SECOND],
            "messages": [{"role": "user", "content": FIRST}, {"role": "assistant", "content": "Two."}],
        },
        [ASKED, ANSWERED],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_beside_one_another_are_read_as_one_talk(name: str, tmp_path: Path) -> None:
    row, said = COLUMNS[name]
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert said_in(path) == [said]


def turn(role: str, num_pictures: int = 0) -> dict[str, Any]:
    pictures = [{"type": "image", "text": None}] * num_pictures
    return {"role": role, "content": [*pictures, {"type": "text", "text": role}]}


# Turns with their pictures, and how many turns and pictures are asked.
TALKS: dict[str, tuple[list[dict[str, Any]], int, int]] = {
    "a follow-up with a picture of its own": ([turn("user", 1), turn("user", 2)], 1, 1),
    "a system turn before the follow-up": ([turn("system"), turn("user", 1), turn("system"), turn("user")], 2, 1),
    "a follow-up after an answer": ([turn("user"), turn("assistant"), turn("user", 1), turn("user", 1)], 3, 1),
    "an assistant that begins": ([turn("assistant"), turn("user", 1), turn("assistant")], 2, 1),
    "a picture without a place": ([{"role": "user", "content": word} for word in (FIRST, SECOND)], 1, 1),
}


@pytest.mark.parametrize("name", TALKS)
def test_a_prompt_ends_with_its_question_and_has_its_pictures(name: str) -> None:
    messages, num_turns, num_pictures = TALKS[name]
    parts = [part for message in messages for part in message["content"]]
    places = sum(isinstance(part, dict) and part["type"] == "image" for part in parts)
    images = [Image.new("RGB", (place, 1)) for place in range(1, max(places, 1) + 1)]
    prompt = prompt_of({"messages": messages, "images": images})
    assert [message["role"] for message in prompt] == [message["role"] for message in messages[:num_turns]]
    seen = [part["image"].width for message in prompt for part in message["content"] if part["type"] == "image"]
    assert seen == list(range(1, num_pictures + 1))
    assert prompt_of({"messages": messages}) == messages[:num_turns]


def test_what_is_no_question_is_told(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    for row in (
        '{"turns": [{"a": 1}]}',
        '{"turns": [" "]}',
        '{"turns": [null, "a"]}',
        '{"question_id": 1, "text": "\\n"}',
        '{"question_id": 1, "text": 5}',
    ):
        path.write_text(f"{row}\n")
        with pytest.raises(ValueError, match=r"Row 0 of .* must hold `messages`"):
            said_in(path)
    # A corpus is no list of questions.
    path.write_text('{"text": "Once upon a time."}\n')
    with pytest.raises(ValueError, match="must have a column `messages`, `conversations` or `prompt`, or"):
        load_rows(DraftArguments(target_model="a/b", datasets=[str(path)]), is_multimodal=False)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the published files")
@pytest.mark.parametrize("file", ["spec_bench/question.jsonl", "eagle/mt_bench.jsonl", "eagle/humaneval.jsonl"])
def test_published_files_are_read_whole(file: str) -> None:
    rows = load_rows(DraftArguments(target_model="a/b", datasets=[str(SHARED / file)]), is_multimodal=False)
    said = [json.loads(line) for line in (SHARED / file).read_text().splitlines() if line.strip()]
    assert len(rows) == len(said)
    for row, one in zip(rows, said, strict=True):
        assert [message["content"] for message in row["messages"]] == [turn.strip() for turn in one["turns"]]


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_answers_are_the_same_with_a_draft(temperature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write(tmp_path, "MMSpec")
    count = 0

    def count_one(*_: Any) -> None:
        nonlocal count
        count += 1

    answers, forwards = [], []
    for name, draft in (("plain", None), ("msd", DRAFT_CHECKPOINT), ("vlm", DRAFT_VLM_CHECKPOINT)):
        command = ["generate-data", "--target_model", str(CHECKPOINT), "--datasets", str(path)]
        command += ["--output", str(tmp_path / name), "--max_new_tokens", "32", "--temperature", temperature]
        command += [] if draft is None else ["--draft_model", str(draft)]
        count = 0
        with torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: count_one() if type(module).__name__ == "LlavaForConditionalGeneration" else None
        ):
            cli.main([*command, "--device", "cpu", "--dtype", "float32"])
        answers.append(load_from_disk(tmp_path / name)["messages"])
        forwards.append(count)
    assert [message["role"] for message in answers[0][0]] == ["user", "assistant"] * 2
    assert answers[0] == answers[1] == answers[2]
    assert forwards[1] < forwards[0] * (0.5 if temperature == "0" else 0.9)
