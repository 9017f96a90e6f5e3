"""What stood before is tried again: the search on the host, the branches in the tree, and what calls make of it."""

import copy
import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation.configuration_utils import CompileConfig
from zoo import make_draft_model, make_inputs, make_target

from transformers_msd import NgramDrafter, StaticRuntime, TokenTree, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE
from transformers_msd.drafters.ngrams import NUM_WRONG, Ngrams, Outcomes
from transformers_msd.trees.grafting import graft


NEVER = -math.inf


def text_of(*parts: list[int]) -> Ngrams:
    text = Ngrams(Outcomes())
    for part in parts:
        text.extend(part)
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3], (0, [])),
        ([1, 2, 1], (0, [])),  # one token is no match
        ([1, 2, 5, 6, 7, 1, 2], (2, [5, 6, 7, 1])),
        ([1, 2, 5, 1, 2, 6, 1, 2], (2, [6, 1, 2, 6])),  # the last place it stood at, and what followed goes on
        ([9, 2, 3, 5, 1, 2, 3, 6, 9, 2, 3], (3, [5, 1, 2, 3])),  # the longest match, not the last
        ([8, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4], (4, [5, 0, 1, 2])),
        ([8, 1, 2, 3, 4, 5, 0, 8, 1, 2, 3, 4], (5, [5, 0, 8, 1])),  # as far back as it goes
        ([7, 7, 7], (2, [7, 7, 7, 7])),
        ([3, 4, 3, 4, 3], (3, [4, 3, 4, 3])),
    ],
)
@pytest.mark.parametrize("cut", [0, 2, -1])
def test_guess_by_hand(text: list[int], expected: tuple[int, list[int]], cut: int) -> None:
    assert text_of(text).guess(4) == expected
    assert text_of(text[:cut], text[cut:]).guess(4) == expected  # however it came


def test_outcomes_are_counted_by_tokens_matched() -> None:
    outcomes = Outcomes()
    assert [outcomes.probability(length) for length in (2, 3, 12, 99)] == [2 / 5, 3 / 6, 12 / 15, 12 / 15]
    text = Ngrams(outcomes)
    text.extend([1, 2, 5, 6, 7, 1, 2])
    text.guess(3)  # 5 6 7 after two tokens
    text.extend([5, 6, 8, 9])
    assert (dict(outcomes.tried), dict(outcomes.right)) == ({2: 1, 3: 1, 4: 1}, {2: 1, 3: 1})
    assert outcomes.probability(2) == 3 / (2 + NUM_WRONG + 1)
    assert outcomes.probability(4) == 4 / (4 + NUM_WRONG + 1)


def make_tree(token_ids: list[int], parents: list[int], probabilities: list[float]) -> TokenTree:
    depth = 0
    for node, parent in enumerate(parents):
        above = 0
        while parent >= 0:
            above, parent = above + 1, parents[parent]
        depth = max(depth, above) if node else depth
    return TokenTree(torch.tensor([token_ids]), torch.tensor([parents]), torch.tensor([probabilities]).log(), depth)


def drawn(tree: TokenTree, row: int = 0) -> dict[tuple[int, ...], float]:
    """Paths of a tree, and their probabilities."""
    paths: list[tuple[int, ...]] = []
    found = {}
    nodes = zip(tree.token_ids[row].tolist(), tree.parents[row].tolist(), tree.scores[row].tolist(), strict=True)
    for node, (token_id, parent, score) in enumerate(nodes):
        assert parent < node
        paths.append((*paths[parent], token_id) if parent >= 0 else ())
        if parent >= 0:
            assert paths[node] not in found
            found[paths[node]] = round(math.exp(score), 3)
    return found


TREE = make_tree([9, 1, 2, 3, 4], [-1, 0, 0, 1, 1], [1.0, 0.5, 0.3, 0.4, 0.05])


@pytest.mark.parametrize(
    ("chain", "probabilities", "num_nodes", "expected"),
    [
        # A branch of its own, in place of the least likely node.
        ([7, 8], [0.6, 0.45], 6, {(1,): 0.5, (2,): 0.3, (1, 3): 0.4, (7,): 0.6, (7, 8): 0.45}),
        ([7, 8], [0.6, 0.02], 5, {(1,): 0.5, (2,): 0.3, (1, 3): 0.4, (7,): 0.6}),
        # It goes on where the tree has it: what follows is as likely as the surer of the two says.
        ([1, 3, 6], [0.9, 0.2, 0.1], 6, {(1,): 0.9, (2,): 0.3, (1, 3): 0.4, (1, 4): 0.05, (1, 3, 6): 0.2}),
        ([1, 3, 6], [0.9, 0.8, 0.6], 6, {(1,): 0.9, (2,): 0.3, (1, 3): 0.8, (1, 4): 0.05, (1, 3, 6): 0.6}),
        # All of it is there already.
        ([2], [0.7], 5, {(1,): 0.5, (2,): 0.7, (1, 3): 0.4, (1, 4): 0.05}),
        # Less likely than anything there.
        ([7], [0.01], 5, {(1,): 0.5, (2,): 0.3, (1, 3): 0.4, (1, 4): 0.05}),
        # A filler ends it.
        ([7, 0, 0], [0.6, 0.0, 0.0], 6, {(1,): 0.5, (2,): 0.3, (1, 3): 0.4, (1, 4): 0.05, (7,): 0.6}),
    ],
)
def test_graft_by_hand(chain: list[int], probabilities: list[float], num_nodes: int, expected: dict) -> None:
    grown = graft(TREE, torch.tensor([chain]), torch.tensor([probabilities]).log(), num_nodes)
    assert grown.num_nodes <= num_nodes
    assert drawn(grown) == expected
    own = drawn(TREE)
    branches = [path for path in expected if path not in own]
    is_ngram = grown.is_ngram & (grown.parents >= 0)
    assert int(is_ngram.sum()) == len(branches)
    assert sorted(grown.token_ids[is_ngram].tolist()) == sorted(path[-1] for path in branches)


