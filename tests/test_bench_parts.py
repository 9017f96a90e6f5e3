"""The parts of a benchmark: methods, runs, their figures, and where tokens differ."""

import copy
from collections import Counter
from itertools import count
from statistics import median

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import CompileConfig
from zoo import make_draft_model, make_inputs, make_target

from training.tiny_world.world.rows import evaluation_prompts
from training.tiny_world.world.write_dataset import held_out_dataset
from transformers_msd import MSDConfig, MSDDraftModel, StaticRuntime, TreeConfig, VLMDrafter
from transformers_msd.bench.assistants import PhaseTimer, Simulated
from transformers_msd.bench.divergence import find_divergences
from transformers_msd.bench.measure import Run, Runs, row_ends, run_method, run_methods
from transformers_msd.bench.methods import PLAIN, Method, draft_names, make_methods
from transformers_msd.bench.report import about, tables
from transformers_msd.bench.run import count_divergences
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.bench.settling import Settling
from transformers_msd.bench.summary import summarize
from transformers_msd.compat import CACHE
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.trees.topology import EAGLE


def test_a_baseline_that_fails_is_left_out_and_a_draft_that_fails_is_not():
    target, batches = make_target("llava"), [make_inputs("llava", (1,))]
    broken = Method("broken", {"cache_implementation": "nonsense"})
    settings = {"max_new_tokens": 6, "do_sample": False}
    results, failures = run_methods(target, batches, [PLAIN, broken], settings, 1, 0, lambda: None)
    assert [result.method.name for result in results] == ["plain generate"]
    ((name, reason),) = failures
    assert name == "broken"
    assert reason.startswith("it raises ValueError: ")
    ours = Method("ours", broken.call, drafts_trees=True)
    with pytest.raises(ValueError, match="nonsense"):
        run_methods(target, batches, [PLAIN, ours], settings, 1, 0, lambda: None)


def test_rounds_of_stock_assistance_are_counted_by_what_comes_at_once():
    target, inputs = make_target("llama"), make_inputs("llama", (0,))
    settings = {"max_new_tokens": 30, "do_sample": False}
    plain = run_method(target, inputs, PLAIN, settings, seed=0)
    twin = Method("assisted by itself", {"assistant_model": copy.deepcopy(target)}, is_exact=False, is_batched=False)
    run = run_method(target, inputs, twin, settings, seed=0)
    assert torch.equal(run.tokens, plain.tokens)
    assert (plain.num_rounds, plain.lengths, plain.num_decoded) == (29, [[1] * 29], 29)
    assert run.num_rounds == len(run.lengths[0]) < 20
    assert sum(run.lengths[0]) == run.num_decoded < 29


def make_msd(target: PreTrainedModel, tree: TreeConfig) -> MSDDrafter:
    torch.manual_seed(1)
    return MSDDrafter(MSDDraftModel(MSDConfig.from_target(target.config)).eval(), tree)


COMPILED = {"compile_config": CompileConfig(backend="eager", mode="default")}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_phases_are_timed_once_a_round_and_change_no_token(is_compiled):
    target, inputs = make_target("llava"), make_inputs("llava", (1, 0))
    settings = {"max_new_tokens": 20, "do_sample": True}
    drafter, call = VLMDrafter(make_draft_model("llava"), tree_config=TreeConfig(6, 3, 2)), {}
    if is_compiled:
        drafter, call = StaticRuntime(make_msd(target, TreeConfig(4, 2, 2, gate=False))), COMPILED
    timer = PhaseTimer(drafter)
    method = Method("timed", {"assistant_model": drafter} | call, drafts_trees=True)
    plain = run_method(target, inputs, PLAIN, settings, seed=0)
    run = run_method(target, inputs, method, settings, seed=0, timer=timer)
    assert torch.equal(run.tokens, plain.tokens)
    phases = Counter(phase for phase, _, _ in timer.notes)
    # The prompt is committed, too.
    assert phases == {"draft": run.num_rounds, "verify": run.num_rounds, "commit": run.num_rounds + 1}
    assert set(run.phase_seconds) == {"draft", "verify", "commit"}
    assert timer.seconds_since(timer.notes[-1][1]) == {"draft": 0, "verify": 0, "commit": timer.notes[-1][2]}
    if is_compiled:
        # What is timed is what else would run.
        assert method.num_captures == 1
        assert method.runtime.assistant is drafter.assistant


