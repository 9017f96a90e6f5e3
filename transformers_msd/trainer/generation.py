"""Training data in the target's own words: it answers the prompts of a dataset itself."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from transformers_msd.trainer.fields import check_least, check_types
from transformers_msd.trainer.loading import encode_prompts
from transformers_msd.trainer.progress import Progress


@dataclass(frozen=True)
class GenerationSettings:
    """
    How prompts are answered.

    Args:
        batch_size (`int`, *optional*, defaults to 8):
            Prompts answered together.
        max_new_tokens (`int`, *optional*, defaults to 512):
            Longest answer.
        temperature (`float`, *optional*, defaults to 0.0):
            Temperature of sampling; 0 is greedy.
        seed (`int`, *optional*, defaults to 0):
            Seed of sampling. What a chunk samples follows from it and the chunk's number.
        rows_per_chunk (`int`, *optional*, defaults to 256):
            Rows that are saved together: an interrupted run loses at most one chunk of each process.
    """

    batch_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    rows_per_chunk: int = 256

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, batch_size=1, max_new_tokens=1, temperature=0, rows_per_chunk=1)


def generate_data(
    target: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Dataset,
    output: Path,
    settings: GenerationSettings,
) -> Dataset | None:
    """
    Answer every user turn of the rows, one turn after the other, earlier answers as context.

    Chunks are dealt to the processes of the run, and those that an earlier run finished are kept.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target, on the device of this process.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor.
        rows (`Dataset`):
            Rows of `messages`, and `images`; answers in them are replaced.
        output (`Path`):
            Folder that the finished dataset is saved to.
        settings ([`GenerationSettings`]):
            How prompts are answered.

    Returns:
        `Dataset` or `None`: The dataset in the main process, None in the others.

    Raises:
        ValueError: If `output` holds something else, or chunks of other settings.
    """
    state = PartialState()
    parts = output.with_name(f"{output.name}.parts")
    if output.exists():
        raise ValueError(f"{output} exists already. Remove it, or choose another folder.")
    stamp = f"{settings} {rows._fingerprint} {target.config.name_or_path}"
    if state.is_main_process:
        parts.mkdir(parents=True, exist_ok=True)
        known = parts / "settings.txt"
        if known.exists() and known.read_text() != stamp:
            raise ValueError(
                f"{parts} holds chunks of another run ({known.read_text()}). Finish that run, or remove the folder."
            )
        known.write_text(stamp)
    state.wait_for_everyone()
    starts = range(0, len(rows), settings.rows_per_chunk)
    chunks = [parts / f"{number:05}" for number in range(len(starts))]
    mine = range(state.process_index, len(chunks), state.num_processes)
    waiting = [number for number in mine if not chunks[number].exists()]
    selected = [range(start, min(start + settings.rows_per_chunk, len(rows))) for start in starts]
    num_rows, num_done = {number: len(selected[number]) for number in waiting}, 0
    # Processes have equal shares: the first tells how far all are.
    unit, is_shown = "row of its own" if state.num_processes > 1 else "row", state.is_main_process and bool(waiting)
    with Progress(unit, sum(num_rows.values()), is_shown=is_shown) as progress:

        def on_batch(number: int, share: float) -> None:
            progress.update(num_done + int(share * num_rows[number]))

        for number in waiting:
            torch.manual_seed(settings.seed * 1_000_003 + number)
            chunk = rows.select(selected[number])
            answered = answer_rows(target, processing_class, chunk, settings, partial(on_batch, number))
            num_done += num_rows[number]
            unfinished = chunks[number].with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            answered.save_to_disk(unfinished)
            unfinished.rename(chunks[number])  # whole or not there
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    dataset = concatenate_datasets([load_from_disk(chunk) for chunk in chunks])
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    dataset.save_to_disk(unfinished)
    unfinished.rename(output)
    shutil.rmtree(parts)
    return load_from_disk(output)


def answer_rows(
    target: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Dataset,
    settings: GenerationSettings,
    on_batch: Callable[[float], None] | None = None,
) -> Dataset:
    """
    Answer all user turns of some rows. Rows without a user turn are left out.

    Args:
        target, processing_class, rows, settings:
            As [`generate_data`] has them.
        on_batch (`Callable`, *optional*):
            Called with the share of the turns that are answered after each batch.
    """
    waiting = [[turn for turn in messages if turn["role"] != "assistant"] for messages in rows["messages"]]
    num_answered, num_turns = 0, sum(turn["role"] == "user" for turns in waiting for turn in turns)
    talks: list[list[dict[str, Any]]] = [[] for _ in waiting]
    images = [row.get("images") or [] for row in rows]
    while pending := [row for row, turns in enumerate(waiting) if any(turn["role"] == "user" for turn in turns)]:
        for row in pending:
            while True:  # a system turn comes with the user's turn after it
                talks[row].append(waiting[row].pop(0))
                if talks[row][-1]["role"] == "user":
                    break
        # Prompts of similar length are padded least.
        pending.sort(key=lambda row: len(str(talks[row])))
        for start in range(0, len(pending), settings.batch_size):
            batch = pending[start : start + settings.batch_size]
            answers = _answer(
                target, processing_class, [talks[row] for row in batch], [images[row] for row in batch], settings
            )
            for row, answer in zip(batch, answers, strict=True):
                content = (
                    [{"type": "text", "text": answer}] if isinstance(processing_class, ProcessorMixin) else answer
                )
                talks[row].append({"role": "assistant", "content": content})
            num_answered += len(batch)
            if on_batch is not None:
                on_batch(num_answered / num_turns)
    kept = [row for row, talk in enumerate(talks) if talk]
    features = rows.features
    return rows.select(kept).map(
        lambda row, number: row | {"messages": talks[kept[number]]}, with_indices=True, features=features
    )


@torch.no_grad()
def _answer(
    target: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    talks: list[list[dict[str, Any]]],
    images: list[list[Any]],
    settings: GenerationSettings,
) -> list[str]:
    if isinstance(processing_class, ProcessorMixin):
        talks = [prepare_multimodal_messages(talk, images=own) for talk, own in zip(talks, images, strict=True)]
    inputs = encode_prompts(processing_class, talks).to(target.device)
    sampling = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    sequences = target.generate(**inputs, **sampling, max_new_tokens=settings.max_new_tokens)
    new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
    return [answer.strip() for answer in processing_class.batch_decode(new_tokens, skip_special_tokens=True)]
