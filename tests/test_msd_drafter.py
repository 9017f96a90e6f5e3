"""The MSD candidate generator grows the published trees and keeps its place over rounds, rows and turns."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_modeling_msd import golden_draft, golden_image_rows, load_golden
from torch.nn.functional import embedding, linear
from transformers import DynamicCache
from transformers.generation import LogitsProcessorList
from zoo import ARCHITECTURES, IMAGE_ID, VIDEO_ID, VOCAB_SIZE, make_inputs, make_target

from transformers_msd import (
    CallInputs,
    Committed,
    MSDConfig,
    MSDDraftModel,
    Target,
    TokenTree,
    TreeCandidateGenerator,
    TreeConfig,
)
from transformers_msd.call.sampling import Sampler
from transformers_msd.compat import CACHE
from transformers_msd.drafters.msd_candidates import MSDCandidateGenerator
from transformers_msd.drafters.wrapped import Wrapped
from transformers_msd.traits.scales import Scales


class GoldenTarget:
    """The embeddings and head of a golden file, and where they are: all that a draft asks of its target."""

    def __init__(self, embed_tokens: torch.Tensor, head: torch.Tensor) -> None:
        self.model = None
        self.device = embed_tokens.device
        self.embed = lambda token_ids: embedding(token_ids, embed_tokens)
        self.logits = lambda features, scales: linear(features, head)
        self.scales = Scales()
        self.begins_visual = torch.zeros(1, dtype=torch.bool)


def commit(token_ids: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], start: int) -> Committed:
    inputs_embeds, features, visual_mask = rows
    num_rows = features.shape[1]
    padded = torch.zeros(1, num_rows, dtype=torch.long)
    padded[:, num_rows - token_ids.shape[1] :] = token_ids
    position_ids = torch.arange(start, start + num_rows)[None]
    return Committed(padded, inputs_embeds, features, position_ids, visual_mask, torch.tensor([num_rows]), [num_rows])


def assert_tree_is(tree: TokenTree, tensors: dict[str, torch.Tensor], name: str) -> None:
    assert tree.token_ids.tolist() == tensors[f"io.{name}_tree_tokens"].tolist()
    assert tree.depths[0].tolist() == tensors[f"io.{name}_tree_positions"].tolist()
    assert tree.ancestor_mask.tolist() == tensors[f"io.{name}_tree_mask"][0].tolist()


def golden_candidates(name: str) -> tuple[MSDCandidateGenerator, dict, dict[str, torch.Tensor], torch.Tensor]:
    meta, tensors = load_golden(name)
    draft, embed_tokens = golden_draft(meta, tensors)
    draft.tree_config = TreeConfig(meta["total_tokens"], meta["depth"] + 1, meta["top_k"], gate=False)
    target = GoldenTarget(embed_tokens, tensors["lm_head.weight"])
    inputs = CallInputs({}, Sampler(LogitsProcessorList(), emission=None, noise=None))
    return MSDCandidateGenerator(draft, draft.tree_config, target, inputs), meta, tensors, embed_tokens


@pytest.mark.parametrize("name", ["a", "c"])
@torch.no_grad()
def test_text_tree_equals_the_published_one(name: str) -> None:
    candidates, _, tensors, embed_tokens = golden_candidates(name)
    ids = torch.cat([tensors["io.text_ids"], tensors["io.text_sampled"]], dim=1)[:, 1:]
    rows = embed_tokens[ids], tensors["io.text_target_hidden"], torch.zeros(ids.shape, dtype=torch.bool)
    assert_tree_is(candidates.draft(commit(ids, rows, 0)), tensors, "text")


@torch.no_grad()
def test_image_trees_of_two_rounds_equal_the_published_ones() -> None:
    candidates, meta, tensors, embed_tokens = golden_candidates("a")
    rows = golden_image_rows(meta, tensors, embed_tokens)
    assert_tree_is(candidates.draft(commit(tensors["io.image_sampled"], rows, 0)), tensors, "image")
    ids = torch.cat([tensors["io.round2_committed"], tensors["io.round2_sampled"]], dim=1)
    rows = embed_tokens[ids], tensors["io.round2_target_hidden"], torch.zeros(ids.shape, dtype=torch.bool)
    assert_tree_is(candidates.draft(commit(ids, rows, 592)), tensors, "round2")


class Spy(Wrapped):
    """Passes an assistant's work through and keeps what it was given and what it drafted."""

    def __init__(self, draft: MSDDraftModel) -> None:
        super().__init__(draft)
        self.model = draft
        self.committed: list[Committed] = []
        self.trees: list[TokenTree] = []

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        draft = candidates.draft

        def spied(committed: Committed) -> TokenTree:
            self.committed.append(committed)
            self.trees.append(draft(committed))
            return self.trees[-1]

        candidates.draft = spied
        return candidates


