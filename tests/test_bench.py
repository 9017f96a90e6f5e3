"""What `transformers-msd bench` reports, on models that are too small for its times to mean anything."""

import copy
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from zoo import make_draft_model, make_inputs, make_target

from training.tiny_world.target import build_model, build_processor
from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.bench.assistants import PhaseTimer
from transformers_msd.bench.divergence import find_divergences
from transformers_msd.bench.measure import Run, Runs, row_ends, run_method, run_methods
from transformers_msd.bench.methods import PLAIN, Method, draft_names, make_methods
from transformers_msd.bench.models import named_config
from transformers_msd.bench.report import to_markdown
from transformers_msd.bench.run import count_divergences
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.bench.summary import summarize
from transformers_msd.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target with its processor, an MSD draft and a draft VLM, as users have them."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    processor = build_processor(num_rows=200)
    target = build_model(processor, num_layers=2)
    target.save_pretrained(folder / "target")
    processor.save_pretrained(folder / "target")
    MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained(folder / "draft")
    build_model(processor, num_layers=1).save_pretrained(folder / "draft_vlm")
    return folder


def bench(output: Path, *options: str) -> dict[str, Any]:
    """Run the command and read what it saved."""
    main(["bench", "--dtype", "float32", "--output", str(output), *options])
    return json.loads((output / "bench.json").read_text())


@pytest.fixture(scope="module")
def report(folder) -> dict[str, Any]:
    options = "--trees 8,3,2 --views multimodal,text_only --simulate_acceptance 0.5 --batch_sizes 1 2 --num_prompts 2"
    options += " --repeats 2 --max_new_tokens 10 --num_divergences 3 --drafts"
    drafts = [str(folder / "draft"), str(folder / "draft_vlm")]
    return bench(folder / "output", "--target_model", str(folder / "target"), *options.split(), *drafts)


OURS = ("draft 8/3/2", "draft_vlm 8/3/2", "draft_vlm, multimodal + text only 8/3/2")
SIMULATED = tuple(f"{name}, simulated 0.5" for name in OURS)
ALONE = ("prompt lookup", "assisted generation, draft_vlm")


def test_every_method_is_reported_or_left_out_with_a_reason(report):
    everywhere = {"plain generate", "plain, static cache", *OURS, *SIMULATED}
    assert [cell["label"] for cell in report["cells"]] == [
        *("greedy, batch size 1", "greedy, batch size 2", "T = 1, batch size 1", "T = 1, batch size 2")
    ]
    for cell in report["cells"]:
        names = {method["name"] for method in cell["methods"]}
        left_out = {entry["name"]: entry["reason"] for entry in cell["left_out"]}
        if cell["batch_size"] == 1:
            assert names == everywhere | set(ALONE)
            assert left_out == {}
        else:
            assert names == everywhere
            assert left_out == dict.fromkeys(ALONE, "Transformers answers one prompt at a time there")


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


def test_phases_are_timed_once_a_round_and_change_no_token():
    target, inputs = make_target("llava"), make_inputs("llava", (1, 0))
    settings = {"max_new_tokens": 20, "do_sample": True}
    drafter = VLMDrafter(make_draft_model("llava"), tree_config=TreeConfig(6, 3, 2))
    timer = PhaseTimer(drafter)
    method = Method("vlm", {"assistant_model": drafter}, drafts_trees=True)
    plain = run_method(target, inputs, PLAIN, settings, seed=0)
    run = run_method(target, inputs, method, settings, seed=0, timer=timer)
    assert torch.equal(run.tokens, plain.tokens)
    phases = Counter(phase for phase, _, _ in timer.notes)
    # The prompt is committed, too.
    assert phases == {"draft": run.num_rounds, "verify": run.num_rounds, "commit": run.num_rounds + 1}
    assert set(run.phase_seconds) == {"draft", "verify", "commit"}
    assert timer.seconds_since(timer.notes[-1][1]) == {"draft": 0, "verify": 0, "commit": timer.notes[-1][2]}


def test_tokens_are_compared_with_plain_where_they_are_the_same_draws(report):
    for cell in report["cells"]:
        for method in cell["methods"]:
            if method["name"] in ALONE and cell["temperature"] > 0:
                assert "num_equal" not in method
            else:
                assert method["num_equal"] == method["num_rows"] == 2
    for count in report["divergences"]:
        # Two prompts have two greedy answers, and any number of samples.
        assert count["num_generations"] == (2 if count["temperature"] == 0 else 3)
        assert count["num_different"] == 0
    assert {count["name"] for count in report["divergences"]} == set(OURS)


