"""
What drafts for the real LLaVA are trained on: its own answers, generated once and kept as token ids.

    python -m training.real_llava.rows prompts --texts instruct_messages.jsonl --output PROMPTS
    transformers-msd generate-data --target_model LLAVA --datasets PROMPTS --output ANSWERED \\
        --batch_size 16 --max_new_tokens 96 --dtype bfloat16
    python -m training.real_llava.rows pack --answered ANSWERED --target LLAVA          # into answers.npz
    python -m training.real_llava.rows unpack --texts ... --target LLAVA --output ROWS  # prompts and answers again

Half of the prompts are text, the first turns of conversations in the order of the file, and half have pictures of the
tiny world; both follow from the file and a seed, so that the answers are all that is kept. `--num_conversations` adds
conversations as they are, more text than the target could write in that time.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.real_llava.build import ROWS_HELD_OUT, load_texts, text_row
from training.tiny_world.world.rows import FEATURES, training_rows


ANSWERS = Path(__file__).parent / "answers.npz"
LONGEST_PROMPT = 600  # characters


def learned(texts: Dataset) -> Dataset:
    """Leave out the conversations that no model learns from."""
    return texts.select(range(len(texts) - ROWS_HELD_OUT))


def make_prompts(texts: Dataset, num_rows: int) -> list[dict]:
    """Make prompts of one turn: as many of text as with pictures, in turn."""
    rows = learned(texts)
    asked = (row["messages"][0]["content"] for row in rows if row["messages"][0]["role"] == "user")
    text_prompts = (text_row([{"role": "user", "content": said}]) for said in asked if len(said) <= LONGEST_PROMPT)
    picture_prompts = (row for row in training_rows(10**9, seed=8) if row["images"])
    prompts = []
    for _, text, picture in zip(range(num_rows // 2), text_prompts, picture_prompts, strict=False):
        prompts += [text, picture | {"messages": picture["messages"][:1]}]
    return prompts


def pack(answered: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
    """Write answers as token ids, one behind the other, and their lengths."""
    texts = [row["messages"][-1]["content"][0]["text"] for row in answered.select_columns(["messages"])]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if any(tokenizer.decode(own) != text for own, text in zip(ids, texts, strict=True)):
        raise RuntimeError("An answer's tokens don't read as the answer.")
    lengths = np.array([len(own) for own in ids], dtype=np.uint16)
    return {"token_ids": np.concatenate([np.array(own, dtype=np.uint16) for own in ids]), "lengths": lengths}


def unpack(answers: dict[str, np.ndarray], prompts: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Put answers behind their prompts."""
    ends = answers["lengths"].astype(int).cumsum()
    rows = []
    for prompt, end, length in zip(prompts, ends, answers["lengths"], strict=True):
        text = tokenizer.decode(answers["token_ids"][end - int(length) : end].tolist())
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        rows.append(prompt | {"messages": [*prompt["messages"], answer]})
    return Dataset.from_list(rows, features=FEATURES)


def conversations(texts: Dataset, num_rows: int) -> Dataset:
    """Return the last conversations that may be learned from, as they are."""
    rows = learned(texts)
    rows = rows.select(range(len(rows) - num_rows, len(rows)))
    return Dataset.from_list([text_row(row["messages"]) for row in rows], features=FEATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prompts", "pack", "unpack"))
    parser.add_argument("--texts", help="conversations, as for `training.real_llava.build`")
    parser.add_argument("--num_rows", type=int, default=2400)
    parser.add_argument("--answered", type=Path, help="what `generate-data` wrote")
    parser.add_argument("--target", type=Path, help="the real LLaVA, for its tokenizer")
    parser.add_argument("--num_conversations", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "pack":
        packed = pack(load_from_disk(arguments.answered), AutoTokenizer.from_pretrained(arguments.target))
        np.savez_compressed(arguments.output or ANSWERS, **packed)
        print(f"{len(packed['lengths']):,} answers of {len(packed['token_ids']):,} tokens")
        return
    if arguments.what == "prompts":
        rows = Dataset.from_list(make_prompts(load_texts(arguments.texts), arguments.num_rows), features=FEATURES)
    else:
        answers = dict(np.load(ANSWERS))
        texts = load_texts(arguments.texts)
        prompts = make_prompts(texts, len(answers["lengths"]))
        rows = unpack(answers, prompts, AutoTokenizer.from_pretrained(arguments.target))
        if arguments.num_conversations:
            rows = concatenate_datasets([rows, conversations(texts, arguments.num_conversations)])
    rows.save_to_disk(arguments.output)
    print(f"{len(rows):,} rows in {arguments.output}")


if __name__ == "__main__":
    main()
