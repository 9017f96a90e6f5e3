"""Folders of drafts that are not whole, or hold something else: told by what is wrong, and left as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import TEXT_CONFIG, llava_config, published_weights, write_checkpoint
from transformers import AutoModel, BartConfig, PreTrainedConfig, T5Config
from zoo import make_target

from transformers_msd import BlockDraftConfig, Eagle3Config, MSDConfig, MSDDraftModel, convert_msd_checkpoint
from transformers_msd.cli import main
from transformers_msd.models.exporting import export_draft
from transformers_msd.models.sharing import write_custom_generate
from transformers_msd.trainer import MSDTrainingConfig


def make_draft() -> MSDDraftModel:
    torch.manual_seed(0)
    return MSDDraftModel(MSDConfig.from_target(make_target("llava").config))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the weights in a folder."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def config(**fields: Any) -> Callable[[Path], None]:
    """Change the config in a folder."""

    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def cut(name: str, share: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return write


def instead(model: Callable[[], Any]) -> Callable[[Path], None]:
    """Save another model there."""

    def write(folder: Path) -> None:
        shutil.rmtree(folder)
        model().save_pretrained(folder)

    return write


def file(name: str, text: str) -> Callable[[Path], None]:
    """Write a file beside the others."""

    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def pickled(content: Any) -> Callable[[Path], None]:
    """Put a pickle in the place of the weights: of some bytes, of what is made of the whole ones, or of a thing."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        torch.save(published_weights() if callable(content) else content, path)
        if callable(content) or isinstance(content, bytes):
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return write


