"""Where drafting does not pay it rests; the tokens stay the same, and it comes back when it pays again."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from zoo import ARCHITECTURES, make_inputs, make_target

from transformers_msd import MSDConfig, MSDDraftModel, TokenTree, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE
from transformers_msd.drafters.gate import FIRST_REST, LONGER, Evidence, Gate


def generate(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return target.generate(**inputs, return_dict_in_generate=True, **{"max_new_tokens": 60} | kwargs)


def random_draft(target: PreTrainedModel, **settings: Any) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TreeConfig(num_nodes=4, depth=3, top_k=1, ngrams=False, **settings)
    return draft


# As on the fields of one colour of a chessboard each is tried alone and in a batch, greedy and sampled in each run.
CELLS = [
    pytest.param(architecture, num_images, do_sample, marks=pytest.mark.slow if is_slow else ())
    for place, architecture in enumerate(ARCHITECTURES)
    for num_images in ((1,), (2, 0, 1))
    for do_sample in (False, True)
    for is_slow in ((place + len(num_images) // 2 + do_sample) % 2,)
]


@pytest.mark.parametrize(("architecture", "num_images", "do_sample"), CELLS)
def test_bad_draft_rests_and_the_tokens_are_equal(architecture, num_images, do_sample, monkeypatch):
    # Trees of one or two tokens may pay even here.
    monkeypatch.setattr("transformers_msd.drafters.base.TreeCandidateGenerator.follow_costs", lambda *_: None)
    target = make_target(architecture)
    inputs = make_inputs(architecture, num_images)
    plain = generate(target, inputs, do_sample=do_sample)
    drafted = generate(target, inputs, do_sample=do_sample, assistant_model=random_draft(target))
    assert torch.equal(drafted.sequences, plain.sequences)
    for layer, plain_layer in zip(drafted[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(layer.keys, plain_layer.keys, atol=1e-4, rtol=1e-4)
    stats = drafted.speculative_stats
    assert stats.num_plain_steps > FIRST_REST
    assert stats.acceptance_lengths.sum() == plain.sequences.shape[0] * 59
    ungated = generate(target, inputs, do_sample=do_sample, assistant_model=random_draft(target, gate=False))
    assert torch.equal(ungated.sequences, plain.sequences)
    assert ungated.speculative_stats.num_plain_steps == 0


def test_rests_grow_and_probes_are_short():
    target = make_target("llama")
    draft = random_draft(target)
    widths = []
    draft.register_forward_hook(lambda module, args, kwargs, output: widths.append(1), with_kwargs=True)
    output = generate(target, make_inputs("llama", (1,)), max_new_tokens=280, assistant_model=draft)
    lengths = output.speculative_stats.acceptance_lengths[:, 0]
    assert lengths.float().mean() < 1.2
    num_drafted_rounds = len(lengths) - output.speculative_stats.num_plain_steps
    # A round of one level and two nodes costs 1.5 steps and 0.7, the draft's share of the weights, for one token. Of
    # three steps that may be lost it promises half, which are lost after two rounds. Rests of 16 and 96 steps follow,
    # with a round between them.
    assert num_drafted_rounds == 2 + 1 + 1
    assert output.speculative_stats.num_plain_steps > FIRST_REST * (1 + LONGER)


def test_rows_that_wait_at_the_length_limit_do_not_close_the_gate():
    tree = TokenTree.root(torch.zeros(3, dtype=torch.long))

    class Candidates:
        def draft(self, committed):
            return tree

        def round_cost(self, tree):
            return 1.9

    class Emission:
        lengths = [1, 1, 1]
        pad_rows = [False, False, False]
        num_ngrams = num_expected = [0, 0, 0]

    class Committed:
        lengths = root_token_ids = torch.zeros(3, dtype=torch.long)

    emission = Emission()
    gate = Gate(Candidates(), emission)
    for number in range(10):
        # Two rows wait from the third round on, one of them with pads.
        waiting = min(number, 2)
        emission.lengths = [1 + 4 * waiting, 1 + 4 * waiting + number, 1 + 2 * number]
        emission.pad_rows = [False, number > 2, False]
        assert gate.draft(Committed()) is tree


@pytest.mark.parametrize("architecture", ["llama", "llava", "qwen2_5_vl"])
def test_draft_knows_what_came_to_stand_while_it_rested(architecture, monkeypatch):
    target = make_target(architecture)
    chain = TreeConfig(num_nodes=5, depth=4, top_k=1, ngrams=False)
    drafter = VLMDrafter(copy.deepcopy(target), tree_config=chain)
    # Rounds count as bad whatever they give.
    monkeypatch.setattr("transformers_msd.drafters.base.TreeCandidateGenerator.round_cost", lambda self, tree: 7.0)
    monkeypatch.setattr("transformers_msd.drafters.gate.LONGER", 1)
    monkeypatch.setattr("transformers_msd.drafters.base.TreeCandidateGenerator.follow_costs", lambda *_: None)
    # A random model is right without being sure of it.
    observe = Evidence.observe
    monkeypatch.setattr(Evidence, "observe", lambda self, accepted, _, cost: observe(self, accepted, accepted, cost))
    output = generate(target, make_inputs(architecture, (1,)), max_new_tokens=80, assistant_model=drafter)
    lengths = output.speculative_stats.acceptance_lengths[:-1, 0].tolist()
    # Each of 5 tokens loses 2 steps, of 5/7 of 9 that may be lost, of which a rest gives back no more than one round.
    first, rest, probe = [5] * 4, [1] * FIRST_REST, [5]
    expected = first + (rest + probe) * 3
    assert lengths == expected[: len(lengths)]
    assert len(lengths) > len(first + rest + probe)


def test_good_draft_never_rests():
    target = make_target("llava")
    drafter = VLMDrafter(copy.deepcopy(target), tree_config=TreeConfig(num_nodes=5, depth=4, top_k=1))
    output = generate(target, make_inputs("llava", (1, 1)), assistant_model=drafter)
    assert output.speculative_stats.num_plain_steps == 0


def test_evidence_by_hand():
    # Of a cost of 2.5 steps, three may be lost, and less by as much as the draft promises less: rounds of two tokens
    # lose half a step each, and five of them 2.5, where 0.8 of 3 may be lost.
    evidence = Evidence()
    assert [evidence.observe(accepted=1, expected=1, cost=2.5) for _ in range(5)] == [0] * 4 + [FIRST_REST]
    evidence = Evidence()
    assert [evidence.observe(accepted=1, expected=1.4, cost=2.5) for _ in range(6)] == [0] * 5 + [FIRST_REST]
    # After a rest little is left to lose.
    assert [evidence.observe(accepted=1, expected=1.4, cost=2.5) for _ in range(2)] == [0, FIRST_REST * LONGER]
    # What was won is remembered, up to five steps of it, and lets the next rest be short.
    assert [evidence.observe(accepted=5, expected=5, cost=2.5) for _ in range(9)] == [0] * 9
    assert evidence.won == 5.0
    rests = [evidence.observe(accepted=0, expected=0.1, cost=2.5) for _ in range(6)]
    assert rests == [0, 0, 0, 0, FIRST_REST, FIRST_REST * LONGER]


def test_a_draft_that_expects_much_is_heard_while_it_is_right_elsewhere():
    evidence = Evidence()
    for _ in range(4):
        evidence.observe(accepted=4, expected=4, cost=2.5)
    # Ten rounds in vain lose what was won, and the draft's word with it.
    rests = [evidence.observe(accepted=0, expected=4, cost=2.5) for _ in range(10)]
    silent = [Evidence(evidence.won).observe(accepted=0, expected=0, cost=2.5)]
    assert rests.index(FIRST_REST) > 5
    assert silent == [FIRST_REST]
