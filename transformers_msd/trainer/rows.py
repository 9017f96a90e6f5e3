"""The rows of a recipe: its datasets put together, whatever their layout, and those held out."""

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from transformers_msd.trainer.dataset import split_rows, undecoded
from transformers_msd.trainer.recipe import DraftArguments


_ROLES = {"human": "user", "gpt": "assistant"}
# What rows may have their turns in. The last two are files of questions: Spec-Bench's, MT-Bench's and MMSpec's, and
# with `text`, which alone is no question, LLaVA-Bench's.
_LAYOUTS = ("messages", "conversations", "prompt", "turns", "question_id")
_PARTS = [{"type": Value("string"), "text": Value("string")}]


def load_rows(arguments: DraftArguments, is_multimodal: bool) -> Dataset:
    """Load the datasets of a recipe as one, with `messages`, and `images` for a multimodal target."""
    parts = [_load_one(name, arguments, is_multimodal) for name in arguments.datasets]
    return concatenate_datasets(parts)


def hold_out(dataset: Dataset, num_prompts: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `num_prompts` rows of text and as many with pictures, drawn by a seed; return the rest first."""
    if num_prompts == 0:
        return dataset, dataset.select([])
    for rows in split_rows(dataset):
        if rows and len(rows) <= num_prompts:
            raise ValueError(
                f"`num_eval_prompts={num_prompts}` would hold out all {len(rows)} rows of one kind. Lower it."
            )
    chosen = draw(dataset, num_prompts, seed)
    return dataset.select(sorted(set(range(len(dataset))) - set(chosen))), dataset.select(chosen)


def draw(dataset: Dataset, num_rows: int, seed: int) -> list[int]:
    """Draw `num_rows` rows of text and as many with pictures by a seed, or all there are; return where they stand."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for rows in split_rows(dataset):
        drawn += [rows[i] for i in torch.randperm(len(rows), generator=generator)[:num_rows].tolist()]
    return sorted(drawn)


def _load_one(name: str, arguments: DraftArguments, is_multimodal: bool) -> Dataset:
    path, folder = Path(name), arguments.image_folder
    if path.exists():
        dataset = _load_local(path, arguments.dataset_split)
        folder = folder or (str(path.parent) if path.is_file() else None)
    else:
        repo_id, _, config = name.partition(":")
        dataset = load_dataset(repo_id, config or None, split=arguments.dataset_split)
    if arguments.max_rows_per_dataset and len(dataset) > arguments.max_rows_per_dataset:
        dataset = dataset.shuffle(seed=0).select(range(arguments.max_rows_per_dataset))
    names = set(dataset.column_names)
    if not names & set(_LAYOUTS):
        raise ValueError(
            f"{name} must have a column `messages`, `conversations` or `prompt`, or questions as `turns`, got "
            f"{sorted(names)}. Rename one."
        )
    if not is_multimodal and names & {"images", "image"}:
        dataset = dataset.select(split_rows(dataset)[0])
    if not len(dataset):
        raise ValueError(f"{name} must hold rows{'' if is_multimodal else ' of text alone'}, got none. Leave it out.")
    dataset = undecoded(dataset)
    content = _PARTS if is_multimodal else Value("string")
    features = {"messages": [{"role": Value("string"), "content": content}]}
    if is_multimodal:
        features["images"] = List(Image())
    return dataset.map(
        _normalise,
        with_indices=True,
        fn_kwargs={"name": name, "folder": folder, "is_multimodal": is_multimodal},
        remove_columns=dataset.column_names,
        features=Features(features),
    )


def _load_local(path: Path, split: str) -> Dataset:
    """Load a file, or a folder: one saved by `datasets`, or one of files."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if path.is_file() and kind is None:
        raise ValueError(f"A dataset file must be JSON, JSONL or Parquet, got {str(path)!r}. Convert it.")
    try:
        if path.is_file():
            return load_dataset(kind, data_files=str(path), split="train")
        if (path / "dataset_info.json").exists():
            return load_from_disk(str(path))
        return load_dataset(str(path), split=split)
    except (DatasetGenerationError, OSError, StopIteration, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        raise ValueError(f"The dataset {path} can't be read: {reason}. Repair or convert it.") from error


def _normalise(row: dict[str, Any], number: int, name: str, folder: str | None, is_multimodal: bool) -> dict[str, Any]:
    """Write a row as `messages`, of parts where the target is multimodal, and `images`."""
    try:
        return _written(row, folder, is_multimodal)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"Row {number} of {name} must hold `messages` with `role` and `content`, `conversations` with `from` and "
            f"`value`, `prompt` and `completion`, or questions as `turns` or `text`, and `images` as paths, got "
            f"{str(row)[:200]} ({error}). Repair it or take it out."
        ) from error


def _written(row: dict[str, Any], folder: str | None, is_multimodal: bool) -> dict[str, Any]:
    messages = _messages(row)
    if not is_multimodal:
        return {"messages": [{"role": turn["role"], "content": _text(turn["content"])} for turn in messages]}
    pictures = row.get("images") or ([row["image"]] if row.get("image") else [])
    if not isinstance(pictures, list):
        raise TypeError("`images` is no list")
    messages = [{"role": turn["role"], "content": _parts(turn["content"])} for turn in messages]
    num_places = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if num_places == 0 and pictures:
        first = next((turn for turn in messages if turn["role"] == "user"), messages[0])
        first["content"] = [{"type": "image", "text": None} for _ in pictures] + first["content"]
    return {"messages": messages, "images": [_located(picture, folder) for picture in pictures]}


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a row, whichever of the layouts it has."""
    if row.get("messages"):
        return row["messages"]
    if row.get("conversations"):
        said = row["conversations"]
        return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in said]
    asked = row.get("turns") or ("question_id" in row and row.get("text"))
    # Beside a prompt, `text` is often the whole of it and the answer.
    if row.get("prompt") is None and asked:
        questions = [str.strip(question) for question in ([asked] if isinstance(asked, str) else asked)]
        if not all(questions):
            raise TypeError("a question is empty")
        return [{"role": "user", "content": question} for question in questions]
    turns = []
    said_by = {"user": row["prompt"]} | ({"assistant": row["completion"]} if "completion" in row else {})
    for role, said in said_by.items():
        turns += said if isinstance(said, list) else [{"role": role, "content": said}]
    return turns


def _text(content: str | list[dict[str, Any]] | None) -> str | None:
    return content if content is None or isinstance(content, str) else "".join(part["text"] or "" for part in content)


def _parts(content: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Write content as parts, the marker `<image>` of LLaVA's data as a picture."""
    if content is None:
        return [{"type": "text", "text": None}]  # found by `check_messages`, which knows the row
    if not isinstance(content, str):
        return [{"type": part["type"], "text": part.get("text")} for part in content]
    pieces = re.split(r"\n?(<image>)\n?", content)
    parts = [{"type": "image" if piece == "<image>" else "text", "text": piece} for piece in pieces if piece]
    return [part | {"text": None} if part["type"] == "image" else part for part in parts]


def _located(picture: Any, folder: str | None) -> Any:
    """Make the path of a picture one that can be opened from here, beside the file or in a folder `images` there."""
    if isinstance(picture, str):
        paths = [Path(folder or ".", *between, picture) for between in ((), ("images",))]
        return str(next((path for path in paths if path.exists()), paths[0]))
    if not isinstance(picture, bytes | dict):
        raise TypeError(f"a picture is {picture!r}")
    if isinstance(picture, dict) and picture.get("bytes") is None and folder:
        return {"bytes": None, "path": _located(picture["path"], folder)}
    return picture