def test_runs_that_compile_are_not_timed():
    target, batches = make_target("llama"), [make_inputs("llama", (0,))]
    runtime = StaticRuntime(make_msd(target, TreeConfig(4, 2, 2, gate=False)))
    method = Method("own", {"assistant_model": runtime} | COMPILED, drafts_trees=True)
    num_runs = 0

    def on_run() -> None:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 4:  # of plain and of ours, to warm up and timed, the phases apart: the first timed pass
            method.free()

    results, _ = run_methods(target, batches, [PLAIN, method], {"max_new_tokens": 8, "do_sample": False}, 1, 0, on_run)
    plain, own = results
    assert num_runs == 6
    assert (len(plain.warm_up), len(own.warm_up)) == (1, 4)
    assert [len(runs) for runs in (plain.passes, own.passes, own.split)] == [1, 1, 1]
    figures = summarize(own, plain, plain, 0.5)
    assert figures["warm_up_seconds"] == sum(run.seconds for run in own.warm_up)
    assert figures["num_captures"] == 1


def test_a_method_that_never_stops_compiling_is_told(monkeypatch):
    captures = count()
    monkeypatch.setattr(
        Method, "num_captures", property(lambda method: next(captures) if method.drafts_trees else None)
    )
    target, batches = make_target("llama"), [make_inputs("llama", (0,))]
    method = Method("own", {"assistant_model": make_msd(target, TreeConfig(4, 2, 2))}, drafts_trees=True)
    settings = {"max_new_tokens": 2, "do_sample": False}
    with pytest.raises(ValueError, match="got own, which compiled something in each of 16 runs"):
        run_methods(target, batches, [PLAIN, method], settings, 1, 0, lambda: None)


@pytest.mark.parametrize("tree", [TreeConfig(4, 6, 1), TreeConfig(8, 4, 2, min_probability=0.5)])
def test_simulated_trees_of_few_nodes_are_as_deep_as_they_can_be(tree):
    target, inputs = make_target("llama"), make_inputs("llama", (0,))
    settings = {"max_new_tokens": 20, "do_sample": False}
    plain = run_method(target, inputs, PLAIN, settings, seed=0)
    for is_fixed in (False, True):
        simulated = Simulated(make_msd(target, tree), 1.0)
        simulated.continuation = plain.tokens
        call = {"assistant_model": StaticRuntime(simulated) if is_fixed else simulated, "disable_compile": True}
        method = Method("simulated", call, drafts_trees=True)
        assert method.simulated is simulated
        run = run_method(target, inputs, method, settings, seed=0)
        assert torch.equal(run.tokens, plain.tokens)
        assert max(run.lengths[0]) == min(tree.num_nodes, tree.depth + 1)


def test_planted_divergence_is_found_with_its_gap():
    target, settings = make_target("llava"), {"max_new_tokens": 12, "do_sample": False}
    inputs = make_inputs("llava", (1, 1))
    plain = run_method(target, inputs, PLAIN, settings, seed=0)
    # Forbidden is what the second row says in step 5, and none says before.
    token_id = int(plain.tokens[1, 5])
    assert token_id not in plain.tokens[1, :5]
    planted = Method("planted", {"suppress_tokens": [token_id]})
    run = run_method(target, inputs, planted, settings, seed=0)
    found = {
        divergence.row: divergence
        for divergence in find_divergences(target, inputs, settings, 0, plain.tokens, run.tokens)
    }
    assert found[1].step == 5
    assert (found[1].plain_token_id, found[1].token_id) == (token_id, int(run.tokens[1, 5]))
    output = target.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    best, second = output.logits[5][1].topk(2).values.tolist()
    assert found[1].logit_gap == pytest.approx(best - second)
    assert find_divergences(target, inputs, settings, 0, plain.tokens, plain.tokens) == []

    one = make_inputs("llava", (1,))
    own = run_method(target, one, PLAIN, settings, seed=0)
    planted = Method("planted", {"suppress_tokens": [int(own.tokens[0, 3])]})
    count = count_divergences(target, [one], planted, settings | {"do_sample": True, "top_k": 1}, 4, seed=0)
    assert (count["num_generations"], count["num_different"], count["num_tokens"]) == (4, 4, 48)


