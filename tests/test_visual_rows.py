"""Visual rows are averaged or left out alike in training and decoding, and no token changes."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch


pytest.importorskip("trl")

from test_msd_drafter import Spy, assert_same_trees, make_draft, second_turn_inputs
from torch.nn.functional import pad
from training_fixtures import make_trainer
from transformers.generation import StoppingCriteria
from zoo import IMAGE_ID, VIDEO_ID, make_inputs, make_target

from training.tiny_world.build.target import build_model, build_processor, encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts, training_dataset
from transformers_msd import MSDConfig, MSDDraftModel, StaticRuntime, TreeConfig
from transformers_msd.compat import CACHE
from transformers_msd.models.msd.modeling_msd import pool_visual_rows


POOL_SIZES = pytest.mark.parametrize("visual_pool_size", [0, 1, 4])


def pooled_by_hand(
    rows: list[torch.Tensor], visual: list[bool], real: list[bool], size: int
) -> list[tuple[int, torch.Tensor]]:
    """Pool one sequence row by row; return the places and states of the rows that are kept."""
    places = [place for place in range(len(rows)) if real[place]]
    kept, group = [], []
    for place in places:
        if not visual[place] or place == places[-1]:
            kept.append((place, rows[place]))
            continue
        group.append(rows[place])
        following = place + 1
        run_ends = following == places[-1] or not visual[following]
        if size and (len(group) == size or run_ends):
            kept.append((place, sum(group) / len(group)))
        if not size or len(group) == size or run_ends:
            group = []
    return kept


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 50])
def test_rows_are_pooled_as_by_hand(size, decoupled):
    config = MSDConfig(visual_pool_size=size, decoupled=decoupled)
    generator = torch.Generator().manual_seed(size)
    for share in (0.0, 0.5, 0.9, 1.0):
        visual = torch.rand(8, 20, generator=generator) < share
        embeds, features = torch.randn(2, 8, 20, 3, generator=generator)
        # Padding on either side, which may hold anything.
        real = torch.ones(8, 20, dtype=torch.bool)
        for row in range(8):
            real[row, : (0, 0, 3, 19)[row % 4]] = False
            real[row, 20 - (0, 5)[row // 4] :] = False
        real[7, 4] = True
        embeds[~real], features[~real] = torch.nan, torch.inf
        new_embeds, new_features, kept = pool_visual_rows(config, embeds, features, visual, real)
        for row in range(8):
            by_hand = [
                pooled_by_hand(list(states[row]), visual[row].tolist(), real[row].tolist(), size)
                for states in (embeds, features)
            ]
            places = [place for place, _ in by_hand[0]]
            assert kept[row].nonzero()[:, 0].tolist() == places
            torch.testing.assert_close(new_embeds[row, places], torch.stack([state for _, state in by_hand[0]]))
            if not decoupled:
                torch.testing.assert_close(new_features[row, places], torch.stack([state for _, state in by_hand[1]]))
            text = [place for place in places if not visual[row, place]]
            assert torch.equal(new_embeds[row, text], embeds[row, text])
            assert torch.equal(new_features[row, text], features[row, text])


def test_pooled_rows_stand_where_their_groups_end():
    config = MSDConfig(visual_pool_size=2)
    embeds = torch.arange(8.0).view(1, 8, 1)
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 0, 1]]).bool()
    new_embeds, _, kept = pool_visual_rows(config, embeds, embeds, visual, torch.ones(1, 8, dtype=torch.bool))
    assert kept.int().tolist() == [[1, 0, 1, 1, 1, 1, 1, 1]]
    assert new_embeds[kept][:, 0].tolist() == [0, 1.5, 3, 4, 5, 6, 7]
    config.visual_pool_size = 0
    _, _, kept = pool_visual_rows(config, embeds, embeds, visual, torch.ones(1, 8, dtype=torch.bool))
    assert kept.int().tolist() == [[1, 0, 0, 0, 1, 0, 1, 1]]


def test_pool_size_is_saved_and_checked(tmp_path):
    config = make_target("llava").config
    MSDDraftModel(MSDConfig.from_target(config, visual_pool_size=4)).save_pretrained(tmp_path)
    assert MSDDraftModel.from_pretrained(tmp_path).config.visual_pool_size == 4
    assert MSDConfig.from_target(config).visual_pool_size == 1
    with pytest.raises(Exception, match="`visual_pool_size` must not be negative, got -1"):
        MSDConfig.from_target(config, visual_pool_size=-1)
    with pytest.raises(Exception, match="visual_pool_size"):
        MSDConfig.from_target(config, visual_pool_size=2.5)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    processor = build_processor(num_rows=200)
    return build_model(processor, num_layers=1), processor


@pytest.mark.parametrize(("visual_pool_size", "decoupled"), [(0, True), (1, True), (4, True), (4, False)])
@torch.no_grad()
def test_training_sees_the_rows_that_decoding_sees(world, tmp_path, visual_pool_size, decoupled):
    target, processor = world
    config = MSDConfig.from_target(
        target.config,
        intermediate_size=32,
        visual_pool_size=visual_pool_size,
        decoupled=decoupled,
        # Of one level: the draft runs on committed rows alone.
        tree_config={"num_nodes": 4, "depth": 1, "top_k": 3, "gate": False},
    )
    draft = MSDDraftModel(config)
    trainer = make_trainer(target, training_dataset(4), processor, tmp_path, draft=draft, stage="multimodal")
    draft.eval()
    predicted = []
    draft.register_forward_hook(lambda module, args, output: predicted.append(output.last_hidden_state))
    inputs, spy = encode_prompts(processor, evaluation_prompts(1)), Spy(draft)  # no, one and two pictures
    sequences = target.generate(**inputs, assistant_model=spy, min_new_tokens=8, max_new_tokens=8)
    mask = pad(inputs["attention_mask"], (0, 8), value=1)
    conversation = {**inputs, "input_ids": sequences, "attention_mask": mask, "labels": sequences}
    trainer.loss_sum(draft, conversation, list(range(len(sequences))))
    *rounds, whole = predicted
    assert len(rounds) == len(spy.committed) > 3

    num_visual = (inputs["input_ids"] == target.config.image_token_id).sum(-1)
    num_pooled = num_visual // visual_pool_size if visual_pool_size else 0 * num_visual  # a picture has 36 rows
    lengths = [spy.committed[0].lengths - num_visual + num_pooled]
    lengths += [committed.lengths for committed in spy.committed[1:]]
    for row in range(len(sequences)):
        ours = torch.cat([states[row, : length[row]] for states, length in zip(rounds, lengths, strict=True)])
        first = int((inputs["attention_mask"][row] == 0).sum()) if visual_pool_size == 1 else 0
        torch.testing.assert_close(whole[row, first : first + len(ours)], ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("visual_pool_size", [0, 4])
@pytest.mark.parametrize("architecture", ["llava_next", "qwen2_5_vl"])
def test_rows_of_a_batch_are_pooled_as_if_alone(architecture, visual_pool_size):
    target = make_target(architecture)
    spy = Spy(make_draft(target))
    spy.model.config.visual_pool_size = visual_pool_size
    settings = {"max_new_tokens": 10, "do_sample": False}
    batch = make_inputs(architecture, (2, 0, 1))
    generated = target.generate(**batch, **settings, assistant_model=spy)
    assert torch.equal(generated, target.generate(**batch, **settings))
    pictures = {name: batch[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in batch}
    for row, start, stop in ((0, 0, 2), (1, 2, 2), (2, 2, 3)):
        real = batch["attention_mask"][row].bool()
        inputs = {
            name: batch[name][row : row + 1, real]
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
            if name in batch
        }
        if stop > start:
            rows = len(pictures["pixel_values"]) // 3
            inputs |= {name: values[start:stop] for name, values in pictures.items()}
            if architecture.startswith("qwen"):
                inputs["pixel_values"] = pictures["pixel_values"][start * rows : stop * rows]
        alone = Spy(spy.model)
        target.generate(**inputs, **settings, assistant_model=alone)
        ours, theirs = spy.trees[0], alone.trees[0]
        names = ("token_ids", "parents", "scores")
        assert_same_trees(type(ours)(*(getattr(ours, name)[row : row + 1] for name in names), ours.depth), theirs)


@pytest.mark.parametrize("visual_pool_size", [0, 4])
@pytest.mark.parametrize("num_images", [(2,), (2, 0, 1)])
def test_turns_after_a_rest_of_the_gate_go_on_with_pooled_rows(num_images, visual_pool_size):
    target, inputs = make_target("llava_next"), make_inputs("llava_next", num_images)
    draft = make_draft(target)
    draft.config.visual_pool_size = visual_pool_size
    draft.tree_config = replace(draft.tree_config, gate=True)
    settings = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    settings["suppress_tokens"] = [IMAGE_ID, VIDEO_ID]
    plain = target.generate(**inputs, **settings)
    first = target.generate(**inputs, **settings, assistant_model=draft)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    for _ in range(2):  # a third turn, too
        assert torch.equal(first.sequences, plain.sequences)
        assert first.speculative_stats.num_plain_steps > 0
        turn = second_turn_inputs(inputs, first.sequences)
        plain = target.generate(**turn, **{CACHE: plain[CACHE]}, **settings)
        spy, afresh = Spy(draft), Spy(draft)
        first = target.generate(**turn, **{CACHE: first[CACHE]}, **settings, assistant_model=spy)
        target.generate(**turn, **pictures, **settings, assistant_model=afresh)
        assert_same_trees(spy.trees[0], afresh.trees[0])


@pytest.mark.parametrize("visual_pool_size", [0, 3])
def test_prompts_given_as_embeddings_are_pooled_like_ids(visual_pool_size):
    target, inputs = make_target("llava"), make_inputs("llava", (2, 0, 1))
    draft = make_draft(target)
    draft.config.visual_pool_size = visual_pool_size
    with torch.no_grad():
        embeds = target(**inputs, output_hidden_states=True).hidden_states[0]
    settings = {"max_new_tokens": 6, "do_sample": False}
    by_ids, by_embeds = Spy(draft), Spy(draft)
    target.generate(**inputs, **settings, assistant_model=by_ids)
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **settings}
    target.generate(**call, assistant_model=by_embeds)
    assert_same_trees(by_ids.trees[0], by_embeds.trees[0])


@pytest.fixture(scope="module")
def pair():
    return *load_target(), MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)


class EndAt(StoppingCriteria):
    """Ends all rows at a length that nobody knows beforehand: rows that ran ahead are cut."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"do_sample": True, "top_k": 0, "temperature": 1.7, "num_return_sequences": 2}],
    ids=["greedy", "sampled"],
)
@POOL_SIZES
def test_conversations_of_two_turns_with_pictures_equal_plain_ones(pair, visual_pool_size, settings):
    target, processor, draft = pair
    draft = copy.deepcopy(draft)
    draft.config.visual_pool_size = visual_pool_size
    draft.tree_config = replace(draft.tree_config, gate=False)
    prompts = evaluation_prompts(3)
    inputs = encode_prompts(processor, [prompts[6], prompts[0], prompts[3]])  # two pictures, none, one
    news = encode_prompts(processor, [prompts[4]])
    settings = {"return_dict_in_generate": True, "eos_token_id": 10**6, "max_new_tokens": 40} | settings
    num_copies = settings.pop("num_return_sequences", 1)
    width = inputs["input_ids"].shape[1]

    def answer(assistant: Any, seed: int, length: int, **call: Any) -> Any:
        torch.manual_seed(seed)
        ends = [EndAt(length)]
        return target.generate(**call, **settings, assistant_model=assistant, stopping_criteria=ends)

    firsts = [answer(who, 0, width + 18, **inputs, num_return_sequences=num_copies) for who in (None, draft)]
    assert torch.equal(firsts[0].sequences, firsts[1].sequences)
    assert firsts[1].speculative_stats.mean_acceptance_length > 2
    carried = firsts[1][CACHE]._speculative_state.state.drafted
    assert not settings["do_sample"] or carried.cache.get_seq_length() > carried.lengths.max()  # rows ran ahead
    batch_size = 3 * num_copies
    mask = inputs["attention_mask"].repeat_interleave(num_copies, dim=0)
    ids = torch.cat([firsts[0].sequences, news["input_ids"].expand(batch_size, -1)], dim=1)
    turn = {"input_ids": ids, "attention_mask": pad(mask, (0, ids.shape[1] - width), value=1)}
    shown = [list(inputs["pixel_values"][part]) for part in (slice(2), slice(0), slice(2, 3))]
    new = news["pixel_values"][0]
    of_all = torch.stack([picture for own in shown for _ in range(num_copies) for picture in (*own, new)])
    spies, of_turn = [Spy(draft), Spy(draft)], new.expand(batch_size, -1, -1, -1)
    plain_cache, cache = (first[CACHE] for first in firsts)
    calls = [(None, plain_cache, of_turn), (spies[0], cache, of_turn), (spies[1], None, of_all)]
    seconds = [
        answer(who, 1, ids.shape[1] + 2, **turn, **{CACHE: cache}, pixel_values=pictures)
        for who, cache, pictures in calls
    ]
    for second in seconds[1:]:
        assert torch.equal(second.sequences, seconds[0].sequences)
    # As if the whole conversation were read for the first time.
    assert_same_trees(spies[0].trees[0], spies[1].trees[0])


