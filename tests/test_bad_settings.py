"""Settings of training, benchmarks and measurements: what can't be is told with the field's name, before a run."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


pytest.importorskip("trl")

from datasets import Dataset
from zoo import make_draft_model, make_target

from transformers_msd import EnsembleDrafter, MSDConfig, MSDDraftModel, StaticRuntime
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.costs.calibration import load_costs, save_costs
from transformers_msd.costs.rounds import Costs
from transformers_msd.trainer import AcceptanceLength, ExactMatch, MSDTrainingConfig
from transformers_msd.trainer.callbacks import AcceptanceLengthCallback
from transformers_msd.trainer.generation import GenerationSettings
from transformers_msd.trainer.recipe import DraftArguments
from transformers_msd.tuning import measure_costs


NAN, INF = float("nan"), float("inf")


def training(**fields: Any) -> MSDTrainingConfig:
    settings = {"output_dir": "none", "use_cpu": True, "bf16": False, "report_to": [], "token_loss_weight": 0.5}
    return MSDTrainingConfig(**settings | fields)


def recipe(**fields: Any) -> DraftArguments:
    return DraftArguments(**{"target_model": "org/target", "datasets": ["org/rows"]} | fields)


def bench(**fields: Any) -> BenchArguments:
    fields = {"target_model": "org/target", "device": "cpu"} | fields
    if "simulate_acceptance" in fields:  # which is for random weights, or for drafts
        fields |= {"target_model": None, "random_weights": "llava-1.5-7b"}
    return BenchArguments(**fields)


def tune(**fields: Any) -> None:
    target = make_target("llama")
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    measure_costs(**{"target": target, "assistant": draft} | fields)


def callback(**fields: Any) -> AcceptanceLengthCallback:
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "Hi"}]}])
    return AcceptanceLengthCallback(**{"trainer": SimpleNamespace(), "prompts": rows} | fields)


# No number, or one that is too small; what is not negative, or 1 at least.
NUMBERS, WHOLE = [-0.1, NAN, INF, "1", None], [0, -1, 1.5, "1", True]
FLAGS, NAMES = ["no", 2, None], [3, ["a"], Path("a")]
Row = tuple[Callable[..., Any], str, list[Any], Any]
LOSSES = ("feature_loss_weight", "token_loss_weight", "top_k_loss_weight", "probability_loss_weight")
ROWS: list[Row] = [
    *((training, name, NUMBERS, 1) for name in ("learning_rate", "max_grad_norm", "feature_noise", *LOSSES)),
    (training, "adam_beta2", [-0.1, 1, NAN, "1", None], 0),
    *((training, name, WHOLE, 1) for name in ("top_k_loss_tokens", "num_unroll_steps", "head_chunk_size")),
    (training, "max_length", WHOLE, None),
    (training, "stage", ["all", 3, None, ["text"]], "text"),
    (training, "assistant_only_loss", FLAGS, False),
    (training, "activation_checkpointing", ["no", 2], None),
    (training, "ddp_find_unused_parameters", ["no", 2], None),
    (training, "max_steps", [0, 1.5, "1", None, True], -1),
    (training, "num_train_epochs", NUMBERS, 0.5),
    (training, "per_device_train_batch_size", WHOLE, 1),
    *((recipe, name, NAMES, "org/name") for name in ("target_model", "image_folder", "target_adapter", "draft_model")),
    *((recipe, name, NAMES, "name") for name in ("draft_vlm", "dataset_split")),
    (training, "output_dir", [3, date(2024, 1, 1)], "folder"),
    (recipe, "datasets", ["name", [], [1], None, {"a": 1}], ["name"]),
    (recipe, "max_rows_per_dataset", WHOLE, None),
    (recipe, "num_eval_prompts", [-1, 1.5, "1", None, True], 0),
    (recipe, "eval_max_new_tokens", WHOLE, 1),
    (recipe, "draft_config", ["a: 1", 3, [1]], {"intermediate_size": 32}),
    *((GenerationSettings, name, WHOLE, 1) for name in ("batch_size", "max_new_tokens", "rows_per_chunk")),
    (GenerationSettings, "temperature", NUMBERS, 0),
    (GenerationSettings, "seed", [1.5, "1", None, NAN], -1),
    (bench, "trees", ["8,2,2", [3], ["8,2"], ["a,b,c"], None], ["8,2,2,0.1"]),
    (bench, "views", ["multimodal", ["sideways"], [3], None], ["multimodal,pooled"]),
    (bench, "runtimes", [[], ["fast"], "eager", None, [3]], ["all"]),
    (bench, "random_weights", [3, ["llava-1.5-7b"]], None),
    (bench, "simulate_acceptance", [[2], [-0.1], [NAN], ["1"], 0.5], [0, 1.0]),
    (bench, "prompt_length", WHOLE, 1),
    (bench, "batch_sizes", [[], [0], [1.5], 1, None], [1, 4]),
    (bench, "temperatures", [[], [-1], [NAN], ["1"], 0.5], [0, 1.0]),
    (bench, "max_new_tokens", [2, 3.5, "4", None], 3),
    (bench, "repeats", WHOLE, 1),
    (bench, "baselines", [["fast"], "static", None], ["none"]),
    (bench, "num_divergences", [-1, 1.5, "1", None, True], 0),
    (bench, "dtype", ["float33", "int8", None, torch.float32], "bfloat16"),
    (bench, "device", ["nowhere", 3], "cpu"),
    (bench, "compile_on_cpu", FLAGS, True),
    (bench, "memory_bandwidth", [0, -1, NAN, "1"], 0.1),
    (bench, "seed", [1.5, "1", None], 0),
    (bench, "output", NAMES, None),
    (tune, "assistant", [None, 3, "folder", make_draft_model("llama")], None),
    (tune, "prompt_length", WHOLE, None),
    (tune, "batch_size", [0, 2, 1.5, "1"], None),
    (callback, "max_new_tokens", WHOLE, 1),
    (callback, "temperature", NUMBERS, 0),
    (callback, "prompts", [Dataset.from_list([])], None),
    (AcceptanceLength().compute, "predictions", [[], [[]], [[0, 2]], [[-1]]], [[1], []]),
    (recipe, "dtype", ["float33", "int8", None, 3], "float32"),
    (bench, "draft_models", ["draft", [1], None], ["draft"]),
    (bench, "datasets", [3, "a", [1]], ["a"]),
    (bench, "num_rows", WHOLE, 1),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{getattr(row[0], '__name__', 'metric')}-{row[1]}")
def test_what_cannot_be_is_told_and_its_neighbour_taken(row: Row) -> None:
    make, field, wrong, right = row
    assert len(wrong) <= 5
    for value in wrong:
        with pytest.raises(ValueError, match=field):
            make(**{field: value})
    # What `tune` takes it measures, and that would take its time.
    if right is not None or make in (training, recipe, bench):
        make(**{field: right})


def test_metrics_have_something_to_compare() -> None:
    with pytest.raises(ValueError, match="`predictions` must hold an answer"):
        ExactMatch().compute(predictions=[], references=[])


@pytest.mark.parametrize("wrap", [StaticRuntime, lambda draft: draft.config], ids=["runtime", "config"])
def test_what_a_runtime_wraps_is_measured_itself(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="`assistant` must be"):
        tune(assistant=wrap(MSDDraftModel(MSDConfig.from_target(make_target("llama").config))))


@pytest.mark.parametrize("broken", ["", "[", "[]", "[{}]", '[{"step": 1}]', "3"])
def test_broken_costs_are_not_read(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers_msd.costs.calibration.HF_HOME", str(tmp_path))
    target, draft = make_target("llama"), make_draft_model("llama")
    path = save_costs([Costs(1.0, [2], [1.5], 0.1, 2)], [draft], target)
    assert load_costs([draft], target) is not None
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text(broken)
    assert load_costs([draft], target) is None
    # A call with this pair goes on without them.
    ids = torch.tensor([[5, 6, 7]])
    drafter = EnsembleDrafter(draft, views=("text_only",))
    plain = target.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(target.generate(ids, max_new_tokens=6, do_sample=False, assistant_model=drafter), plain)