def test_an_answer_that_ended_earlier_has_no_gap():
    target, settings = make_target("llava"), {"max_new_tokens": 6, "do_sample": False}
    inputs = make_inputs("llava", (1,))
    tokens = run_method(target, inputs, PLAIN, settings, seed=0).tokens
    (found,) = find_divergences(target, inputs, settings, 0, tokens, tokens[:, :4])
    assert (found.step, found.token_id, found.logit_gap) == (4, -1, None)


def run_of(
    num_tokens: int, seconds: float, later: float, lengths: list[int], verify: float = 0.0, num_rows: int = 1
) -> Run:
    return Run(
        tokens=torch.zeros(num_rows, num_tokens),
        num_tokens=num_tokens,
        num_decoded=num_tokens - 1,
        seconds=seconds,
        decode_seconds=seconds - 1,
        later_seconds=later,
        num_rounds=len(lengths),
        lengths=[lengths],
        peak_memory=num_tokens,
        kept_memory=100,
        phase_seconds={"draft": 0.2, "verify": verify, "commit": 0.0},
    )


def test_figures_of_a_method_by_hand():
    run = run_of
    # Two prompts of 9 and 5 tokens, in two passes; a step takes 1 second, then 2.
    plain = Runs(
        PLAIN, [[run(9, 9, 7, [1] * 8), run(5, 5, 3, [1] * 4)], [run(9, 17, 14, [1] * 8), run(5, 9, 6, [1] * 4)]]
    )
    own = [run(9, 5, 2, [4, 4]), run(5, 3, 1, [3, 1])]
    method = Method("own", drafts_trees=True)
    split = [[run(9, 6, 3, [4, 4], 1.0), run(5, 4, 1, [3, 1], 0.4)]]
    compiled = Runs(PLAIN, [[run(9, 5, 3.5, [1] * 8)]] * 2)
    figures = summarize(
        Runs(method, [own, own], split, [run(9, 30, 2, [4, 4]), run(9, 5, 2, [4, 4])]), plain, compiled, 0.1
    )
    assert figures["acceptance_length"] == 3
    assert figures["acceptance_by_depth"] == [0.75, 0.75, 0.5]
    assert figures["round_seconds"] == 1.5
    assert figures["round_cost"] == 1.5 / 1.5  # plain's median is between 1 and 2 seconds
    assert figures["round_cost_range"] == pytest.approx([1.5 / 2, 1.5])
    assert figures["compiled_round_cost"] == 3.0
    assert figures["compiled_round_cost_range"] == [3.0, 3.0]
    assert not figures["is_too_noisy"]
    assert figures["num_floors"] == pytest.approx(15)
    assert (figures["warm_up_seconds"], figures["num_captures"]) == (35, None)
    assert figures["decode"]["passes"] == [2.0, 2.0]  # 12 tokens in 6 seconds
    assert figures["decode"]["speedup"] == pytest.approx(2 / median([1, 0.5]))
    assert figures["decode"]["speedup_range"] == [2, 4]
    assert figures["end_to_end"]["passes"] == [14 / 8, 14 / 8]
    assert figures["first_token_seconds"] == 1
    assert figures["split_seconds"] == pytest.approx({"draft": 0.2, "verify": 0.7, "commit": 0.0, "rest": 1.1})
    assert figures["peak_memory"] == 209  # 100 bytes were kept by each call to warm up


