"""Rows and files that can't be trained on: told with the row's number, and the good ones around them are taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("trl")

from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin

from training.tiny_world.build.target import build_processor
from training.tiny_world.world.rows import FEATURES
from transformers_msd.trainer.dataset import usable_rows
from transformers_msd.trainer.recipe import DraftArguments
from transformers_msd.trainer.rows import load_rows


def talk(*said: Any, images: Any = (), **more: Any) -> dict[str, Any]:
    """A row in which user and assistant take turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]
    return {"messages": turns, "images": list(images) if isinstance(images, tuple) else images} | more


def said_by(role: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "images": []}


def parts(*kinds: str) -> dict[str, Any]:
    """A row of one text target's answer to parts of these kinds."""
    asked = [{"type": kind, "text": "Hi" if kind == "text" else None} for kind in kinds]
    return talk(asked, [{"type": "text", "text": "Ho"}], images=("a.png",) * kinds.count("image"))


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return build_processor(num_rows=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    Image.effect_noise((32, 32), 64).convert("RGB").save(folder / "a.png")
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "header.png").write_bytes(data[:10])
    (folder / "empty.png").write_bytes(b"")
    return folder


GOOD = talk("<image>Hi", "Ho", images=("a.png",))
FROM = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
# Rows, all but the last of which are good, and what is said of the last.
ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "half a picture": (
        [GOOD, talk("<image>Hi", "Ho", images=("cut.png",))],
        "row 1 can't be read.*cut.png",
    ),
    "a picture cut early": ([GOOD, talk("<image>Hi", "Ho", images=("header.png",))], "picture of row 1.*header.png"),
    "an empty picture": ([GOOD, talk("<image>Hi", "Ho", images=("empty.png",))], "picture of row 1.*empty.png"),
    "no picture": ([GOOD, talk("<image>Hi", "Ho", images=("none.png",))], "picture of row 1.*none.png"),
    "a null picture": ([GOOD, talk("<image>Hi", "Ho", images=(None,))], "Row 1 .*a picture is None"),
    "a number as picture": ([talk("<image>Hi", "Ho", images=(3,))], "Row 0 .*a picture is 3"),
    "a name as pictures": ([talk("<image>Hi", "Ho", images="a.png")], "Row 0 .*`images` is no list"),
    "too few pictures": ([GOOD, talk("<image><image>Hi", "Ho", images=("a.png",))], "got 1 for 2 in row 1"),
    "too many pictures": ([GOOD, talk("<image>Hi", "Ho", images=("a.png",) * 2)], "got 2 for 1 in row 1"),
    "no pictures": ([GOOD, talk("<image>Hi", "Ho", images=None)], "got 0 for 1 in row 1"),
    "null text": ([GOOD, talk(None, "Ho")], "must hold text, got null in row 1"),
    "null answer": ([GOOD, talk("Hi", None)], "must hold text, got null in row 1"),
    "null messages": ([GOOD, {"messages": None, "images": []}], "Row 1 .*must hold `messages`"),
    "no messages": ([GOOD, {"messages": [], "images": []}], "Row 1 .*must hold `messages`"),
    "an unknown role": ([GOOD, said_by("robot")], "Roles must be some of.*got 'robot' in row 1"),
    "a null role": ([GOOD, said_by(None)], "Roles must be some of.*got None in row 1"),
    "an unknown speaker": (
        [FROM, {"conversations": [{"from": "robot", "value": "Hi"}]}],
        "Roles must be some of.*got 'robot' in row 1",
    ),
    "messages without roles": ([{"messages": [{"content": "Hi"}]}], "Row 0 .*must hold `messages`"),
    "messages of strings": ([{"messages": ["Hi", "Ho"]}], "Row 0 .*must hold `messages`"),
    "messages as a string": ([{"messages": "Hi"}], "Row 0 .*must hold `messages`"),
    "conversations of messages": ([{"conversations": GOOD["messages"]}], "Row 0 .*`conversations` with `from`"),
    "numbers as content": ([talk(3, 4)], "Row 0 .*must hold `messages`"),
    "a video": ([parts("text"), parts("video")], "must be some of .*got .'video'. in row 1"),
    "parts without a kind": ([talk([{"text": "Hi"}], [{"text": "Ho"}])], "Row 0 .*'type'"),
    "null completion": ([{"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": None}], "null in row 1"),
    "no answers": ([talk("Hi")], "must hold turns of the assistant.*none of its 1 rows"),
    "another layout": ([{"question": "Hi", "answer": "Ho"}], "must have a column `messages`"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_cannot_be_is_told_by_its_number(
    name: str, folder: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows, message = ROWS[name]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = DraftArguments(target_model="none", datasets=[str(path)])
    with pytest.raises(ValueError, match=message):
        usable_rows(load_rows(arguments, is_multimodal=True), processor, 2048)
    assert path.read_text() == "\n".join(map(json.dumps, rows))
    if len(rows) > 1:
        path.write_text(json.dumps(rows[0]))
        assert len(usable_rows(load_rows(arguments, is_multimodal=True), processor, 2048)) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [talk("Hi", "Ho", images=("a.png", "a.png"))],
        [talk("Hi", "Ho"), talk("Hi")],
        [{**talk("Hi", "Ho"), "conversations": None}, {"messages": None, "images": None, **FROM}],
        [parts("image", "text", "image")],
    ],
    ids=["places are made", "some rows are answered", "two layouts", "parts"],
)
def test_their_neighbours_are_taken(rows: list[dict[str, Any]], folder: Path, processor: ProcessorMixin) -> None:
    path = folder / "neighbours.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = DraftArguments(target_model="none", datasets=[str(path)])
    assert len(usable_rows(load_rows(arguments, is_multimodal=True), processor, 2048)) == len(rows)


