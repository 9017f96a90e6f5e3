"""Rows that have ended leave the batch where only tokens are returned, and nothing else changes."""

import random
from itertools import compress
from typing import Any

import pytest
import torch
from oracle import Oracle, OracleCandidateGenerator
from test_equality import FavourByRow, LengthByRow
from transformers.generation.streamers import BaseStreamer
from zoo import PAD_ID, READ_EMBEDS, VOCAB_SIZE, make_draft_model, make_inputs, make_target

from transformers_msd import (
    CallInputs,
    Committed,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    Target,
    TokenTree,
    TreeCandidateGenerator,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.call.emission import LEAVING_SHARE
from transformers_msd.drafters.wrapped import Wrapped


NUM_TOKENS = 26
TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)


class Notes(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.puts.append([])


class Spy(Wrapped):
    """Passes an assistant's work through; keeps for each row of the call the trees drafted for it."""

    def __init__(self, assistant: Any, batch_size: int) -> None:
        super().__init__(assistant)
        self.trees: list[list[TokenTree]] = [[] for _ in range(batch_size)]

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        draft, keep_sequences = candidates.draft, candidates.keep_sequences
        rows = list(range(len(self.trees)))

        def spied(committed: Committed) -> TokenTree:
            tree = draft(committed)
            assert len(tree.token_ids) == len(rows)
            for place, row in enumerate(rows):
                self.trees[row].append((tree.token_ids[place], tree.parents[place], tree.scores[place]))
            return tree

        def keep(kept: list[bool]) -> bool:
            has_left = keep_sequences(kept)
            rows[:] = compress(rows, kept) if has_left else rows
            return has_left

        candidates.draft, candidates.keep_sequences = spied, keep
        return candidates


class RestingOracle(Oracle):
    """Drafts nothing in the round after rows have left."""

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        return RestingOracleGenerator(self)


class RestingOracleGenerator(OracleCandidateGenerator):
    rests = False

    def draft(self, committed: Committed) -> TokenTree:
        rests, self.rests = self.rests, False
        tree = super().draft(committed)
        return TokenTree.root(committed.root_token_ids) if rests else tree

    def keep_sequences(self, kept: list[bool]) -> bool:
        self.rests = True
        return super().keep_sequences(kept)


class Roots:
    """Drafts nothing: every round is a plain step."""

    def __init__(self, leaves: bool) -> None:
        self.leaves = leaves

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        return RootsGenerator() if self.leaves else StayingRootsGenerator()


class StayingRootsGenerator(TreeCandidateGenerator):
    """As users wrote it who know nothing of rows that leave."""

    def draft(self, committed: Committed) -> TokenTree:
        return TokenTree.root(committed.root_token_ids)


class RootsGenerator(StayingRootsGenerator):
    def keep_sequences(self, kept: list[bool]) -> bool:
        return True


def row_ends(truth: list[list[int]], eos_token_ids: list[int]) -> list[int]:
    return [
        next((step for step, token_id in enumerate(row, 1) if token_id in eos_token_ids), len(row)) for row in truth
    ]


def ragged_eos(truth: torch.Tensor) -> list[int]:
    """Choose tokens by which rows end at as many steps as possible, and as far from each other."""
    rows, chance = truth.tolist(), random.Random(0)
    tokens = sorted({token_id for row in rows for token_id in row})
    choices = [chance.sample(tokens, min(len(rows), 4)) for _ in range(300)]

    def spread(choice: list[int]) -> tuple[int, int]:
        ends = sorted(set(row_ends(rows, choice)))
        return len(ends), ends[-1] - ends[0]

    return max(choices, key=spread)


def make_call(architecture: str, batch_size: int, option: str, do_sample: bool) -> dict[str, Any]:
    """Make the arguments of a call whose rows end at very different steps."""
    copies = batch_size if option == "return_sequences" else 1
    num_images = tuple(1 + row % 2 for row in range(batch_size // copies))
    inputs = make_inputs(architecture, num_images, lengths=tuple(5 + 3 * row % 11 for row in range(len(num_images))))
    call = {**inputs, "max_new_tokens": NUM_TOKENS, "do_sample": do_sample, "num_return_sequences": copies}
    if option == "penalty":
        call["repetition_penalty"] = 1.3
    elif option == "processor":
        call["logits_processor"] = [FavourByRow()]
    elif option == "criterion":
        call["stopping_criteria"] = [LengthByRow(inputs["input_ids"].shape[1] + 8)]
    if option != "limit":
        call["eos_token_id"] = ragged_eos(
            generate(make_target(architecture), call)[0][:, inputs["input_ids"].shape[1] :]
        )
    return call


def generate(target: Any, call: dict[str, Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Generate from a seed; return tokens, the random state after them, and the batch size of every round."""
    sizes = []
    torch.manual_seed(0)
    hook = target.register_forward_hook(lambda module, args, outputs: sizes.append(len(outputs.logits)))
    try:
        tokens = target.generate(**call, **more)
    finally:
        hook.remove()
    return tokens, torch.get_rng_state(), sizes[1:]


def make_assistants(architecture: str, truth: torch.Tensor, ends: list[int]) -> dict[str, Any]:
    # The row that ends last is slow: it is left behind shorter than those that leave.
    slow = torch.arange(len(truth)) == ends.index(max(ends))
    known = torch.where(slow[:, None], (truth + 1) % VOCAB_SIZE, truth)
    target = make_target(architecture)
    torch.manual_seed(1)
    msd = MSDDraftModel(MSDConfig.from_target(target.config, initializer_range=0.3)).eval()
    msd.tree_config = TREE
    model = make_draft_model(architecture)
    return {
        "msd": msd,
        "vlm": VLMDrafter(model, tree_config=TREE),
        "ensemble": EnsembleDrafter(model, tree_config=TREE),
        "oracle": RestingOracle(known, VOCAB_SIZE, seed=2),
    }


CELLS = [
    *((architecture, 4, "eos", True) for architecture in READ_EMBEDS),
    *((architecture, 8, "penalty", False) for architecture in ("llava_next", "qwen2_5_vl")),
    *(
        ("qwen2_vl", *cell)
        for cell in (
            (2, "eos", False),
            (2, "penalty", True),
            (4, "processor", True),
            (8, "criterion", False),
            (6, "return_sequences", True),
            (4, "limit", False),
        )
    ),
]


@pytest.mark.parametrize(("architecture", "batch_size", "option", "do_sample"), CELLS)
def test_rows_leave_and_tokens_random_state_and_trees_stay(
    architecture: str, batch_size: int, option: str, do_sample: bool
) -> None:
    target = make_target(architecture)
    call = make_call(architecture, batch_size, option, do_sample)
    prompt_length = call["input_ids"].shape[1]
    plain_notes = Notes()
    tokens, random_state, _ = generate(target, call, streamer=plain_notes)
    truth = tokens[:, prompt_length:]
    ends = row_ends(truth.tolist(), call.get("eos_token_id", []))
    assert len(set(ends)) > batch_size // 2 or option == "limit"
    for name, assistant in make_assistants(architecture, truth, ends).items():
        notes, spy, staying = Notes(), Spy(assistant, batch_size), Spy(assistant, batch_size)
        ours, state, sizes = generate(target, call, assistant_model=spy, streamer=notes)
        assert torch.equal(ours, tokens)
        assert torch.equal(state, random_state)
        assert notes.puts == plain_notes.puts
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] <= batch_size / 2 or option == "limit" and name == "msd"
        if name == "oracle":
            continue  # which draws its errors row after row
        _, _, sizes = generate(target, call, assistant_model=staying, return_dict_in_generate=True)
        assert set(sizes) == {batch_size}
        for trees, others in zip(spy.trees, staying.trees, strict=True):
            for tree, other in zip(trees, others, strict=False):
                if other[0][0] in (PAD_ID, *call.get("eos_token_id", ())):
                    break  # the row has ended
                assert torch.equal(tree[0], other[0])
                assert torch.equal(tree[1], other[1])
                # Rounding differs with the number of rows in a forward.
                torch.testing.assert_close(tree[2], other[2], atol=1e-3, rtol=1e-3)


def test_rows_leave_once_enough_have_ended() -> None:
    target = make_target("llama")
    call = make_call("llama", 8, "eos", False)
    tokens, _, _ = generate(target, call)
    ends = row_ends(tokens[:, call["input_ids"].shape[1] :].tolist(), call["eos_token_id"])
    expected, size = [], len(ends)
    for step in range(1, max(ends)):
        going = sum(end > step for end in ends)
        size = going if size - going >= LEAVING_SHARE * size else size
        expected.append(size)
    ours, _, sizes = generate(target, call, assistant_model=Roots(leaves=True))
    assert torch.equal(ours, tokens)
    assert sizes == expected


def test_rows_of_a_generator_that_forgets_nothing_stay() -> None:
    target = make_target("llama")
    call = make_call("llama", 8, "eos", False)
    tokens, _, _ = generate(target, call)
    ours, _, sizes = generate(target, call, assistant_model=Roots(leaves=False))
    assert torch.equal(ours, tokens)
    assert set(sizes) == {8}
