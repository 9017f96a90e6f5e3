"""The worlds in which claims are tried: what they show is what they say, and it comes again from a seed."""

import json
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch


pytest.importorskip("datasets")

import numpy as np
from datasets import Dataset, load_from_disk
from transformers import AutoConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from training.evidence.full_size import INDEX, published_name
from training.glyph_world.world import (
    BEFORE,
    BITMAPS,
    KINDS,
    NAMES,
    PICTURES,
    build_processor,
    draw_glyphs,
    make_row,
    ordered_dataset,
    prompts_by_kind,
    rows,
)
from training.real_llava.first_layers import first_layers
from training.real_llava.measure import floor
from training.real_llava.rows import main as unpack_rows
from training.real_llava.rows import pack, unpack
from training.tiny_world.build.target import load_target
from training.tiny_world.world.rows import FEATURES
from transformers_msd import BlockDraftConfig, BlockDraftModel, MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.traits.sizes import num_bytes_per_step
from transformers_msd.trees.topology import EAGLE


LLAVA = Path(__file__).parents[2] / "shared" / "data" / "processors" / "llava-1.5-7b-hf"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_a_word_for_every_glyph(kind):
    row = make_row(kind, Random(0))
    answer = row["messages"][1]["content"][0]["text"]
    assert bool(row["images"]) == (kind in PICTURES)
    glyphs = [word for word in answer.split() if word in NAMES]
    assert len(glyphs) in (24, 30, 36)
    assert answer.startswith(BEFORE)
    assert row == make_row(kind, Random(0))


def test_glyphs_differ_in_what_is_drawn():
    assert min((one ^ other).bit_count() for one in BITMAPS for other in BITMAPS if one != other) >= 5
    pictures = {draw_glyphs([glyph], Random(0)).tobytes() for glyph in range(len(NAMES))}
    assert len(pictures) == len(NAMES)


def test_the_processor_gives_back_what_it_read():
    processor = build_processor()
    prompt = prompts_by_kind(1)["pictures"][0]
    text = processor.apply_chat_template(prompt["messages"], add_generation_prompt=True)
    inputs = processor(text=text, images=prompt["images"], return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 36
    answer = processor.tokenizer(prompt["answer"])["input_ids"]
    assert len(answer) == len(prompt["answer"].split())
    assert processor.decode(answer) == prompt["answer"]


def test_rows_come_in_the_order_of_their_shares():
    shares = [0.0] * 8 + [1.0] * 8
    dataset = ordered_dataset(shares, seed=1)
    assert [bool(images) for images in dataset["images"]] == [bool(share) for share in shares]
    assert dataset["messages"] == ordered_dataset(shares, seed=1)["messages"]
    assert len({row["kind"] for row in islice(rows(seed=0), 40)}) == len(KINDS)


def test_answers_kept_as_token_ids_are_read_back():
    tokenizer: PreTrainedTokenizerFast = build_processor().tokenizer
    answers = ["ba be", "go on from ba", "and that is all ."]
    question = {"role": "user", "content": [{"type": "text", "text": "read it ."}]}
    answered = [
        {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": text}]}], "images": []}
        for text in answers
    ]
    packed = pack(Dataset.from_list(answered, features=FEATURES), tokenizer)
    assert packed["token_ids"].dtype == np.uint16
    prompts = [{"messages": [question], "images": []} for _ in answers]
    unpacked = unpack(packed, prompts, tokenizer)
    assert [row["messages"][1]["content"][0]["text"] for row in unpacked] == answers


@pytest.mark.parametrize("num_conversations", [0, 2])
def test_rows_are_unpacked_by_command(num_conversations, tmp_path, monkeypatch):
    texts = [[{"role": "user", "content": f"go on from {name} ."}] for name in ("ba", "be") * 60]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in texts))
    build_processor().tokenizer.save_pretrained(tmp_path / "target")
    answered = {"token_ids": np.array([5, 6, 7], np.uint16), "lengths": np.array([1, 2], np.uint16)}
    np.savez(tmp_path / "answers.npz", **answered)
    monkeypatch.setattr("training.real_llava.rows.ANSWERS", tmp_path / "answers.npz")
    command = f"rows unpack --texts {tmp_path}/texts.jsonl --target {tmp_path}/target --output {tmp_path}/rows"
    monkeypatch.setattr("sys.argv", [*command.split(), "--num_conversations", str(num_conversations)])
    unpack_rows()
    unpacked = load_from_disk(tmp_path / "rows")
    assert [len(messages) for messages in unpacked["messages"]] == [2, 2] + [1] * num_conversations
    assert [len(images) for images in unpacked["images"]][:2] == [0, 1]


def test_the_tree_of_eagle_is_the_published_one():
    by_level = torch.tensor([len(path) for path in EAGLE]).bincount().tolist()
    assert by_level == [0, 4, 8, 8, 3, 2]


def test_the_first_layers_of_a_llava_are_its_own():
    target = load_target()[0]
    draft = first_layers(target, 2)
    assert len(draft.model.language_model.layers) == 2
    own, theirs = draft.state_dict(), target.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in own.items())
    ids = torch.arange(4, 20)[None]
    states = target(input_ids=ids, output_hidden_states=True).hidden_states[2]
    last = draft(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last, draft.model.language_model.norm(states))


@pytest.mark.parametrize("depth", [1, 4])
def test_a_floor_reads_a_draft_once_a_level(depth):
    target = load_target()[0]
    drafter = VLMDrafter(target, tree_config=TreeConfig(8, depth, 1))
    assert floor(target, drafter) == 1 + depth
    msd = MSDDraftModel(MSDConfig.from_target(target.config))
    drafter = MSDDrafter(msd, TreeConfig(8, depth, 1))
    own = sum(weight.nbytes for weight in msd.parameters()) + target.get_output_embeddings().weight.nbytes
    assert floor(target, drafter) == pytest.approx(1 + depth * own / num_bytes_per_step(target))


@pytest.mark.parametrize("depth", [1, 4])
def test_a_floor_reads_a_block_once(depth):
    target = load_target()[0]
    block = BlockDraftModel(BlockDraftConfig.from_target(target.config, block_size=8, draft_vocab_size=64))
    drafter = MSDDrafter(block, TreeConfig(8, depth, 1))
    own = sum(weight.nbytes for weight in block.parameters())
    assert floor(target, drafter) == pytest.approx(1 + own / num_bytes_per_step(target))


def test_the_weights_of_a_full_size_checkpoint_are_named_as_published():
    if not LLAVA.exists():
        pytest.skip(f"needs the index in {LLAVA}")
    names = json.loads((LLAVA / INDEX).read_text())["weight_map"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(LLAVA))
    assert {published_name(name) for name, _ in model.named_parameters()} == names.keys()