def written(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def saved_and_cut(folder: Path) -> Path:
    Dataset.from_list([talk("Hi", "Ho")]).save_to_disk(folder / "saved")
    shutil.rmtree(folder / "other", ignore_errors=True)
    (folder / "saved").rename(folder / "other")
    next((folder / "other").glob("*.arrow")).unlink()
    return folder / "other"


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty file": (written("a.jsonl", b""), "can't be read: it is empty"),
    "half a file": (written("a.jsonl", json.dumps(GOOD).encode()[:-9]), "can't be read"),
    "no JSON": (written("a.json", b"\xff\xfe"), "can't be read"),
    "no Parquet": (written("a.parquet", b"PAR1"), "can't be read"),
    "another kind of file": (written("a.csv", b"a,b"), "must be JSON, JSONL or Parquet"),
    "an empty folder": (lambda folder: folder, "can't be read"),
    "half a saved dataset": (saved_and_cut, "can't be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make, message = FILES[name]
    (tmp_path / "rows").mkdir()
    path = make(tmp_path / "rows")
    with pytest.raises(ValueError, match=message):
        load_rows(DraftArguments(target_model="none", datasets=[str(path)]), is_multimodal=True)


def test_a_dataset_of_pictures_alone_is_told_to_a_target_of_text(folder: Path) -> None:
    path = folder / "pictures.jsonl"
    arguments = DraftArguments(target_model="none", datasets=[str(path)])
    path.write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="must hold rows of text alone, got none"):
        load_rows(arguments, is_multimodal=False)
    path.write_text("\n".join(map(json.dumps, [GOOD, talk("Hi", "Ho")])))
    assert len(load_rows(arguments, is_multimodal=False)) == 1


def test_a_null_picture_of_a_dataset_is_told(processor: ProcessorMixin) -> None:
    rows = Dataset.from_list([parts("image", "text") | {"images": [None]}], features=FEATURES)
    with pytest.raises(ValueError, match="A picture of row 0 can't be read: it is null"):
        usable_rows(rows, processor, 2048)