def make_draft(target: Any) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config, initializer_range=0.3)).eval()
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False, ngrams=False)
    return draft


def assert_same_trees(first: TokenTree, second: TokenTree) -> None:
    assert torch.equal(first.token_ids, second.token_ids)
    assert torch.equal(first.parents, second.parents)
    # Rounding differs with the number of rows in a forward.
    torch.testing.assert_close(first.scores, second.scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_of_a_batch_is_drafted_as_if_alone(architecture: str) -> None:
    target = make_target(architecture)
    spy = Spy(make_draft(target))
    batch = make_inputs(architecture, (1, 1, 1))
    generated = target.generate(**batch, max_new_tokens=16, do_sample=False, assistant_model=spy)
    for row in range(3):
        alone = Spy(spy.model)
        num_pads = int((batch["attention_mask"][row] == 0).sum())
        inputs = {name: values[row : row + 1] for name, values in batch.items() if name != "pixel_values"}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, num_pads:]
        if "pixel_values" in batch:
            inputs["pixel_values"] = batch["pixel_values"].chunk(3)[row]
        sequence = target.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=alone)
        assert torch.equal(sequence[0], generated[row, num_pads:])
        # Until the first row ends, round by round the same tree.
        whole = [tree for tree in spy.trees[: len(alone.trees) - 2] if len(tree.token_ids) == 3]
        assert whole
        for ours, theirs in zip(whole, alone.trees, strict=False):
            of_row = TokenTree(*(getattr(ours, name)[row : row + 1] for name in ("token_ids", "parents", "scores")), 3)
            assert_same_trees(of_row, theirs)