def test_tokens_are_counted_to_the_end_of_each_row():
    tokens = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [5, 6, 7, 3]])
    assert row_ends(tokens, [2, 3]) == [2, 4, 4]
    assert row_ends(tokens, None) == [4, 4, 4]


def test_trees_of_one_draft_share_its_weights_and_leave_it_as_it_was():
    target = make_target("llama")
    draft = MSDDraftModel(MSDConfig.from_target(target.config))
    trees = {"8,3,2": TreeConfig(8, 3, 2), "4,2,1,0.1": TreeConfig(4, 2, 1, 0.1), "eagle": TreeConfig(topology=EAGLE)}
    arguments = BenchArguments(target_model="target", draft_models=["a"], trees=["8,3,2", *trees], baselines=[])
    methods, _ = make_methods(arguments, target, {"a": draft})
    assistants = [method.call["assistant_model"] for method in methods if method.drafts_trees]
    assert [method.name for method in methods if method.drafts_trees] == ["a 8/3/2", "a 4/2/1/0.1", "a static 26/5/4"]
    assert [assistant.tree_config for assistant in assistants] == list(trees.values())
    assert all(assistant.draft is draft for assistant in assistants)
    assert draft.tree_config == TreeConfig()


def test_stock_assistance_is_left_out_where_vocabularies_differ():
    target, draft = make_target("llama"), make_draft_model("llama")
    arguments = BenchArguments(target_model="target", draft_models=["a"], baselines=["assisted"])
    methods, left_out = make_methods(arguments, target, {"a": draft})
    assert [method.name for method in methods] == ["plain generate", "assisted generation, a", "a 32/6/4"]
    assert left_out == []
    wider = type(draft)(type(draft.config)(**{**draft.config.to_dict(), "vocab_size": 100}))
    methods, left_out = make_methods(arguments, target, {"a": wider})
    assert [method.name for method in methods] == ["plain generate", "a 32/6/4"]
    assert left_out == [("assisted generation, a", "it needs vocabularies of one size")]


def test_drafts_are_named_by_as_much_of_their_paths_as_it_takes():
    assert draft_names(["one/draft", "two/vlm"]) == ["draft", "vlm"]
    assert draft_names(["one/draft", "two/draft"]) == ["one/draft", "two/draft"]


@pytest.mark.parametrize("compiles", [False, True])
def test_static_baseline_is_compiled_on_a_cpu_on_demand(compiles):
    arguments = BenchArguments(target_model="target", baselines=["static"], compile_on_cpu=compiles)
    (_, static), _ = make_methods(arguments, make_target("llama"), {})
    assert static.name == ("plain, static cache, compiled" if compiles else "plain, static cache")
    assert static.call["cache_implementation"] == "static"
    config = GenerationConfig(**static.call)
    cache = StaticCache(make_target("llama").config, max_cache_len=8)
    # Transformers' own decision.
    assert make_target("llama")._valid_auto_compile_criteria({CACHE: cache}, config) == compiles