def indexed(text: str) -> Callable[[Path], None]:
    """Give the weights another name, and write an index for them."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def peft_draft() -> Any:
    return get_peft_model(make_draft(), LoraConfig(target_modules=["q_proj"], r=2))


# What is wrong with a draft's folder, and what is said.
DRAFTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a key is missing": (weights(lambda tensors: tensors.pop("fc.weight")), "'missing_keys': .'fc.weight'"),
    "a key too many": (weights(lambda tensors: tensors.update(z=torch.ones(1))), "'unexpected_keys': .'z'"),
    "a wrong shape": (
        weights(lambda tensors: tensors.update({"fc.weight": torch.ones(3, 3)})),
        "'mismatched_keys'.*fc.weight",
    ),
    "keys of PEFT": (
        weights(lambda tensors: tensors.update({f"base_model.model.{key}": tensors.pop(key) for key in [*tensors]})),
        "'unexpected_keys': .'base_model",
    ),
    "NaN": (weights(lambda tensors: tensors["fc.weight"].fill_(float("nan"))), "NaN or inf in fc.weight"),
    "weights cut in the middle": (cut("model.safetensors", 0.5), "can't be read"),
    "weights cut at the end": (cut("model.safetensors", 0.99), "can't be read"),
    "empty weights": (cut("model.safetensors", 0), "can't be read"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "must hold `config.json`"),
    "a config that is a list": (file("config.json", "[3]"), "must hold the config of the draft: it is a list"),
    "integers": (weights(lambda own: own.update({"fc.weight": own["fc.weight"].to(torch.int8)})), "got I8"),
    "8 bits": (weights(lambda own: own.update({"fc.weight": own["fc.weight"].to(torch.float8_e5m2)})), "got F8_E5M2"),
    **{
        f"an index of {text or 'nothing'}": (indexed(text), "must say by `weight_map`")
        for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}')
    },
    "an index without more": (indexed('{"weight_map": {"fc.weight": "other.safetensors"}}'), "must hold `metadata`"),
    "an index of no file": (
        indexed('{"metadata": {}, "weight_map": {"fc.weight": "nowhere.safetensors"}}'),
        "must name files beside it, got nowhere.safetensors",
    ),
    "a pointer to a pickle": (pickled(b"version https://git-lfs.github.com/spec/v1"), "can't be read"),
    "an empty pickle": (pickled(b""), "can't be read"),
    "an adapter of no draft": (instead(peft_draft), "merge_and_unload"),
    "a target": (instead(lambda: make_target("llava")), "'msd_draft', got 'llava'"),
    "another tree": (config(tree_config={"nodes": 3}), "tree_config"),
    "a tree that is none": (config(tree_config=3), "tree_config"),
    "a flag that is none": (config(decoupled="no"), "decoupled"),
    "less than nothing": (config(visual_pool_size=-1), "visual_pool_size"),
    "a head that was not saved": (config(draft_vocab_size=5), "'missing_keys': .*head.weight"),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_a_folder_that_holds_no_whole_draft_is_told_and_left_alone(name: str, tmp_path: Path) -> None:
    breaks, message = DRAFTS[name]
    folder = tmp_path / "draft"
    make_draft().save_pretrained(folder)
    MSDDraftModel.from_pretrained(folder)
    breaks(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    # Where there is a draft's config, `AutoModel` finds the way here.
    for loader in (MSDDraftModel, AutoModel)[
        : 1 if name in ("no config", "a config that is a list", "an adapter of no draft", "a target") else 2
    ]:
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


WRITERS = {
    "a draft": lambda draft, place, target: draft.save_pretrained(place),
    "an export": lambda draft, place, target: export_draft(draft, "sglang", target, place),
    "custom_generate": lambda draft, place, target: write_custom_generate(place, "me/my-draft"),
    "a run": lambda draft, place, target: MSDTrainingConfig(output_dir=str(place), use_cpu=True, bf16=False),
}


@pytest.mark.parametrize("below", ["", "below"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_no_folder_to_write_to(name: str, below: str, tmp_path: Path) -> None:
    make_target("llama").config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    draft = MSDDraftModel(MSDConfig.from_target(make_target("llama").config))
    with pytest.raises(ValueError, match="must be a folder, new or not, got .*config.json.* a file. Choose another"):
        WRITERS[name](draft, tmp_path / "config.json" / below, str(tmp_path))
    assert (tmp_path / "config.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


OVER_WHAT_IS_READ = {
    "convert draft --output target": "target",
    "convert draft --output ./target --to sglang": "target",
    "train --datasets a/b --output_dir target --dry_run --use_cpu true --bf16 false": "target",
    "convert draft --output draft": "checkpoint",
    "convert draft --output target/../draft --to sglang": "checkpoint",
    "convert link --output draft": "checkpoint",
}


@pytest.mark.parametrize("command", OVER_WHAT_IS_READ)
def test_what_is_read_is_not_written_over(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = make_target("llama")
    target.save_pretrained("target", max_shard_size="10KB")
    MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained("draft")
    Path("link").symlink_to("draft")
    before = {file: file.read_bytes() for file in Path().glob("*/*")}
    with pytest.raises(SystemExit, match=f"must not be the folder of the {OVER_WHAT_IS_READ[command]}, .* got "):
        main([*command.split(), "--target_model", "target"])
    assert {file: file.read_bytes() for file in Path().glob("*/*")} == before


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "draft.safetensors"])
def test_a_path_where_nothing_is_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be a path .* where nothing is"):
        MSDDraftModel.from_pretrained(name)


def test_what_transformers_loads_besides_is_loaded(tmp_path: Path) -> None:
    draft = make_draft()
    draft.save_pretrained(tmp_path / "draft")
    get_peft_model(MSDDraftModel.from_pretrained(tmp_path / "draft"), LoraConfig(target_modules=["q_proj"], r=2))
    loaded = [
        MSDDraftModel.from_pretrained(tmp_path, subfolder="draft"),
        MSDDraftModel.from_pretrained(str(tmp_path / "draft"), config=draft.config),
        MSDDraftModel.from_pretrained(None, config=draft.config, state_dict=draft.state_dict()),
        MSDDraftModel.from_pretrained(tmp_path / "draft", output_loading_info=True)[0],
    ]
    assert all(torch.equal(each.fc.weight, draft.fc.weight) for each in loaded)
    # Another size, if it is asked for.
    weights(lambda tensors: tensors.update({"fc.bias": torch.ones(3)}))(tmp_path / "draft")
    MSDDraftModel.from_pretrained(tmp_path / "draft", ignore_mismatched_sizes=True)


def test_an_adapter_that_names_its_draft_is_loaded_with_it(tmp_path: Path) -> None:
    pytest.importorskip("peft.utils.transformers_weight_conversion", reason="Transformers loads no adapter without it")
    make_draft().save_pretrained(tmp_path / "draft")
    draft = MSDDraftModel.from_pretrained(tmp_path / "draft")
    settings = LoraConfig(target_modules=["q_proj"], r=2, base_model_name_or_path=str(tmp_path / "draft"))
    get_peft_model(draft, settings).save_pretrained(tmp_path / "adapter")
    assert isinstance(MSDDraftModel.from_pretrained(tmp_path / "adapter"), MSDDraftModel)


# What is wrong with a published checkpoint, and what is said.
PUBLISHED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json must hold"),
    "half a config": (cut("config.json", 0.5), "config.json must hold"),
    "a list": (lambda folder: (folder / "config.json").write_text("[3]"), "config.json must hold"),
    "weights cut in the middle": (cut("model.safetensors", 0.5), "can't be read"),
    "empty weights": (cut("model.safetensors", 0), "can't be read"),
    "a size that is none": (config(intermediate_size="48"), "intermediate_size"),
    "a size of nothing": (config(num_hidden_layers=0), "num_hidden_layers"),
    "another size": (config(intermediate_size=40), "do not have the sizes"),
    "a number for what fuses": (weights(lambda own: own.update({"fc.weight": torch.tensor(1.0)})), "fc.weight"),
    **{
        f"an index of {text or 'nothing'}": (file("model.safetensors.index.json", text), "must say by `weight_map`")
        for text in ("", "{", "{}", "3", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}')
    },
    "an index of no file": (
        file("model.safetensors.index.json", '{"weight_map": {"fc.weight": "other.safetensors"}}'),
        "must name files beside it, got other.safetensors, which are not there",
    ),
    "an empty pickle": (pickled(b""), "can't be read"),
    "a pointer to a pickle": (pickled(b"version https://git-lfs.github.com/spec/v1"), "can't be read"),
    "half a pickle": (pickled(lambda data: data[: len(data) // 2]), "can't be read"),
    "a pickle of a list": (pickled([torch.ones(2)]), "must hold tensors by their names, got list"),
    "a pickle of numbers": (pickled({1: torch.ones(2)}), "must hold tensors by their names, got dict"),
    "a pickle of words": (pickled({"fc.weight": "none"}), "must hold tensors by their names, got dict"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_that_is_not_whole_is_told_and_left_alone(name: str, tmp_path: Path) -> None:
    breaks, message = PUBLISHED[name]
    write_checkpoint(tmp_path, published_weights(), "model.safetensors")
    convert_msd_checkpoint(tmp_path, llava_config())
    breaks(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        convert_msd_checkpoint(tmp_path, llava_config())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("wrong", [None, "folder", TEXT_CONFIG], ids=lambda wrong: type(wrong).__name__)
def test_a_checkpoint_is_converted_for_a_config(wrong: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, published_weights(), rope_theta=1e4)
    with pytest.raises(ValueError, match="`target_config` must be the config of a target"):
        convert_msd_checkpoint(tmp_path, wrong)


@pytest.mark.parametrize("config_class", [MSDConfig, Eagle3Config, BlockDraftConfig])
@pytest.mark.parametrize("target_config", [T5Config(), BartConfig()], ids=["T5", "BART"])
def test_no_draft_is_made_for_a_target_with_an_encoder(config_class: type, target_config: PreTrainedConfig) -> None:
    with pytest.raises(ValueError, match="a decoder alone, got .*which has an encoder"):
        config_class.from_target(target_config)
