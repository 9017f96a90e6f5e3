"""The shipped pair: a target that reads pictures and a draft that was trained for it, through real conversations."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration


pytest.importorskip("datasets")
from training.tiny_world import demo
from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import BLOCK_CHECKPOINT, DRAFT_CHECKPOINT
from training.tiny_world.build.train_draft_vlm import DRAFT_VLM_CHECKPOINT
from training.tiny_world.measure.evaluate import Blinkered, acceptance_length, blinker, compare, plain_answers
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import AutoDraftModel, EnsembleDrafter, MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE
from transformers_msd.drafters.msd import MSDDrafter


FOLLOW_UPS = ("How many shapes are there?", "What colour is the background?", "Describe the picture.")
FEW = {"do_sample": False, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, MSDDraftModel]:
    return *load_target(), MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoded(pair: tuple) -> list[tuple[dict, Any]]:
    return [(prompt, encode_prompts(pair[1], [prompt])) for prompt in evaluation_prompts(2)]


@pytest.fixture(scope="module")
def plain(pair: tuple, encoded: list) -> list[torch.Tensor]:
    """What the target says to each prompt in `FEW`, which several tests compare with."""
    return plain_answers(pair[0], encoded, FEW)


def next_turn(processor: Any, sequences: torch.Tensor, text: str) -> dict[str, torch.Tensor]:
    """Append a user's message to a conversation that the target has just answered."""
    news = processor.tokenizer(f"\nUSER: {text}\nASSISTANT:", add_special_tokens=False, return_tensors="pt")
    input_ids = torch.cat([sequences, news["input_ids"]], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.mark.parametrize("checkpoint", [DRAFT_CHECKPOINT, BLOCK_CHECKPOINT], ids=["MSD", "block"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_tokens_are_equal_and_many_are_accepted(pair: tuple, encoded: list, do_sample: bool, checkpoint: Path) -> None:
    target, processor, _ = pair
    draft = AutoDraftModel.from_pretrained(checkpoint, dtype=torch.float32)
    figures = compare(target, draft, processor, encoded, {"do_sample": do_sample, "max_new_tokens": 100})
    for row in figures.values():
        assert row["equal"] == row["prompts"]
    assert figures["all"]["tau"] >= 3.5


def test_a_batch_of_pictures_is_equal(pair: tuple) -> None:
    target, processor, draft = pair
    whole = MSDDrafter(draft, replace(draft.tree_config, gate=False))
    prompts = [prompt for prompt in evaluation_prompts(2) if prompt["group"] in ("text", "image", "images")]
    inputs = encode_prompts(processor, prompts)
    plain = target.generate(**inputs, max_new_tokens=100)
    for assistant, least in ((draft, 2), (whole, 3)):
        output = target.generate(**inputs, max_new_tokens=100, assistant_model=assistant, return_dict_in_generate=True)
        assert torch.equal(output.sequences, plain)
        assert output.speculative_stats.mean_acceptance_length >= least


def test_what_the_draft_sees_never_changes_the_output(pair: tuple, encoded: list, plain: list) -> None:
    target, _, draft = pair
    for picture in ("another", "none"):
        row = blinker(target, Blinkered(draft, picture), encoded, FEW, plain)
        assert row["equal"] == row["prompts"] > 0


def test_a_chat_of_three_turns(pair: tuple) -> None:
    target, processor, draft = pair
    prompt = next(prompt for prompt in evaluation_prompts(1) if prompt["group"] == "image")
    first = encode_prompts(processor, [prompt])
    settings = {"max_new_tokens": 80, "return_dict_in_generate": True}
    pictures = {"pixel_values": first["pixel_values"]}
    taus: dict[str, list[torch.Tensor]] = {"cache": [], "afresh": []}
    plain, drafted = target.generate(**first, **settings), target.generate(**first, **settings, assistant_model=draft)
    for text in FOLLOW_UPS:
        assert torch.equal(drafted.sequences, plain.sequences)
        turn = next_turn(processor, plain.sequences, text)
        plain = target.generate(**turn, **{CACHE: plain[CACHE]}, **settings)
        cache = drafted[CACHE]
        drafted = target.generate(**turn, **{CACHE: cache}, **settings, assistant_model=draft)
        afresh = target.generate(**turn, **pictures, **settings, assistant_model=draft)
        assert torch.equal(afresh.sequences, plain.sequences)
        taus["cache"].append(drafted.speculative_stats.acceptance_lengths)
        taus["afresh"].append(afresh.speculative_stats.acceptance_lengths)
    assert torch.equal(drafted.sequences, plain.sequences)
    means = {name: torch.cat(lengths).float().mean().item() for name, lengths in taus.items()}
    assert means["cache"] == pytest.approx(means["afresh"], rel=0.05)


def test_inputs_embeds_are_accepted_as_often_as_ids_and_pixels(pair: tuple, encoded: list) -> None:
    target, _, draft = pair
    # The ids of the prompt tell what stood before; without them the answer alone does.
    drafter = MSDDrafter(draft, replace(draft.tree_config, ngrams=False))
    settings = {"max_new_tokens": 60, "return_dict_in_generate": True, "assistant_model": drafter}
    for _, inputs in encoded:
        with torch.no_grad():
            embeds = target(**inputs, output_hidden_states=True).hidden_states[0]
        by_ids = target.generate(**inputs, **settings)
        alone = target.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **settings)
        length = inputs["input_ids"].shape[1]
        assert torch.equal(alone.sequences, by_ids.sequences[:, length:])
        lengths = [output.speculative_stats.acceptance_lengths for output in (alone, by_ids)]
        assert torch.equal(*lengths)


def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(picture)])
    demo.main()
    shown = capsys.readouterr().out
    assert picture.exists()
    assert str(picture) in shown
    assert "Same tokens:       yes" in shown


def test_checkpoints_are_small_and_hold_no_vocabulary_twice(pair: tuple) -> None:
    folder = DRAFT_CHECKPOINT.parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25_000_000
    target, _, draft = pair
    vocab_size = target.config.get_text_config().vocab_size
    assert not any(vocab_size in parameter.shape for parameter in draft.parameters())


@pytest.mark.parametrize("drafter_class", [VLMDrafter, EnsembleDrafter])
def test_the_small_vlm_drafts(pair: tuple, encoded: list, plain: list, drafter_class: type) -> None:
    target = pair[0]
    draft_vlm = LlavaForConditionalGeneration.from_pretrained(DRAFT_VLM_CHECKPOINT, dtype=torch.float32)
    drafter = drafter_class(draft_vlm, tree_config=TreeConfig(num_nodes=16, depth=5, top_k=3))
    lengths = []
    for (_, inputs), tokens in zip(encoded, plain, strict=True):
        drafted = target.generate(**inputs, **FEW, return_dict_in_generate=True, assistant_model=drafter)
        assert torch.equal(drafted.sequences, tokens)
        lengths.append(drafted.speculative_stats.acceptance_lengths[:, 0].tolist())
    assert acceptance_length(lengths) >= 2.5
