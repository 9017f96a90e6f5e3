"""Which rows of a dataset can be trained on, told without decoding a picture."""

import logging
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import PIL.Image
import pyarrow.compute
import torch
from datasets import Dataset, Image, List
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages


logger = logging.getLogger(__name__)
_KINDS = {"image", "text"}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def num_pictures_of_rows(dataset: Dataset) -> list[int]:
    """Count the pictures of each row."""
    name = next((name for name in ("images", "image") if name in dataset.column_names), None)
    if name is None:
        return [0] * len(dataset)
    column = dataset.with_format("arrow")[:][name]
    if name == "images":
        return pyarrow.compute.list_value_length(column).fill_null(0).to_pylist()
    return pyarrow.compute.is_valid(column).cast("int64").to_pylist()


def split_rows(dataset: Dataset) -> tuple[list[int], list[int]]:
    """Tell the rows without pictures from those with."""
    counts = num_pictures_of_rows(dataset)
    rows = range(len(dataset))
    return [row for row in rows if not counts[row]], [row for row in rows if counts[row]]


def rows_of_stage(dataset: Dataset, stage: str) -> tuple[list[int], list[int]]:
    """Tell the rows without pictures from those with, and raise a `ValueError` where a stage lacks what it needs."""
    text_rows, visual_rows = split_rows(dataset)
    if (stage != "multimodal" and not text_rows) or (stage == "ramp" and not visual_rows):
        raise ValueError(
            f"`stage={stage!r}` needs rows without pictures, and `ramp` also some with, got {len(text_rows)} without "
            f"and {len(visual_rows)} with. Add rows or choose another stage."
        )
    return text_rows, visual_rows


def check_messages(dataset: Dataset) -> None:
    """
    Raise a `ValueError`, with the number of the row, for messages that can't be trained on, or if none of them is of
    the assistant.
    """
    if "messages" not in dataset.column_names:
        return
    has_answer = False
    rows = zip(dataset.select_columns(["messages"]), num_pictures_of_rows(dataset), strict=True)
    for number, (row, num_pictures) in enumerate(rows):
        num_places = 0
        for message in row["messages"] or ():
            role, content = message.get("role"), message.get("content")
            if role not in _ROLES:
                raise ValueError(f"Roles must be some of {_ROLES}, got {role!r} in row {number}. Rename it.")
            has_answer |= role == "assistant"
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            kinds = {part.get("type") for part in parts}
            if not kinds <= _KINDS:
                found = sorted(map(str, kinds - _KINDS))
                raise ValueError(
                    f"Parts of messages must be some of {sorted(_KINDS)}, got {found} in row {number}. Take it out."
                )
            if any(part["type"] == "text" and part.get("text") is None for part in parts):
                raise ValueError(f"Messages must hold text, got null in row {number}. Fill it in or take the row out.")
            num_places += sum(part["type"] == "image" for part in parts)
        if num_places and num_places != num_pictures:
            raise ValueError(
                f"A row must have a picture for each of its places, got {num_pictures} for {num_places} in row "
                f"{number}. Add what is missing or take the row out."
            )
    if not has_answer:
        raise ValueError(
            "The dataset must hold turns of the assistant, which are what a draft learns from, and none of its "
            f"{len(dataset)} rows does. Let the target answer them: `transformers-msd generate-data`."
        )