def test_a_chain_on_a_root_alone() -> None:
    root = TokenTree.root(torch.tensor([5, 6]))
    chains = torch.tensor([[1, 2, 3], [4, 0, 0]])
    scores = torch.tensor([[0.5, 0.4, 0.3], [0.9, 0.0, 0.0]]).log()
    grown = graft(root, chains, scores, 4)
    assert (drawn(grown, 0), drawn(grown, 1)) == ({(1,): 0.5, (1, 2): 0.4, (1, 2, 3): 0.3}, {(4,): 0.9})
    assert grown.depth == 3
    assert grown.token_ids[:, 0].tolist() == [5, 6]


@pytest.mark.parametrize("seed", range(50))
def test_graft_at_random(seed: int) -> None:
    """Every node of tree and chain that fits is there once, below its parent, and never likelier than it."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, num_nodes, length = 3, 8, 4
    parents = torch.stack([torch.randint(0, node, (batch_size,), generator=generator) for node in range(1, num_nodes)])
    parents = torch.cat([torch.full((batch_size, 1), -1), parents.T], dim=1)
    steps = torch.rand(batch_size, num_nodes, generator=generator).log()
    token_ids, scores = torch.zeros_like(parents), torch.zeros_like(steps)
    for node in range(1, num_nodes):
        for row in range(batch_size):
            parent = int(parents[row, node])
            token_ids[row, node] = 1 + int((parents[row, :node] == parent).sum())  # siblings differ
            scores[row, node] = scores[row, parent] + steps[row, node]
    tree = TokenTree(token_ids, parents, scores, num_nodes - 1)
    chains = torch.randint(1, 4, (batch_size, length), generator=generator)
    chain_scores = torch.rand(batch_size, length, generator=generator).log().cumsum(-1)
    whole = graft(tree, chains, chain_scores, num_nodes + length)
    for row in range(batch_size):
        paths = {tuple(chains[row, : end + 1].tolist()): float(chain_scores[row, end].exp()) for end in range(length)}
        found, own = drawn(whole, row), drawn(tree, row)
        assert set(found) == set(own) | set(paths)
        for path, probability in found.items():
            assert probability >= max(own.get(path, 0.0), round(paths.get(path, 0.0), 3)) - 1e-3
            assert len(path) == 1 or probability <= found[path[:-1]] + 2e-3
        cut = drawn(graft(tree, chains, chain_scores, num_nodes), row)
        dropped = [found[path] for path in found if path not in cut]
        assert all(path in found for path in cut)
        assert not dropped or max(dropped) <= min(cut.values()) + 2e-3


def test_the_noise_of_a_position_tells_whether_a_token_will_be_picked() -> None:
    """Of calls in which a token of probability `p` has the noise `e`, a share of `exp(-e (1 - p) / p)` pick it."""
    torch.manual_seed(0)
    rest = torch.rand(500)
    for p in (0.2, 0.6, 0.9):
        probs = torch.cat([torch.tensor([p]), (1 - p) * rest / rest.sum()])
        noise = torch.empty(20_000, 501).exponential_(1)
        picked = ((probs / noise).argmax(-1) == 0).float()
        told = torch.exp(-noise[:, 0] * (1 - p) / p)
        for among in told.sort().indices.chunk(3):
            assert picked[among].mean().item() == pytest.approx(told[among].mean().item(), abs=0.03)


def generate(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 40, "return_dict_in_generate": True, "do_sample": False}
    return target.generate(**inputs, **settings | kwargs)


class Recites(LogitsProcessor):
    """Makes a target say one text over and over, whatever it thinks."""

    def __init__(self, text: list[int], start: int) -> None:
        self.text, self.start = text, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = self.text[(input_ids.shape[1] - self.start) % len(self.text)]
        return scores.index_fill(1, torch.tensor([said], device=scores.device), 1e4)


RECITED = [31, 47, 22, 58, 63, 35, 41]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_images", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("runtime", [False, True])
def test_what_repeats_is_accepted_whole(runtime: bool, num_images: tuple[int, ...], do_sample: bool) -> None:
    target, inputs = make_target("llava"), make_inputs("llava", num_images)
    processors = [Recites(RECITED, inputs["input_ids"].shape[1])]
    call = {"logits_processor": processors, "do_sample": do_sample, "max_new_tokens": 80}
    plain = generate(target, inputs, **call)
    drafter = NgramDrafter()
    output = generate(
        *(target, inputs), **call, assistant_model=StaticRuntime(drafter) if runtime else drafter, disable_compile=True
    )
    assert torch.equal(output.sequences, plain.sequences)
    # Plain steps until two tokens have stood before, then chains that grow with what was matched.
    lengths = output.speculative_stats.acceptance_lengths
    assert (lengths[:8] == 1).all()
    assert (lengths[8:-1] > 2).all()
    assert (lengths[12:-1] > 10).all()
    assert lengths.max() == 11


@pytest.mark.parametrize("runtime", [False, True])
def test_branches_beside_a_draft_that_is_wrong(runtime: bool) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    call = {"logits_processor": [Recites(RECITED, inputs["input_ids"].shape[1])]}
    plain = generate(target, inputs, **call)
    rounds = {}
    for ngrams in (False, True):
        tree = TreeConfig(num_nodes=8, depth=5, top_k=2, gate=False, ngrams=ngrams)
        drafter = VLMDrafter(make_draft_model("llava"), tree_config=tree)
        assistant = StaticRuntime(drafter) if runtime else drafter
        output = generate(target, inputs, **call, assistant_model=assistant, disable_compile=True)
        assert torch.equal(output.sequences, plain.sequences)
        rounds[ngrams] = output.speculative_stats.num_rounds
        assert output.speculative_stats.num_drafted <= 7 * rounds[ngrams]  # the budget is kept
    assert rounds[True] < 0.6 * rounds[False]


def test_they_go_on_alone_while_the_draft_rests() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    call = {"logits_processor": [Recites(RECITED, inputs["input_ids"].shape[1])], "max_new_tokens": 120}
    plain = generate(target, inputs, **call)
    calls = []
    model = copy.deepcopy(make_draft_model("llava"))  # others use it, too
    model.register_forward_hook(lambda *_: calls.append(1))
    tree = TreeConfig(num_nodes=6, depth=5, top_k=1)
    output = generate(target, inputs, **call, assistant_model=VLMDrafter(model, tree_config=tree))
    assert torch.equal(output.sequences, plain.sequences)
    rounds_with_draft = len(calls) / 5
    # The draft is never right; what the text so far says is not counted for it.
    assert rounds_with_draft < 0.6 * output.speculative_stats.num_rounds
    assert output.speculative_stats.acceptance_lengths.tolist()[-3][0] == 6


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_second_turn_goes_on_with_what_was_counted(architecture: str) -> None:
    target, inputs = make_target(architecture), make_inputs(architecture)
    plain = generate(target, inputs)
    first = generate(target, inputs, assistant_model=NgramDrafter())
    counted = first[CACHE]._speculative_state.state.outcomes
    num_tried = counted.tried.total()
    assert num_tried > 0
    ids = torch.cat([plain.sequences, torch.full_like(plain.sequences[:, :2], 7)], dim=1)
    expected = generate(target, {"input_ids": ids}, **{CACHE: plain[CACHE]})
    second = generate(target, {"input_ids": ids}, **{CACHE: first[CACHE]}, assistant_model=NgramDrafter())
    assert torch.equal(second.sequences, expected.sequences)
    assert second[CACHE]._speculative_state.state.outcomes.tried.total() > num_tried


def test_a_tree_of_one_shape_stays_as_it_is() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    tree = TreeConfig(topology=[[0], [1], [0, 0]], gate=False)
    call = {"logits_processor": [Recites(RECITED, inputs["input_ids"].shape[1])]}
    output = generate(target, inputs, **call, assistant_model=VLMDrafter(make_draft_model("llava"), tree_config=tree))
    assert output.speculative_stats.num_drafted == 3 * output.speculative_stats.num_rounds


@pytest.mark.parametrize("settings", [{"ngrams": False}, {"ngrams": 1}, {"ngrams": None}])
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ngrams"):
        NgramDrafter(TreeConfig(num_nodes=5, depth=4, **settings))


def test_compiled_code_sees_few_shapes() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    call = {"logits_processor": [Recites(RECITED, inputs["input_ids"].shape[1])], "max_new_tokens": 80}
    runtime = StaticRuntime(NgramDrafter())
    static = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
    plain = generate(target, inputs, **call)
    output = generate(target, inputs, **call, **static, assistant_model=runtime)
    assert torch.equal(output.sequences, plain.sequences)
    lengths = output.speculative_stats.acceptance_lengths
    assert len(lengths.unique()) > 3  # chains of many lengths
    # The target over a step and over chains of a few sizes, and what moves their rows.
    assert runtime.num_captures <= 5