def test_figures_of_a_report_follow_from_each_other(report):
    for cell in report["cells"]:
        plain = cell["methods"][0]
        for method in cell["methods"]:
            for kind in ("decode", "end_to_end"):
                rates = method[kind]
                assert len(rates["passes"]) == 2
                assert rates["tokens_per_second"] == median(rates["passes"])
                assert rates["speedup"] == pytest.approx(median(rates["passes"]) / median(plain[kind]["passes"]))
                ratios = [own / one for own, one in zip(rates["passes"], plain[kind]["passes"], strict=True)]
                assert rates["speedup_range"] == pytest.approx([min(ratios), max(ratios)])
            assert method["round_cost"] == pytest.approx(method["round_seconds"] / plain["round_seconds"])
            assert method["acceptance_length"] == pytest.approx(1 + sum(method["acceptance_by_depth"]))
            assert set(method["split_seconds"]) == (
                {"draft", "verify", "commit", "rest"} if method["name"] in OURS + SIMULATED else set()
            )
            assert method["peak_memory"] is None
        assert (plain["acceptance_length"], plain["round_cost"], plain["decode"]["speedup"]) == (1, 1, 1)


def test_reports_are_written_and_say_where_they_come_from(report, folder):
    output = folder / "output"
    for name in ("speedup", "acceptance_by_depth", "time_split"):
        width, height = Image.open(output / f"{name}.png").size
        assert min(width, height) > 300
    text = (output / "bench.md").read_text()
    assert text == to_markdown(report)
    assert report["command"].startswith("transformers-msd bench --dtype float32")
    assert report["dtype"] == "float32"
    for name in ("target", "command", "commit", "hardware", "torch", "transformers", "transformers_msd"):
        assert report[name] in text
    for cell in report["cells"]:
        for method in cell["methods"]:
            assert f"| {method['name']} | {method['acceptance_length']:.2f} |" in text
            assert method["is_simulated"] == ("simulated" in method["name"])
    assert "say nothing about a draft" not in text
    assert "Their τ says nothing about a draft." in text


def test_prompts_come_from_a_file(folder, tmp_path):
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    rows = [
        {"messages": [{"role": "user", "content": "<image>\nWhat colour?"}], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": "Hello?"}], "images": []},
        {"messages": [{"role": "user", "content": "Not asked."}], "images": []},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = "--num_prompts 2 --batch_sizes 2 --temperatures 0 --repeats 1 --max_new_tokens 4 --baselines none"
    report = bench(
        tmp_path / "output",
        *("--target_model", str(folder / "target"), "--prompts", str(tmp_path / "rows.jsonl"), *options.split()),
    )
    (cell,) = report["cells"]
    assert report["num_prompts"] == 2
    assert [method["name"] for method in cell["methods"]] == ["plain generate"]
    assert cell["methods"][0]["num_rows"] == 2


@pytest.mark.parametrize(("batch_size", "temperature"), [(1, 0.0), (3, 1.0)])
def test_simulated_acceptance_gives_the_length_that_follows_from_it(tmp_path, batch_size, temperature):
    # In bfloat16: the margins of random weights are wide enough for it.
    make_target("llava").config.save_pretrained(tmp_path)
    report = bench(
        tmp_path / "output",
        *("--random_weights", str(tmp_path / "config.json"), "--dtype", "bfloat16", "--trees", "12,4,3"),
        *("--simulate_acceptance", "0.6", "1", "--max_new_tokens", "42", "--num_prompts", "3", "--repeats", "1"),
        *("--batch_sizes", str(batch_size), "--temperatures", str(temperature), "--prompt_length", "8"),
        *("--baselines", "none"),
    )
    assert report["dtype"] == "bfloat16"
    _, *methods = report["cells"][0]["methods"]
    assert [method["num_equal"] for method in methods] == [3, 3]
    assert [method["num_plain_steps"] for method in methods] == [0, 0]
    often, always = (method["acceptance_length"] for method in methods)
    # Some fifty rounds, each of which accepts 1.3 tokens with a deviation of 1.4.
    assert often == pytest.approx(1 + sum(0.6**depth for depth in range(1, 5)), abs=0.5)
    assert always == pytest.approx(5, abs=0.5)  # the last round has fewer tokens to emit


def test_random_weights_without_simulation_draft_in_every_round(tmp_path):
    make_target("llama").config.save_pretrained(tmp_path)
    report = bench(
        tmp_path / "output",
        *("--random_weights", str(tmp_path / "config.json"), "--max_new_tokens", "40", "--num_prompts", "1"),
        *("--repeats", "1", "--temperatures", "0", "--prompt_length", "8"),
    )
    draft = report["cells"][0]["methods"][-1]
    assert draft["name"].startswith("random MSD draft")
    assert draft["acceptance_length"] < 2
    assert draft["num_plain_steps"] == 0
    assert "random weights" in report["target"]


@pytest.mark.parametrize(("name", "billions"), [("llava-1.5-7b", 7.063), ("llava-1.5-13b", 13.351)])
def test_built_in_shapes_have_the_published_number_of_parameters(name, billions):
    with torch.device("meta"):
        target = AutoModelForImageTextToText.from_config(named_config(name))
    assert target.num_parameters() / 1e9 == pytest.approx(billions, abs=1e-3)


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


def test_figures_of_a_method_by_hand():
    def run(num_tokens: int, seconds: float, later: float, lengths: list[int], verify: float = 0.0) -> Run:
        return Run(
            tokens=torch.zeros(1, num_tokens),
            num_tokens=num_tokens,
            num_decoded=num_tokens - 1,
            seconds=seconds,
            decode_seconds=seconds - 1,
            later_seconds=later,
            num_rounds=len(lengths),
            lengths=[lengths],
            peak_memory=num_tokens,
            phase_seconds={"draft": 0.2, "verify": verify, "commit": 0.0},
        )

    # Two prompts of 9 and 5 tokens, in two passes; a step takes 1 second, then 2.
    plain = Runs(
        PLAIN, [[run(9, 9, 7, [1] * 8), run(5, 5, 3, [1] * 4)], [run(9, 17, 14, [1] * 8), run(5, 9, 6, [1] * 4)]]
    )
    own = [run(9, 5, 2, [4, 4]), run(5, 3, 1, [3, 1])]
    method = Method("own", drafts_trees=True)
    figures = summarize(Runs(method, [own, own], [[run(9, 6, 3, [4, 4], 1.0), run(5, 4, 1, [3, 1], 0.4)]]), plain)
    assert figures["acceptance_length"] == 3
    assert figures["acceptance_by_depth"] == [0.75, 0.75, 0.5]
    assert figures["round_seconds"] == 1.5
    assert figures["round_cost"] == 1.5 / 1.5  # plain's median is between 1 and 2 seconds
    assert figures["decode"]["passes"] == [2.0, 2.0]  # 12 tokens in 6 seconds
    assert figures["decode"]["speedup"] == pytest.approx(2 / median([1, 0.5]))
    assert figures["decode"]["speedup_range"] == [2, 4]
    assert figures["end_to_end"]["passes"] == [14 / 8, 14 / 8]
    assert figures["first_token_seconds"] == 1
    assert figures["split_seconds"] == pytest.approx({"draft": 0.2, "verify": 0.7, "commit": 0.0, "rest": 1.1})
    assert figures["peak_memory"] == 9


def test_tokens_are_counted_to_the_end_of_each_row():
    tokens = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [5, 6, 7, 3]])
    assert row_ends(tokens, [2, 3]) == [2, 4, 4]
    assert row_ends(tokens, None) == [4, 4, 4]