def second_turn_inputs(inputs: dict, sequences: torch.Tensor) -> dict:
    """Add a user's next message to a conversation; Qwen models want the types of all its tokens."""
    news = torch.tensor([[31, 32, 33, 34, 35]]).expand(len(sequences), -1)
    input_ids = torch.cat([sequences, news], dim=1)
    num_new = input_ids.shape[1] - inputs["input_ids"].shape[1]
    ones = inputs["attention_mask"].new_ones(len(input_ids), num_new)
    turn = {"input_ids": input_ids, "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1)}
    if "mm_token_type_ids" in inputs:
        turn["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones], dim=1)
    return turn


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_turn_goes_on_where_the_first_stopped(architecture: str, batch_size: int) -> None:
    target = make_target(architecture)
    inputs = make_inputs(architecture, (1,) * batch_size)
    # A random target may say placeholders, which are visual rows when they stand in a prompt.
    settings = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    settings["suppress_tokens"] = [IMAGE_ID, VIDEO_ID]
    plain_first = target.generate(**inputs, **settings)
    turn = second_turn_inputs(inputs, plain_first.sequences)
    plain = target.generate(**turn, **{CACHE: plain_first[CACHE]}, **settings)

    draft = make_draft(target)
    draft.tree_config = replace(draft.tree_config, gate=False)  # which goes on over turns, too
    first = target.generate(**inputs, **settings, assistant_model=draft)
    spy = Spy(draft)
    second = target.generate(**turn, **{CACHE: first[CACHE]}, **settings, assistant_model=spy)
    assert torch.equal(second.sequences, plain.sequences)

    # The same conversation encoded afresh: the draft starts with the same tree.
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in inputs}
    afresh = Spy(draft)
    again = target.generate(**turn, **pictures, **settings, assistant_model=afresh)
    assert torch.equal(again.sequences, plain.sequences)
    assert_same_trees(spy.trees[0], afresh.trees[0])
    taus = [output.speculative_stats.mean_acceptance_length for output in (second, again)]
    assert taus[0] == pytest.approx(taus[1], rel=0.05)


def test_a_cropped_or_replaced_cache_drops_the_state_of_the_draft() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava")
    settings = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    draft = make_draft(target)
    first = target.generate(**inputs, **settings, assistant_model=draft)
    kept = copy.deepcopy(first[CACHE])
    turn = second_turn_inputs(inputs, first.sequences)
    expected = target.generate(**turn, **{CACHE: copy.deepcopy(kept)}, **settings)

    def num_joined_rows(cache: DynamicCache, turn: dict) -> int:
        spy = Spy(draft)
        output = target.generate(**turn, **{CACHE: cache}, **settings, assistant_model=spy)
        assert torch.equal(output.sequences, expected.sequences)
        return int(output[CACHE]._speculative_state.state.drafted.starts)

    assert num_joined_rows(kept, turn) == 0  # a copy carries it, too
    cropped = copy.deepcopy(first[CACHE])
    cropped.crop(-3)
    assert num_joined_rows(cropped, turn) == inputs["input_ids"].shape[1] + 8 - 3
    plain = target.generate(**inputs, **settings)[CACHE]
    assert num_joined_rows(plain, turn) == inputs["input_ids"].shape[1] + 8


@pytest.mark.parametrize("architecture", ["llama", "llava", "qwen2_5_vl"])
def test_with_a_plain_cache_the_draft_starts_at_the_new_rows(architecture: str) -> None:
    target = make_target(architecture)
    inputs = make_inputs(architecture)
    settings = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    first = target.generate(**inputs, **settings)
    turn = second_turn_inputs(inputs, first.sequences)
    spy = Spy(make_draft(target))
    target.generate(**turn, **{CACHE: first[CACHE]}, **settings, assistant_model=spy)
    length = first.sequences.shape[1]
    assert spy.committed[0].position_ids.tolist() == [list(range(length - 1, length + 5))]


def test_inputs_embeds_are_drafted_like_ids_and_pixels() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava", (2, 0, 1))
    settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        embeds = target(**inputs, output_hidden_states=True).hidden_states[0]
    draft = make_draft(target)
    by_ids = Spy(draft)
    expected = target.generate(**inputs, **settings, assistant_model=by_ids)
    news = expected.sequences[:, inputs["input_ids"].shape[1] :]
    mask = inputs["attention_mask"]
    for ids in ({}, {"input_ids": inputs["input_ids"]}):
        spy = Spy(draft)
        call = {"inputs_embeds": embeds, "attention_mask": mask, **ids, **settings}
        output = target.generate(**call, assistant_model=spy)
        assert torch.equal(output.sequences, target.generate(**call).sequences)
        assert torch.equal(output.sequences[:, -news.shape[1] :], news)
        real = torch.arange(mask.shape[1]) < mask.sum(-1)[:, None]
        visual = [spied.committed[0].visual_mask & real for spied in (spy, by_ids)]
        assert torch.equal(*visual)
        assert visual[0].sum() == 12
        assert_same_trees(spy.trees[0], by_ids.trees[0])
        assert torch.equal(output.speculative_stats.acceptance_lengths, expected.speculative_stats.acceptance_lengths)


@torch.no_grad()
def test_draft_sees_the_picture() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava")
    draft = make_draft(target)
    trees = []
    for factor in (1, -1):
        spy = Spy(draft)
        pictures = {"pixel_values": factor * inputs["pixel_values"]}
        target.generate(**inputs | pictures, max_new_tokens=3, do_sample=False, assistant_model=spy)
        trees.append(spy.trees[0])
    assert not torch.allclose(trees[0].scores, trees[1].scores)


@pytest.mark.parametrize("do_sample", [False, True])
def test_tokens_outside_a_smaller_vocabulary_are_not_drafted(monkeypatch, do_sample):
    target, inputs = make_target("llava"), make_inputs("llava", (1,))
    draft = MSDDraftModel(MSDConfig.from_target(target.config, draft_vocab_size=12)).eval()
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
    counts = torch.arange(VOCAB_SIZE).flip(0)
    draft.choose_tokens(counts, target.get_output_embeddings())
    assert draft.draft_token_ids.tolist() == list(range(12))
    trees, make_tree = [], MSDCandidateGenerator.draft
    monkeypatch.setattr(
        MSDCandidateGenerator, "draft", lambda self, committed: trees.append(make_tree(self, committed)) or trees[-1]
    )
    target.generate(**inputs, max_new_tokens=10, do_sample=do_sample, assistant_model=draft)
    assert trees
    assert all((tree.token_ids[:, 1:] < 12).all() for tree in trees)


def test_a_smaller_vocabulary_says_what_the_target_head_says_of_its_tokens():
    target = make_target("llama")
    draft = MSDDraftModel(MSDConfig.from_target(target.config, draft_vocab_size=12)).eval()
    draft.choose_tokens(torch.rand(VOCAB_SIZE), target.get_output_embeddings())
    features = torch.randn(2, 3, target.config.hidden_size)
    logits, theirs = draft.logits(features, SimpleNamespace(scales=Scales())), target.get_output_embeddings()(features)
    chosen = draft.draft_token_ids
    torch.testing.assert_close(logits[..., chosen], theirs[..., chosen])
    others = logits.index_fill(-1, chosen, torch.finfo(logits.dtype).min)
    assert (others == torch.finfo(logits.dtype).min).all()


@pytest.mark.parametrize("draft_vocab_size", [0, VOCAB_SIZE + 1])
def test_impossible_vocabulary_sizes_raise(draft_vocab_size):
    with pytest.raises(Exception, match="`draft_vocab_size` must be between 1 and"):
        MSDConfig.from_target(make_target("llama").config, draft_vocab_size=draft_vocab_size)
