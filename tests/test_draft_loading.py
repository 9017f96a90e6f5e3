"""Any name of a draft gives what `generate` takes: one on features by its kind, a model of its own in a drafter."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_block_drafts
import test_convert
import test_eagle3
import test_visual_drafts
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_eagle3 import architecture_of, make_deep_target
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from zoo import make_draft_model, make_target

from transformers_msd import (
    AutoDraftModel,
    BlockDraftConfig,
    BlockDraftModel,
    Eagle3DraftModel,
    HiViSDraftModel,
    MSDConfig,
    MSDDraftModel,
    ViSpecDraftModel,
    VLMDrafter,
)
from transformers_msd.cli import main
from transformers_msd.drafters.loading import load_assistant


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("layouts", "name", "kind"),
    [
        *((test_eagle3, name, Eagle3DraftModel) for name in test_eagle3.LAYOUTS),
        *((test_block_drafts, name, BlockDraftModel) for name in test_block_drafts.LAYOUTS),
        (test_visual_drafts, "HiViS, LLaVA", HiViSDraftModel),
        (test_visual_drafts, "ViSpec, LLaVA", ViSpecDraftModel),
    ],
)
def test_drafts_of_others_are_told_by_weights(layouts: ModuleType, name: str, kind: type, tmp_path: Path) -> None:
    target = make_target("llava")
    if layouts is not test_visual_drafts:  # several layers are read
        target = make_deep_target(architecture_of(name))
    assert type(load_assistant(str(layouts.write(tmp_path / "draft", name)), target)) is kind


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.safetensors"])
def test_published_msd_that_calls_itself_a_llava_is_none(file_name: str, tmp_path: Path) -> None:
    test_convert.write_checkpoint(tmp_path, test_convert.published_weights(), file_name)
    target = LlavaForConditionalGeneration(test_convert.llava_config())
    assert type(load_assistant(str(tmp_path), target)) is MSDDraftModel


@pytest.mark.parametrize("architecture", ["llava", "llama"])
def test_models_of_their_own_draft_in_the_dtype_of_the_target(architecture: str, tmp_path: Path) -> None:
    make_draft_model(architecture).save_pretrained(tmp_path)
    target = copy.deepcopy(make_target("llava")).to(torch.bfloat16)
    assistant = load_assistant(str(tmp_path), target)
    assert type(assistant) is VLMDrafter
    assert {model.dtype for model in assistant.models} == {torch.bfloat16}


def test_drafts_of_ours_need_no_look_at_their_weights(tmp_path: Path) -> None:
    target = make_target("llava")
    MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained(tmp_path)
    assert type(load_assistant(str(tmp_path), target)) is MSDDraftModel


WRAPPED: dict[str, Callable[[PreTrainedModel], Any]] = {
    "PEFT": lambda target: get_peft_model(target, LoraConfig(target_modules=["q_proj"], r=2)),
    "compiled": torch.compile,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", ["ours", "SafeAILab"])
def test_a_draft_takes_the_dtype_of_a_wrapped_target(name: str, wrapper: str, tmp_path: Path) -> None:
    target = copy.deepcopy(make_deep_target("llava")).to(torch.bfloat16)
    if name == "ours":
        MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained(tmp_path / "draft")
    else:
        test_eagle3.write(tmp_path / "draft", name)
    draft = AutoDraftModel.from_pretrained(tmp_path / "draft", WRAPPED[wrapper](target))
    assert draft.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32), (torch.float16, torch.float16)]
)
@pytest.mark.parametrize("name", ["ours", "SafeAILab"])
def test_a_dtype_may_be_a_name(name: str, dtype: Any, expected: torch.dtype, tmp_path: Path) -> None:
    target = copy.deepcopy(make_deep_target("llava")).to(torch.float64)
    if name == "ours":
        MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained(tmp_path / "draft")
    else:
        test_eagle3.write(tmp_path / "draft", name)
    assert AutoDraftModel.from_pretrained(tmp_path / "draft", target, dtype=dtype).dtype == expected


@pytest.mark.parametrize("dtype", ["bf16", "nn", torch.int8, "float8_e4m3fn", 16, torch.float8_e5m2])
def test_a_dtype_that_no_draft_has_is_told(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`dtype` must be one of floating point and 16 bits or more"):
        AutoDraftModel.from_pretrained(tmp_path, make_target("llava"), dtype=dtype)


def test_what_holds_no_draft_on_features_is_told_in_a_few_words(tmp_path: Path) -> None:
    target = make_target("llava")
    make_draft_model("llava").save_pretrained(tmp_path)
    for place, message in {
        tmp_path: r"has a layer `fc`, got none in .* `VLMDrafter\(model\)`",
        tmp_path / "model.safetensors": "must be a folder, or a repository on the Hub, got the file",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            AutoDraftModel.from_pretrained(place, target)
        assert len(str(caught.value)) < 500
    weights = {f"layers.{number}.weight": torch.ones(2) for number in range(500)} | {"fc.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="and 492 more") as caught:
        AutoDraftModel.from_pretrained(tmp_path, target)
    assert len(str(caught.value)) < 2000


# What becomes of one of its weights, and what is said.
OF_THEIR_OWN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "none": (lambda weight: None, "must be those of its config, got none for .*q_proj"),
    "another shape": (lambda weight: weight[:3], "must be those of its config, got none for .*q_proj"),
    "NaN": (lambda weight: weight * float("nan"), "must be finite, got NaN or inf in .*q_proj"),
    "8 bits": (lambda weight: weight.to(torch.float8_e5m2), "q_proj.* must be of floating point.* got F8_E5M2"),
    "integers": (lambda weight: weight.to(torch.int8), "q_proj.* must be of floating point.* got I8"),
}


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_a_model_whose_weights_are_not_whole_is_refused(name: str, tmp_path: Path) -> None:
    change, message = OF_THEIR_OWN[name]
    make_draft_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    broken = {key: change(value).contiguous() for key, value in weights.items() if "q_proj" in key and name != "none"}
    kept = {key: value for key, value in weights.items() if "q_proj" not in key}
    save_file(kept | broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_assistant(str(tmp_path), make_target("llama"))


COMMANDS = {
    "bench": "--draft_models DRAFT --output out",
    "tune": "--draft_model DRAFT",
    "trace": "--draft_model DRAFT --output trace.html",
    "generate-data": "--draft_model DRAFT --datasets rows --output out",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_draft_of_another_target_is_told_before_the_target_is_read(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    make_target("llava").config.save_pretrained("target")  # it has no weights
    processor = ROOT / "training/tiny_world/checkpoints/target"
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(processor / name, "target")
    target = make_deep_target("llava")
    draft = BlockDraftModel(BlockDraftConfig.from_target(target.config, feature_layers=[2, 5]))
    draft.save_pretrained("draft")
    arguments = [command, "--target_model", "target", *COMMANDS[command].replace("DRAFT", "draft").split()]
    with pytest.raises(SystemExit, match="reads hidden states .2, 5. of its target, got one of 2 layers"):
        main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "target"]