def test_trees_of_one_draft_share_its_weights_and_leave_it_as_it_was():
    target = make_target("llama")
    draft = MSDDraftModel(MSDConfig.from_target(target.config))
    arguments = BenchArguments(target_model="target", drafts=["a"], trees=["8,3,2", "8,3,2", "4,2,1,0.1"])
    methods, _ = make_methods(arguments, target, {"a": draft})
    assistants = [method.call["assistant_model"] for method in methods if method.drafts_trees]
    assert [method.name for method in methods if method.drafts_trees] == ["a 8/3/2", "a 4/2/1/0.1"]
    assert [assistant.tree_config for assistant in assistants] == [TreeConfig(8, 3, 2), TreeConfig(4, 2, 1, 0.1)]
    assert all(assistant.fc.weight is draft.fc.weight for assistant in assistants)
    assert draft.tree_config == TreeConfig()


def test_stock_assistance_is_left_out_where_vocabularies_differ():
    target, draft = make_target("llama"), make_draft_model("llama")
    arguments = BenchArguments(target_model="target", drafts=["a"], baselines=["assisted"])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "got neither"),
        ("--target_model a --random_weights b", "got both"),
        ("--random_weights nowhere.json", "must be one of llava-1.5-7b, llava-1.5-13b, or a config.json"),
        ("--random_weights llava-1.5-7b --drafts a", "makes its own draft"),
        ("--target_model a --simulate_acceptance 0.5", "needs a draft whose time is paid"),
        ("--target_model a --drafts b --simulate_acceptance 1.5", "must be probabilities"),
        ("--target_model a --trees 60,6", "A tree must be `num_nodes,depth,top_k`"),
        ("--target_model a --trees 60,6,x", "A tree must be `num_nodes,depth,top_k`"),
        ("--target_model a --trees 1,6,4", "`TreeConfig.num_nodes` must be an integer of at least 2"),
        ("--target_model a --views multimodal,radio", "`views` must be some of"),
        ("--target_model a --baselines vllm", "`baselines` must be some of"),
        ("--target_model a --batch_sizes 0", "`batch_sizes` must be at least 1"),
        ("--target_model a --temperatures -1", "`temperatures` must not be negative"),
        ("--target_model a --repeats 0", "`repeats` must be at least 1"),
        ("--target_model a --max_new_tokens 2", "`max_new_tokens` must be at least 3"),
        ("--target_model a --dtype half_precision", "`dtype` must be `auto` or a dtype"),
        ("--target_model a --drafts b b", "`drafts` must differ"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr("transformers_msd.bench.run.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=message):
        main(["bench", *options.split()])


def test_pictures_of_other_models_are_refused(tmp_path):
    make_target("qwen2_vl").config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="for LLaVA-1.5 and language models, got a config of 'qwen2_vl'"):
        main(["bench", "--random_weights", str(tmp_path / "config.json")])
