"""Trees are sized by what rounds cost, where it was measured; the tokens stay the same."""

import copy
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_eagle3
import torch
from transformers import PreTrainedModel
from zoo import make_draft_model, make_inputs, make_target

from transformers_msd import (
    AutoDraftModel,
    Committed,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    TokenTree,
    TreeCandidateGenerator,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.bench.models import load_model
from transformers_msd.cli import main
from transformers_msd.costs.calibration import costs_path, load_costs, save_costs
from transformers_msd.costs.rounds import (
    Costs,
    assumed_costs,
    costs_of_batch,
    forward_cost,
    round_cost,
    with_full_fours,
)
from transformers_msd.costs.settling import uncertainty
from transformers_msd.costs.sizing import Sizing
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.target.target import Target
from transformers_msd.traits.sizes import num_bytes_per_draft
from transformers_msd.trees.growing import grow_tree
from transformers_msd.tuning import measure_costs


# A step takes 1 second, a node of a tree 0.1 more, a level `level`.
def costs(level: float, node: float = 0.1, batch_size: int = 1) -> Costs:
    return Costs(1.0, [2, 10], [1 + 2 * node + 2 * level, 1 + 10 * node + 2 * level], level, 2, batch_size)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_msd.costs.calibration.HF_HOME", str(tmp_path))
    return tmp_path


def generate(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return target.generate(**inputs, max_new_tokens=40, return_dict_in_generate=True, **kwargs)


def test_rounds_are_linear_between_and_beyond_what_was_measured():
    measured = costs(level=0.5)
    assert [measured.round(num_nodes, 2) for num_nodes in (2, 6, 10, 20)] == pytest.approx([2.2, 2.6, 3.0, 4.0])
    assert measured.round(6, 4) == pytest.approx(3.6)


def test_rounds_of_batches_are_linear_between_and_beyond_what_was_measured():
    measured = [costs(0.5), replace(costs(0.5, node=0.8, batch_size=5), step=2.0)]
    # With one prompt 3 seconds for a step of 1; with five 10 seconds for a step of 2.
    assert [round_cost(measured, size, 10, 2) for size in (1, 3, 5, 9)] == pytest.approx([3, 6.5 / 1.5, 5, 17 / 3])
    assert round_cost(measured[:1], 8, 10, 2) == pytest.approx(3)


class Untuned(TreeCandidateGenerator):
    def draft(self, committed: Committed) -> TokenTree:
        raise NotImplementedError


def test_assumed_costs_by_hand():
    assert [forward_cost(num_tokens, "cpu") for num_tokens in (1, 2, 4, 8, 16, 24)] == [1, 1.5, 1.5, 1.65, 2, 2.25]
    assert forward_cost(40, "cpu") == pytest.approx(2.75)
    # Elsewhere 256 tokens take as long as the weights.
    assert [forward_cost(num_tokens, "cuda") for num_tokens in (1, 258)] == [1.0, 2.0]
    # A tree of eight nodes in three levels, of a draft that costs 0.2 steps, and 0.17 more for each level.
    assert assumed_costs(0.2, 0.17, "cpu").round(8, 3) == pytest.approx(0.2 + 3 * 0.17 + 1.65)
    assert assumed_costs(0.0, 0.08, "cuda").round(60, 3) == pytest.approx(3 * 0.08 + 316 / 257)
    assert assumed_costs(0.0, 0.08, "cuda", 4).round(60, 3) == pytest.approx(3 * 0.08 + 496 / 260)
    # Four levels, and a forward over 440 tokens in place of one over 20.
    tokens = torch.zeros(20, 22, dtype=torch.long)
    own = Untuned().round_cost(TokenTree(tokens, tokens, tokens, 4))
    assert own == pytest.approx(4 * 0.17 + (2.25 + 416 * 0.25 / 8) / 2.125)


@pytest.mark.parametrize(
    ("tree", "measured"),
    [
        # Measured, a round costs 3.0 steps at batch size 4, 7.4 at 16; assumed, 5.0 and 9.8.
        (TreeConfig(num_nodes=5, depth=4, top_k=1, ngrams=False), [costs(0.1), costs(0.1, node=1.2, batch_size=16)]),
        (TreeConfig(topology=[*[[rank] for rank in range(28)], [0, 0], [0, 0, 0], [0, 0, 0, 0]]), None),
    ],
    ids=["measured", "assumed"],
)
def test_gate_closes_for_a_batch_that_does_not_pay(tree, measured):
    target = make_target("llama")
    drafter = VLMDrafter(copy.deepcopy(target), tree_config=tree)
    if measured:
        save_costs(measured, [*drafter.models], target)
    for batch_size, rests in ((1, False), (4, False), (16, True)):
        inputs = make_inputs("llama", (0,) * batch_size, lengths=(7,) * batch_size)
        output = generate(target, inputs, assistant_model=drafter)
        assert torch.equal(output.sequences, generate(target, inputs).sequences)
        # Every round emits 5 tokens.
        assert (output.speculative_stats.num_plain_steps > 0) == rests


def test_most_tokens_for_each_second_by_hand():
    sizing = Sizing(costs(level=0.5))
    probabilities = [0.9, 0.5, 0.1, 0.05]
    # 1.9 tokens in 2.2 s, 2.4 in 2.3, 2.5 in 2.4, 2.55 in 2.5: two nodes are best.
    number, rate = sizing.choose(probabilities, depth=2, most=4)
    assert number == 2
    assert rate == pytest.approx(2.4 / 2.3)
    assert sizing.choose(probabilities, depth=2, most=1)[0] == 1
    # A level more costs 0.5 s, and can give what its nodes have: 0.9 + 0.5 tokens, but not 0.1.
    assert sizing.goes_on(probabilities, [0.9, 0.5], depth=2, most=9, further=1)
    assert not sizing.goes_on(probabilities, [0.1], depth=2, most=9, further=5)


def test_nodes_are_expanded_whose_children_could_be_kept():
    sizing = Sizing(costs(level=0.5))
    probabilities, frontier = [0.9, 0.5, 0.1, 0.05], [0.5, 0.2, 0.11, 0.1, 0.05]
    # Two nodes are best, 2.4 tokens in 2.3 s, and a further one costs 0.1 s: a child must bring 0.104 tokens.
    assert sizing.width(probabilities, frontier, depth=2, most=9) == 3
    assert sizing.width(probabilities, [0.01], depth=2, most=9) == 1  # the likeliest in any case
    # There is room for two nodes, and two as likely as 0.5 are known.
    assert sizing.width(probabilities, [0.6, *frontier], depth=2, most=2) == 1
    for _ in range(20):
        sizing.settle(probabilities, depth=2, most=9)
        sizing.observe([0], [True])
    assert sizing.width(probabilities, frontier, depth=2, most=9) == 1  # they don't turn out as likely


@pytest.mark.parametrize(("min_probability", "width"), [(0.0, 5), (0.1, 3), (0.25, 2), (0.5, None)])
def test_what_is_too_unlikely_is_not_expanded_whatever_it_costs(min_probability, width):
    log_probs, widths = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log(), []

    def expand(token_ids, slots, visible):
        widths.append(token_ids.shape[1])
        return log_probs[:, None].expand(-1, token_ids.shape[1], -1)

    tree = TreeConfig(num_nodes=30, depth=2, top_k=5, min_probability=min_probability)
    grow_tree(tree, torch.tensor([7]), log_probs, expand, Sizing(costs(level=0.0, node=0.0)))
    assert widths == ([] if width is None else [width])


@pytest.mark.parametrize("drafter", [VLMDrafter, EnsembleDrafter])
def test_levels_are_as_wide_as_pays(drafter):
    target = copy.deepcopy(make_target("llama"))
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(100.0)  # sure of every token
    inputs = make_inputs("llama", (0,), lengths=(7,))
    draft, widths = copy.deepcopy(target), []
    draft.register_forward_hook(lambda module, inputs, output: widths.append(output.logits.shape[1]))
    assistant = drafter(draft, tree_config=TreeConfig(num_nodes=12, depth=5, top_k=4, ngrams=False))
    found = []
    for own in (assistant, Ungated(assistant)):
        widths.clear()
        assert torch.equal(generate(target, inputs, assistant_model=own).sequences, generate(target, inputs).sequences)
        found.append(sorted(widths)[len(widths) // 2])
    assert found == [1, 4]


@pytest.mark.parametrize(
    ("num_nodes", "num_rows", "batch_size"), [(2, 2, 1), (3, 4, 1), (4, 4, 1), (7, 8, 1), (8, 8, 1), (7, 7, 2)]
)
def test_forwards_of_one_row_less_than_fours_get_it(num_nodes, num_rows, batch_size):
    target = copy.deepcopy(make_target("llama"))
    inputs = make_inputs("llama", (0,) * batch_size, lengths=(7,) * batch_size)
    plain, rows = generate(target, inputs), []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tree = TreeConfig(num_nodes=num_nodes, depth=num_nodes - 1, top_k=1, gate=False, ngrams=False)
    output = generate(target, inputs, assistant_model=VLMDrafter(make_draft_model("llama"), tree_config=tree))
    assert torch.equal(output.sequences, plain.sequences)
    assert set(rows[1:]) == {num_rows}
    stats = output.speculative_stats
    assert stats.num_drafted <= batch_size * (num_nodes - 1) * stats.num_rounds  # what is filled up is not counted
    assert with_full_fours(num_nodes, batch_size, "cuda") == num_nodes


def test_levels_that_pay_together_are_grown_though_the_first_of_them_does_not():
    # A third token in a forward costs much, and further ones hardly anything.
    sizing = Sizing(Costs(step=1.0, num_nodes=[1, 2, 3, 20], rounds=[1.0, 1.1, 3.0, 3.1], level=0.1, depth=0))
    # 1.9 tokens in 1.2 s, and with further levels of 0.81, 0.73, 0.66 tokens and so on 2.71 in 3.2 s, 5.70 in 3.73 and
    # 6.13 in 3.84.
    assert [sizing.goes_on([0.9], [0.9], depth=1, most=30, further=levels) for levels in (1, 5, 6)] == [False] * 3
    assert sizing.goes_on([0.9], [0.9], depth=1, most=30, further=7)


def test_with_several_prompts_the_likeliest_node_of_a_level_may_pay_alone():
    # A node costs 0.25 s, a level 0.1: 1.9 tokens come in 1.35 s. With four nodes a level 2.88 come in 2.45 s,
    # with one 2.71 in 1.7, and with a level more 3.44 in 2.05.
    measured = Costs(step=1.0, num_nodes=[1, 2], rounds=[1.0, 1.25], level=0.1, depth=0)
    probabilities = [0.9, 0.05, 0.03, 0.01]
    for batch_size, pays in ((1, False), (8, True)):
        sizing = Sizing(replace(measured, batch_size=batch_size))
        assert sizing.goes_on(probabilities, probabilities, depth=1, most=30, further=2) == pays


def test_trees_that_were_grown_without_asking_are_as_deep_as_the_last_one_should_have_been():
    sizing = Sizing(costs(level=0.5))
    assert sizing.plan(6) == 6  # nothing is known yet
    # A level costs 0.5 s. 0.9 and 0.5 could pass on 1.4 tokens, 0.2 and 0.1 only 0.3.
    levels = [[0.9, 0.05], [0.5, 0.9, 0.0, 0.0], [0.2, 0.1], [0.01]]
    assert sizing.settle_whole(levels, width=2, most=9) == 4
    assert sizing.plan(6) == 3
    assert sizing.settle_whole(levels[:1], width=2, most=9) == 1
    assert [sizing.plan(most) for most in (6, 1)] == [2, 1]  # the only level paid
    assert sizing.settle_whole([[], []], width=2, most=9) == 1  # nothing is likely enough


def test_probabilities_are_scaled_by_how_they_turned_out():
    sizing = Sizing(costs(level=0.5, node=0.6))
    assert sizing.settle([0.9, 0.5, 0.4], depth=3, most=3) == 3
    for _ in range(20):
        sizing.settle([0.9, 0.5, 0.4], depth=3, most=3)
        sizing.observe([0], [True])
    assert sizing.settle([0.9, 0.5, 0.4], depth=3, most=3) == 1
    sizing.observe([7], [True])  # more than the tree was deep: it rested since, and nothing is learned
    assert sizing.settle([0.9, 0.5, 0.4], depth=3, most=3) == 1


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("kind", ["msd", "vlm", "ensemble"])
def test_tokens_are_equal_and_trees_follow_the_costs(kind, do_sample):
    target = make_target("llava")
    inputs = make_inputs("llava", (1,))
    plain = generate(target, inputs, do_sample=do_sample)
    tree = TreeConfig(num_nodes=12, depth=5, top_k=3, gate=False)
    if kind == "msd":
        torch.manual_seed(1)
        assistant = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
        assistant.tree_config, models = tree, [assistant]
    else:
        model = make_draft_model("llava")
        assistant = (VLMDrafter if kind == "vlm" else EnsembleDrafter)(model, tree_config=tree)
        models = [model]
    drafted = []
    for measured in (None, costs(level=0.0, node=0.0), costs(level=5.0), costs(level=0.0, node=3.0)):
        if measured is not None:
            save_costs([measured], models, target)
        output = generate(target, inputs, do_sample=do_sample, assistant_model=assistant)
        assert torch.equal(output.sequences, plain.sequences)
        drafted.append(output.speculative_stats.num_drafted / output.speculative_stats.num_rounds)
    assert drafted[:2] == [11, 11]  # what costs nothing is always worth it
    assert drafted[2] <= 3  # one level
    assert drafted[3] < 2


def test_a_level_costs_what_the_draft_reads_of_the_weights():
    target = make_target("llama")
    layers = sum(weight.nbytes for weight in target.model.layers.parameters()) + target.model.norm.weight.nbytes
    head = target.get_output_embeddings().weight.nbytes
    costs = {}
    for name, settings in (("the target's head", {}), ("of its own", {"draft_vocab_size": 8})):
        draft = MSDDraftModel(MSDConfig.from_target(target.config, **settings)).eval()
        own = sum(weight.nbytes for weight in draft.parameters())
        read = num_bytes_per_draft(draft, target)
        assert read == own + (head if name == "the target's head" else 0)
        if name == "of its own":
            draft.choose_tokens(torch.arange(target.config.vocab_size).float(), target.get_output_embeddings())
        drafter = Ungated(draft)
        made = []
        make = drafter.assistant.candidate_generator
        drafter.assistant.candidate_generator = lambda *args, make=make, made=made: (
            made.append(make(*args)) or made[-1]
        )
        generate(target, make_inputs("llama", (0,), lengths=(7,)), assistant_model=drafter)
        costs[name] = made[0].assumed_draft_cost(1, 3, "cpu")
        assert costs[name] == pytest.approx(3 * max(0.17, read / (layers + head)))
    assert costs["the target's head"] > costs["of its own"] > 3 * 0.17


@pytest.mark.parametrize("has_own_head", [False, True])
@pytest.mark.parametrize("kept", ["inside another module", "where nobody says", "where nothing shows them"])
def test_weights_that_can_not_be_counted_are_no_obstacle(kept, has_own_head):
    target = copy.deepcopy(make_target("llama"))
    draft = MSDDraftModel(MSDConfig.from_target(target.config, draft_vocab_size=8 if has_own_head else None)).eval()
    if has_own_head:
        draft.choose_tokens(torch.arange(target.config.vocab_size).float(), target.get_output_embeddings())
    if kept == "inside another module":
        target.lm_head = torch.nn.Sequential(target.lm_head)
    elif kept == "where nothing shows them":
        target.model.layers.parameters = lambda *args, **kwargs: iter(())
        target.get_decoder = lambda: target.model.layers
        target.lm_head.parameters = lambda *args, **kwargs: iter(())
    elif has_own_head:
        target.get_output_embeddings = lambda: None
    inputs = make_inputs("llama", (0,), lengths=(7,))
    drafted = generate(target, inputs, assistant_model=draft)
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)


def test_assumed_costs_are_those_of_the_batch():
    target = make_target("llama")
    drafter = VLMDrafter(make_draft_model("llama"))
    made, make = [], drafter.candidate_generator
    drafter.candidate_generator = lambda *args: made.append(make(*args)) or made[-1]
    generate(target, make_inputs("llama", (0,) * 7, lengths=(7,) * 7), assistant_model=drafter, eos_token_id=10**6)
    tokens = torch.zeros(7, 6, dtype=torch.long)
    tree = TokenTree(tokens, tokens, tokens, 3)
    assert made[0].sizing.costs.round(6, 3) == pytest.approx(made[0].round_cost(tree), rel=0.05)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", [VLMDrafter, EnsembleDrafter])
def test_trees_follow_assumed_costs_where_none_were_measured(drafter, do_sample):
    target = copy.deepcopy(make_target("llama"))
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(100.0)  # sure of every token
    inputs = make_inputs("llama", (0,), lengths=(7,))
    plain = generate(target, inputs, do_sample=do_sample)
    sizes = {}
    for name, draft in (("sure", copy.deepcopy(target)), ("unsure", make_draft_model("llama"))):
        for gate in (True, False):
            tree = TreeConfig(num_nodes=12, depth=5, top_k=3, gate=gate, ngrams=False)
            assistant = drafter(draft, tree_config=tree)
            output = generate(target, inputs, do_sample=do_sample, assistant_model=assistant)
            assert torch.equal(output.sequences, plain.sequences)
            stats = output.speculative_stats
            sizes[name, gate] = stats.num_drafted / (stats.num_rounds - stats.num_plain_steps)
    assert sizes["sure", False] == sizes["unsure", False] == 11
    # Where the first child is certain its siblings don't pay. Where none is likely three are tried: a forward takes as
    # long for four nodes as for two.
    assert 4.5 < sizes["sure", True] <= 6
    assert 3 <= sizes["unsure", True] <= 4
    output = generate(target, inputs, do_sample=do_sample, assistant_model=Ungated(assistant))
    assert output.speculative_stats.num_drafted == 11 * output.speculative_stats.num_rounds


def test_costs_of_another_pair_or_machine_are_ignored(monkeypatch):
    target, draft = make_target("llama"), make_draft_model("llama")
    save_costs([costs(1.0)], [draft], target)
    assert load_costs([draft], target) == [costs(1.0)]
    assert load_costs([make_draft_model("llava")], target) is None
    assert load_costs([draft, draft], target) is None
    assert load_costs([draft], copy.deepcopy(target).to(torch.bfloat16)) is None
    assert load_costs([draft], make_target("llama", "eager")) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert load_costs([draft], target) is None


@pytest.mark.parametrize("do_sample", [False, True])
def test_trees_of_several_prompts_follow_what_their_batch_costs(do_sample):
    target = make_target("llava")
    drafter = VLMDrafter(make_draft_model("llava"), tree_config=TreeConfig(12, 5, 3, gate=False, ngrams=False))
    # Nodes cost nothing with one prompt, and a lot with two.
    inputs, measured = make_inputs("llava", (1, 1)), [costs(0.0, node=0.0), costs(0.0, node=3.0, batch_size=2)]
    for saved, num_drafted in ((None, 11), (measured[:1], 11), (measured, 1)):
        if saved is not None:
            save_costs(saved, [*drafter.models], target)
        output = generate(target, inputs, do_sample=do_sample, assistant_model=drafter)
        assert torch.equal(output.sequences, generate(target, inputs, do_sample=do_sample).sequences)
        num_row_rounds = int((output.speculative_stats.acceptance_lengths > 0).sum())
        assert output.speculative_stats.num_drafted == num_drafted * num_row_rounds


def test_costs_of_a_batch_are_those_of_its_rounds():
    measured = [costs(0.5), replace(costs(0.2, node=0.8, batch_size=5), step=2.0, num_nodes=[3, 16])]
    blended = costs_of_batch(measured, 3)
    for num_nodes, depth in ((1, 0), (2, 2), (5, 3), (10, 6), (30, 1)):
        expected = round_cost(measured, 3, num_nodes, depth)
        assert blended.round(num_nodes, depth) == pytest.approx(expected)


def test_prompts_of_a_batch_count_alike():
    sizing = Sizing(costs(level=0.5, node=0.6))
    sizing.settle([0.9, 0.9], depth=2, most=9)
    sizing.observe([1, 0, 9, 2], [True, True, True, False])  # one has caught up after a rest, one has ended
    assert sizing.going_on == [True, True, True, False]
    assert sizing._accepted / sizing._expected == pytest.approx((Sizing.PRIOR + 0.5) / (Sizing.PRIOR + 1.8))


@pytest.fixture
def few_rounds(monkeypatch):
    """Where it does not matter how exact costs are."""
    monkeypatch.setattr("transformers_msd.tuning.NUM_ROUNDS", 4)


def test_measuring_leaves_the_draft_as_it_was(few_rounds):
    target = make_target("llama")
    tree = TreeConfig(num_nodes=5, depth=3, top_k=2)
    drafter = VLMDrafter(make_draft_model("llama"), tree_config=tree)
    measured = measure_costs(target, drafter, prompt_length=32, tolerance=math.inf)
    assert drafter.tree_config == tree
    assert measured.step > 0
    assert measured.rounds == sorted(measured.rounds)
    assert measured.rounds[0] > measured.step / 2


def test_measuring_takes_as_many_rounds_whether_drafts_are_right_or_wrong(monkeypatch):
    monkeypatch.setattr("transformers_msd.tuning.NUM_PASSES", 1)
    target = make_target("llama")
    wrong = copy.deepcopy(make_draft_model("llama"))  # tests share it
    wrong.get_output_embeddings().weight.data.neg_()
    rounds = []
    forward_tree = Target.forward_tree
    monkeypatch.setattr(Target, "forward_tree", lambda *args: rounds.append(args) or forward_tree(*args))
    counts = []
    for draft in (copy.deepcopy(target), wrong):
        rounds.clear()
        measure_costs(target, VLMDrafter(draft), prompt_length=8, tolerance=math.inf)
        counts.append(len(rounds))
    assert counts[0] == counts[1] < 200


def test_draft_of_another_target_is_not_measured():
    config = copy.deepcopy(make_target("llama").config)
    config.vocab_size += 8
    draft = MSDDraftModel(MSDConfig.from_target(config))
    with pytest.raises(ValueError, match="made for a target of `vocab_size`"):
        measure_costs(make_target("llama"), draft)


@pytest.fixture
def pair(tmp_path_factory):
    """A folder of a small target and its draft."""
    folder = tmp_path_factory.mktemp("pair")
    make_target("llama").save_pretrained(folder / "target")
    torch.manual_seed(1)
    MSDDraftModel(MSDConfig.from_target(make_target("llama").config)).save_pretrained(folder / "draft")
    return folder


def test_command_measures_and_saves(pair, capsys, few_rounds):
    models = ["--target_model", str(pair / "target"), "--draft_model", str(pair / "draft")]
    main(["tune", *models, "--prompt_length", "16", "--tolerance", "inf"])
    assert "A plain step takes" in capsys.readouterr().out
    target = type(make_target("llama")).from_pretrained(pair / "target")
    draft = MSDDraftModel.from_pretrained(pair / "draft")
    saved = json.loads(costs_path([draft], target).read_text())
    assert load_costs([draft], target) == [Costs(**each) for each in saved]
    assert [each["batch_size"] for each in saved] == [1, 4, 16]
    assert saved[2]["step"] > 0


def test_command_measures_a_draft_as_others_published_it(tmp_path, capsys, few_rounds):
    name = next(iter(test_eagle3.LAYOUTS))
    test_eagle3.make_deep_target(test_eagle3.architecture_of(name)).save_pretrained(tmp_path / "target")
    test_eagle3.write(tmp_path / "draft", name)
    models = ["--target_model", str(tmp_path / "target"), "--draft_model", str(tmp_path / "draft")]
    main(["tune", *models, "--prompt_length", "16", "--tolerance", "inf"])
    written = capsys.readouterr().out.splitlines()[-1]
    main(["tune", *models, "--show"])
    assert written.replace("Written to", "Stored in") in capsys.readouterr().out
    target = load_model(str(tmp_path / "target"), "auto", "cpu")
    draft = AutoDraftModel.from_pretrained(tmp_path / "draft", target=target)
    assert load_costs([draft], target) is not None


CHECKPOINTS = Path(__file__).parents[1] / "training/tiny_world/checkpoints"
TUNE = ["tune", "--target_model", str(CHECKPOINTS / "target"), "--prompt_length", "8", "--device", "cpu"]
# As `tune` wrote them before it noted how uncertain they are.
OLD = '[{"step": 0.01, "num_nodes": [2, 4], "rounds": [0.02, 0.03], "level": 0.004, "depth": 2, "batch_size": 1}]'


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0], math.inf),
        ([2.0, 2.0, 2.0, 2.0], 0.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / math.sqrt(5) / 3),
        ([1.0, 2.0, 3.0, 4.0, 500.0], 2 / math.sqrt(5) / 3),  # one pass may be as slow as it likes
        ([5.0, 1.0, 4.0, 2.0, 3.0] * 100, 2 / math.sqrt(500) / 3),
    ],
)
def test_uncertainty_of_a_median_by_hand(values: list[float], expected: float) -> None:
    assert uncertainty(values) == pytest.approx(expected)


