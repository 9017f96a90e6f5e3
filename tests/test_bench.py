"""What `transformers-msd bench` reports, on models that are too small for its times to mean anything."""

import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.generation import CompileConfig
from zoo import make_target

from training.tiny_world.build.target import build_model, build_processor
from transformers_msd import MSDConfig, MSDDraftModel
from transformers_msd.bench.measure import run_methods
from transformers_msd.bench.models import named_config
from transformers_msd.bench.report import to_markdown
from transformers_msd.bench.run import run_benchmark
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.cli import main
from transformers_msd.traits.sizes import num_bytes_per_step


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
    options = "--trees 8,3,2 --views multimodal,text_only --simulate_acceptance 0.5 --batch_sizes 1 2 --num_rows 2"
    options += " --repeats 2 --max_new_tokens 6 --num_divergences 3 --draft_models"
    drafts = [str(folder / "draft"), str(folder / "draft_vlm")]
    return bench(folder / "output", "--target_model", str(folder / "target"), *options.split(), *drafts)


DRAFTS = ("draft 8/3/2", "draft_vlm 8/3/2", "draft_vlm, multimodal + text only 8/3/2")
OURS = (*DRAFTS, "n-grams")
SIMULATED = tuple(f"{name}, simulated 0.5" for name in DRAFTS)
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
    options = "--num_rows 2 --batch_sizes 2 --temperatures 0 --repeats 1 --max_new_tokens 4 --baselines none"
    report = bench(
        tmp_path / "output",
        *("--target_model", str(folder / "target"), "--datasets", str(tmp_path / "rows.jsonl"), *options.split()),
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
        *("--simulate_acceptance", "0.6", "1", "--max_new_tokens", "42", "--num_rows", "3", "--repeats", "1"),
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
        *("--random_weights", str(tmp_path / "config.json"), "--max_new_tokens", "40", "--num_rows", "1"),
        *("--repeats", "1", "--temperatures", "0", "--prompt_length", "8"),
    )
    draft = report["cells"][0]["methods"][-1]
    assert draft["name"].startswith("random MSD draft")
    assert draft["acceptance_length"] < 2
    assert draft["num_plain_steps"] == 0
    assert "random weights" in report["target"]


RATIOS = ("round_cost", "compiled_round_cost", "num_floors")


def test_compiled_methods_stand_beside_eager_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_msd.bench.methods.CompileConfig", partial(CompileConfig, backend="eager"))
    make_target("llama").config.save_pretrained(tmp_path)
    arguments = BenchArguments(
        random_weights=str(tmp_path / "config.json"),
        trees=["4,2,2"],
        simulate_acceptance=[0.6],
        runtimes=["eager", "drafting", "all"],
        baselines=["static"],
        compile_on_cpu=True,
        max_new_tokens=30,
        num_rows=2,
        repeats=1,
        temperatures=[0.0],
        prompt_length=8,
        memory_bandwidth=10,
    )
    report = run_benchmark(arguments, "command")
    plain, compiled_plain, eager, drafting, everything = methods = report["cells"][0]["methods"]
    assert [method["name"].removeprefix("random MSD draft 4/2/2") for method in methods] == [
        *("plain generate", "plain, static cache, compiled"),
        *(", simulated 0.6", ", drafting compiled, simulated 0.6", ", all compiled, simulated 0.6"),
    ]
    # Drafting is one function.
    assert [method["num_captures"] for method in methods[:-1]] == [None, None, None, 1]
    assert everything["num_captures"] > 1
    assert eager["acceptance_length"] > 1.3
    for method in (eager, drafting, everything):
        assert method["num_equal"] == 2
        assert method["acceptance_by_depth"] == eager["acceptance_by_depth"]
        assert min(method["split_seconds"][phase] for phase in ("draft", "verify", "commit")) > 0
    assert report["floor_seconds"] == report["num_bytes_per_step"] / 1e10
    text = to_markdown(report)
    for method in methods:
        seconds = method["round_seconds"]
        assert method["compiled_round_cost"] == pytest.approx(seconds / compiled_plain["round_seconds"])
        assert method["num_floors"] == pytest.approx(seconds / report["floor_seconds"])
        # Of one pass, the range is the value.
        figures = (seconds * 1e3, plain["round_seconds"] * 1e3, *(method[name] for name in RATIOS))
        texts = [f"{value:.2f} ({value:.2f} to {value:.2f})" for value in figures]
        if method["is_too_noisy"]:
            texts[2:] = ["too noisy"] * 3
        assert f"| {method['name']} | {' | '.join(texts)} | " in text
    assert "at 10 GB/s, the floor is" in text