def usable_rows(
    dataset: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    """Return the rows that training takes: see [`check_messages`] and [`drop_long_rows`]."""
    check_messages(dataset)
    if isinstance(processing_class, ProcessorMixin) and max_length is not None:
        return drop_long_rows(dataset, processing_class, max_length)
    return dataset


def drop_long_rows(dataset: Dataset, processor: ProcessorMixin, max_length: int) -> Dataset:
    """
    Drop the rows with pictures that are longer than `max_length` tokens, since their image tokens must not be cut.

    Rows of text alone are left to be cut in training.

    Raises:
        ValueError: If all rows with pictures are too long, or a picture can't be read.
    """
    _, visual_rows = split_rows(dataset)
    if not visual_rows:
        return dataset
    pictures = undecoded(dataset)
    lengths = {row: row_length(pictures[row], row, processor) for row in visual_rows}
    too_long = {row for row, length in lengths.items() if length > max_length}
    if not too_long:
        return dataset
    if len(too_long) == len(visual_rows):
        raise ValueError(
            f"All {len(too_long)} rows with pictures are longer than `max_length={max_length}`; the shortest has "
            f"{min(lengths.values())} tokens. Raise `max_length`, or let the processor make smaller pictures."
        )
    logger.warning(
        "%d of %d rows with pictures are longer than `max_length=%d` and were dropped.",
        len(too_long),
        len(visual_rows),
        max_length,
    )
    return dataset.select([row for row in range(len(dataset)) if row not in too_long])


def undecoded(dataset: Dataset) -> Dataset:
    """Return a dataset whose pictures are files, as paths or bytes."""
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif feature == List(Image()):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def row_length(row: dict[str, Any], number: int, processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> int:
    """
    Count the tokens of a row, every picture expanded.

    Args:
        row (`dict[str, Any]`):
            A row of an [`undecoded`] dataset.
        number (`int`):
            Its number, for errors.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the target.
    """
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    if not isinstance(processing_class, ProcessorMixin):
        return len(processing_class.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    pictures = row["images"] if "images" in row else [row["image"]] if row.get("image") else []
    sizes = [_picture_size(picture, number) for picture in pictures]
    text = processing_class.apply_chat_template(prepare_multimodal_messages(messages, images=sizes), tokenize=False)
    tokenizer = processing_class.tokenizer
    # As Transformers does: the tokenizer adds what the chat template has not.
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    num_tokens = len(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])
    if not sizes:
        return num_tokens
    # The text holds one token for each picture.
    expanded = processing_class._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    return num_tokens - len(sizes) + sum(expanded)


def _picture_size(picture: dict[str, Any], row: int) -> tuple[int, int]:
    """Return height and width of a picture, from its header."""
    if picture is None:
        raise ValueError(f"A picture of row {row} can't be read: it is null. Repair it or take the row out.")
    try:
        with PIL.Image.open(picture["path"] if picture["bytes"] is None else BytesIO(picture["bytes"])) as opened:
            opened.verify()  # where a format has sums to check
            return opened.height, opened.width
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"A picture of row {row} can't be read ({picture['path'] or 'stored in the dataset'}): {error}. Repair it "
            "or take the row out."
        ) from error


def token_counts(
    dataset: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase, text_config: PreTrainedConfig
) -> torch.Tensor:
    """
    Count how often each token stands where a draft learns, of shape `(vocab_size,)`; those that end a text count most.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows as trainers take them.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the target.
        text_config ([`~transformers.PreTrainedConfig`]):
            Config of the draft's text model.
    """
    return with_ends(answer_counts(dataset, processing_class, text_config.vocab_size), text_config)


def answer_counts(
    dataset: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase, vocab_size: int
) -> torch.Tensor:
    """Count tokens as [`token_counts`] does, but for those that end a turn, of shape `(vocab_size,)`."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for token_ids in answer_token_ids(dataset, processing_class):
        counts += torch.bincount(torch.tensor(token_ids, dtype=torch.long), minlength=vocab_size)
    return counts


def with_ends(counts: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """Return counts of shape `(vocab_size,)` in which the tokens that end a text count most."""
    eos, counts = text_config.eos_token_id, counts.clone()
    counts[[*eos] if isinstance(eos, list) else [eos] if eos is not None else []] = int(counts.sum()) + 1
    return counts


def answer_token_ids(
    dataset: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Yield the tokens of each row that a draft learns from, but for those that end a turn."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    name = next(name for name in ("messages", "completion", "text", "input_ids") if name in dataset.column_names)
    for value in dataset.select_columns([name])[name]:
        if name == "input_ids":
            yield value
        else:
            texts = [value] if isinstance(value, str) else _answers(value)
            tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            yield [token_id for part in tokens for token_id in part]


def _answers(messages: list[dict[str, Any]]) -> list[str]:
    """List what the assistant says in messages."""
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            texts += [part["text"] for part in parts if part.get("text")]
    return texts