def test_uncertainty_is_about_one_standard_error() -> None:
    values = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0)) + 100
    told = statistics.mean(100 * uncertainty(row) for row in values.tolist())
    assert told == pytest.approx(float(values.median(1).values.std()), rel=0.2)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("draft", ["draft", "draft_vlm", "target"])
def test_what_is_stored_is_shown_and_removed_without_loading_weights(draft, dtype, capsys, monkeypatch):
    folder = str(CHECKPOINTS / draft)
    target, model = (load_model(name, dtype, "cpu") for name in (TUNE[2], folder))
    path = costs_path([model], target)
    look = [*TUNE, "--draft_model", folder, "--dtype", dtype]
    monkeypatch.setattr("transformers_msd.bench.models.load_model", lambda *_: pytest.fail("weights were loaded"))
    main([*look, "--show"])
    assert f"Nothing is stored for {folder} and {TUNE[2]}, {target.dtype}, " in capsys.readouterr().out
    path.parent.mkdir(parents=True)
    path.write_text(OLD)
    main([*look, "--show"])
    said = capsys.readouterr().out
    assert "A plain step takes 10.00 ms, a further level of a tree 4.00 ms." in said
    assert "A round of   4 nodes in 2 levels: 30.00 ms, 3.00 plain steps" in said
    assert f"Stored in {path}." in said
    assert load_costs([model], target) == [Costs(0.01, [2, 4], [0.02, 0.03], 0.004, 2)]
    main([*look, "--forget"])
    assert capsys.readouterr().out == f"Removed {path}.\n"
    assert not path.exists()
    main([*look, "--forget"])
    assert "Nothing is stored" in capsys.readouterr().out


def test_costs_that_do_not_settle_are_refused_and_nothing_is_stored(pair, cache_folder, few_rounds, monkeypatch):
    monkeypatch.setattr("transformers_msd.tuning.MAX_PASSES", 4)
    command = f"tune --target_model {pair}/target --draft_model {pair}/draft --prompt_length 8 --tolerance 1e-9"
    with pytest.raises(SystemExit, match=r"must be settled to 0\.0%, got in 4 passes: a round of .* uncertain by .*%"):
        main(command.split())
    assert not list(cache_folder.rglob("*.json"))


def test_a_round_far_cheaper_than_a_step_is_refused(few_rounds, monkeypatch):
    monkeypatch.setattr("transformers_msd.tuning.MAX_PASSES", 4)
    monkeypatch.setattr("transformers_msd.tuning.LEAST_ROUND", 1e9)
    with pytest.raises(ValueError, match="which can't be, as a forward of the target is in both"):
        measure_costs(make_target("llama"), VLMDrafter(make_draft_model("llama")), 8, tolerance=math.inf)