def test_held_out_prompts_of_the_tiny_world_take_turns():
    prompts = evaluation_prompts(2)
    rows = held_out_dataset(2)
    texts = [prompts[number]["messages"][-1]["content"][-1]["text"] for number in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert [row["messages"][-1]["content"][-1]["text"] for row in rows] == texts
    assert [len(row["images"]) for row in rows] == [
        len(prompts[number]["images"]) for number in (0, 2, 4, 6, 1, 3, 5, 7)
    ]


def passes(*step_seconds: float, num_rows: int = 1) -> list[list[Run]]:
    """Passes of one answer of 11 tokens, in steps or rounds of so many seconds, of which the first is not timed."""
    return [[run_of(11, 1 + 10 * each, 9 * each, [1] * 10, num_rows=num_rows)] for each in step_seconds]


STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    ("call", "num_rows", "seconds", "is_too_noisy"),
    [
        ({}, 1, 0.2, True),
        ({}, 1, 0.79, True),
        ({}, 1, 0.81, False),
        ({}, 4, 0.21, False),  # the last row of four
        ({}, 4, 0.19, True),
        (STATIC, 1, 0.2, False),  # compiled, it may take less than an eager step, but not than its own
        (STATIC, 1, 0.07, True),
    ],
)
def test_a_round_that_takes_far_less_than_a_step_is_no_figure(call, num_rows, seconds, is_too_noisy):
    plain, compiled = (Runs(PLAIN, passes(each, num_rows=num_rows), [[]]) for each in (1.0, 0.1))
    own = Runs(Method("own", call, drafts_trees=True), passes(seconds, num_rows=num_rows), [[]])
    rows = [summarize(runs, plain, compiled) for runs in (plain, own)]
    assert [row["is_too_noisy"] for row in rows] == [False, is_too_noisy]
    cell = {"methods": rows, "num_passes": 1, "tolerance": 0.02}
    (_, table), _, (_, rounds) = tables(cell | {"left_out": [], "unsettled": []})
    assert [text == "too noisy" for text in table[1][3:6]] == [is_too_noisy] * 3
    assert table[1][2] == rounds[1][2] == "1000.00 (1000.00 to 1000.00)"
    warnings = [
        line for line in about(cell | {"left_out": [], "unsettled": []}) if "the machine was too noisy" in line
    ]
    assert len(warnings) == is_too_noisy


@pytest.mark.parametrize(
    ("repeats", "minutes", "own", "is_enough"),
    [
        (None, None, [2.0, 2.0, 2.0], False),  # too few
        (None, None, [2.0, 2.0, 2.0, 2.0], True),
        (None, None, [2.0, 2.4, 2.0, 2.4], False),
        (None, None, [2.0, 2.01, 2.0, 9.0, 2.0, 2.01], True),  # one pass that was disturbed
        (None, 1e-9, [2.0, 2.4], True),
        (4, None, [2.0, 2.0, 2.0, 2.0], False),  # so many, settled or not
        (4, 1e-9, [2.0], True),
    ],
)
def test_passes_end_when_every_ratio_is_settled_or_time_is_up(repeats, minutes, own, is_enough):
    arguments = BenchArguments(target_model="target", repeats=repeats, time_limit=minutes)
    settling = Settling(arguments)
    results = [Runs(PLAIN, passes(*([1.0] * len(own)))), Runs(Method("own"), passes(*own))]
    assert settling.most == (repeats or 20)
    assert settling.is_enough(results) == is_enough


def test_passes_end_where_they_may():
    target, batches = make_target("llama"), [make_inputs("llama", (0,))]
    settings = {"max_new_tokens": 4, "do_sample": False}
    (plain,), _ = run_methods(
        target, batches, [PLAIN], settings, 9, 0, lambda: None, lambda results: len(results[0].passes) == 2
    )
    assert len(plain.passes) == 2


@pytest.mark.parametrize(
    ("plain", "own", "named"),
    [
        ([1.0, 1.1], [2.0, 2.2], ""),
        ([1.0, 1.3], [2.0, 2.6], "plain generate"),  # both as slow: the ratio is the same
        ([1.0, 1.0], [2.0, 2.6], "own"),
        ([1.0, 1.3], [2.0, 2.0], "plain generate, own"),
    ],
)
def test_passes_that_differ_are_warned_of(plain, own, named):
    plain_runs = Runs(PLAIN, passes(*plain), [[]])
    own_runs = Runs(Method("own", drafts_trees=True), passes(*own), [[]])
    rows = [summarize(runs, plain_runs) for runs in (plain_runs, own_runs)]
    cell = {"methods": rows, "num_passes": 2, "tolerance": 0.02, "unsettled": ["own"], "left_out": []}
    warnings = [line for line in about(cell) if line.startswith("WARNING")]
    assert [line.split(": ")[2].split(". ")[0] for line in warnings] == ([named] if named else [])
