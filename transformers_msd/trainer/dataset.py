"""Which rows of a dataset can be trained on, told without decoding a picture."""

import logging
from io import BytesIO

import PIL.Image
import pyarrow.compute
from datasets import Dataset, Image, List
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages


logger = logging.getLogger(__name__)


def split_rows(dataset: Dataset) -> tuple[list[int], list[int]]:
    """Tell the rows without pictures from those with."""
    name = next((name for name in ("images", "image") if name in dataset.column_names), None)
    if name is None:
        return list(range(len(dataset))), []
    column = dataset.with_format("arrow")[:][name]
    if name == "images":
        is_visual = pyarrow.compute.greater(pyarrow.compute.list_value_length(column).fill_null(0), 0).to_pylist()
    else:
        is_visual = pyarrow.compute.is_valid(column).to_pylist()
    rows = range(len(dataset))
    return [row for row in rows if not is_visual[row]], [row for row in rows if is_visual[row]]


def check_answers(dataset: Dataset) -> None:
    """Raise a `ValueError` if no row of `messages` holds a turn of the assistant."""
    if "messages" not in dataset.column_names:
        return
    rows = dataset.select_columns(["messages"])
    if not any(message["role"] == "assistant" for row in rows for message in row["messages"]):
        raise ValueError(
            "The dataset must hold turns of the assistant, which are what a draft learns from, and none of its "
            f"{len(dataset)} rows does. Let the target answer them: `transformers-msd generate-data`."
        )


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
    if "image" in dataset.column_names:
        undecoded = dataset.cast_column("image", Image(decode=False))
    else:
        undecoded = dataset.cast_column("images", List(Image(decode=False)))
    lengths = {row: _num_tokens(undecoded[row], row, processor) for row in visual_rows}
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


def _num_tokens(row: dict, index: int, processor: ProcessorMixin) -> int:
    """Count the tokens of a row, every picture expanded."""
    pictures = row["images"] if "images" in row else [row["image"]]
    sizes = [_picture_size(picture, index) for picture in pictures]
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    messages = prepare_multimodal_messages(messages, images=sizes)
    text = processor.apply_chat_template(messages, tokenize=False)
    num_tokens = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return num_tokens - len(sizes) + sum(processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens)


def _picture_size(picture: dict, row: int) -> tuple[int, int]:
    """Return height and width of a picture, from its header."""
    try:
        with PIL.Image.open(picture["path"] if picture["bytes"] is None else BytesIO(picture["bytes"])) as opened:
            return opened.height, opened.width
    except OSError as error:
        raise ValueError(
            f"A picture of row {row} can't be read ({picture['path'] or 'stored in the dataset'}): {error}. Repair it "
            "or take the row out."
        ) from error