@pytest.mark.parametrize(("name", "billions"), [("llava-1.5-7b", 7.063), ("llava-1.5-13b", 13.351)])
def test_built_in_shapes_have_the_published_number_of_parameters(name, billions):
    with torch.device("meta"):
        target = AutoModelForImageTextToText.from_config(named_config(name))
    assert target.num_parameters() / 1e9 == pytest.approx(billions, abs=1e-3)
    text = target.config.text_config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size
    head = text.vocab_size * text.hidden_size + text.hidden_size
    assert num_bytes_per_step(target.bfloat16()) == 2 * (text.num_hidden_layers * layer + head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "got neither"),
        ("--target_model a --random_weights b", "got both"),
        ("--random_weights nowhere.json", "must be one of llava-1.5-7b, llava-1.5-13b, or a config.json"),
        ("--random_weights llava-1.5-7b --draft_models a", "makes its own draft"),
        ("--target_model a --simulate_acceptance 0.5", "needs a draft whose time is paid"),
        ("--target_model a --draft_models b --simulate_acceptance 1.5", "must be probabilities"),
        ("--target_model a --trees 60,6", "`trees` must be `num_nodes,depth,top_k`"),
        ("--target_model a --trees 60,6,x", "`trees` must be `num_nodes,depth,top_k`"),
        ("--target_model a --trees 1,6,4", "`TreeConfig.num_nodes` must be an integer of at least 2"),
        ("--target_model a --views multimodal,radio", "`views` must be some of"),
        ("--target_model a --baselines vllm", "`baselines` must be some of"),
        ("--target_model a --runtimes compiled", "`runtimes` must be some of eager, drafting, all"),
        ("--target_model a --memory_bandwidth 0", "`memory_bandwidth` must be above 0"),
        ("--target_model a --batch_sizes 0", "`batch_sizes` must be at least 1"),
        ("--target_model a --temperatures -1", "`temperatures` must not be negative"),
        ("--target_model a --repeats 0", "`repeats` must be at least 1"),
        ("--target_model a --max_new_tokens 2", "`max_new_tokens` must be at least 3"),
        ("--target_model a --dtype half_precision", "`dtype` must be `auto` or a floating-point dtype"),
        ("--target_model a --draft_models b b", "`draft_models` must differ"),
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_bench_that_was_stopped_is_gone_on_with(error, tmp_path, monkeypatch, capsys):
    make_target("llama").config.save_pretrained(tmp_path)
    command = ["--random_weights", str(tmp_path / "config.json"), "--num_rows", "1", "--prompt_length", "4"]
    command += ["--max_new_tokens", "4", "--repeats", "1", "--baselines", "none", "--batch_sizes", "1", "2"]
    output, calls = tmp_path / "output", []

    def stopped(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return run_methods(*args)

    with monkeypatch.context() as patch:
        patch.setattr("transformers_msd.bench.run.run_methods", stopped)
        with pytest.raises((SystemExit, RuntimeError)):
            bench(output, *command)
    said = capsys.readouterr()
    assert "greedy, batch size 1" in said.out
    assert f"Stopped after 1 comparison, written to {output}; the same command goes on." in said.err
    (first,) = json.loads((output / "bench.json").read_text())["cells"]
    assert first["label"] in (output / "bench.md").read_text()

    cells = bench(output, *command)["cells"]
    assert f"{output} holds 1 comparison of these settings." in capsys.readouterr().err
    assert cells[0] == first
    assert [(cell["temperature"], cell["batch_size"]) for cell in cells] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert (output / "speedup.png").exists()

    monkeypatch.setattr("transformers_msd.bench.run.random_target", lambda *_: pytest.fail("a model was made"))
    assert bench(output, *command)["cells"] == cells
    assert "Nothing is left to measure." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="4 comparisons measured otherwise: `max_new_tokens` was 4, and is 5. Name"):
        bench(output, *command, "--max_new_tokens", "5")
    (output / "bench.json").write_text("[]")
    with pytest.raises(SystemExit, match="bench.json, which is none"):
        bench(output, *command)