@pytest.mark.parametrize("visual_pool_size", [0, 36])
def test_fixed_shapes_pool_the_same_rows(pair, visual_pool_size):
    target, processor, draft = pair
    draft = copy.deepcopy(draft)
    draft.config.visual_pool_size = visual_pool_size
    # Deep: with a picture of one row, the prompt of the second turn is no longer than what a round may commit.
    draft.tree_config = TreeConfig(num_nodes=16, depth=12, top_k=2, gate=False)
    inputs = encode_prompts(processor, evaluation_prompts(1)[1:2])
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "eos_token_id": 10**6}
    spies = [Spy(draft), Spy(draft)]
    for spy in spies:
        assistant = spy if spy is spies[0] else StaticRuntime(spy)
        first = target.generate(**inputs, **settings, assistant_model=assistant, disable_compile=True)
        news = torch.tensor([[*[target.config.image_token_id] * 36, 202, 17]])
        turn = {"input_ids": torch.cat([first.sequences, news], dim=1), "pixel_values": -inputs["pixel_values"]}
        turn[CACHE] = first[CACHE]
        target.generate(**turn, **settings, assistant_model=assistant, disable_compile=True)
    assert len(spies[0].trees) == len(spies[1].trees)
    for ours, theirs in zip(spies[0].trees, spies[1].trees, strict=True):
        assert_same_trees(ours, theirs)
