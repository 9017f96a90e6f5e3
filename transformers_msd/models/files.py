"""The files of a draft, as we or others published it: its folder, its config and its weights."""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from transformers_msd.models.places import check_place


# What is raised by files that are cut, empty or something else, a pointer to what was never fetched among them.
BROKEN = (EOFError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile)
_BROKEN = (*BROKEN, AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)
# Dtypes of weights, as safetensors calls them.
_STORED = ("BF16", "F16", "F32", "F64")


def check_folder(name: str, subfolder: str = "", needs_config: bool = True) -> None:
    """Raise a `ValueError` for the name of a place on this machine that holds no draft, but maybe its config."""
    check_place(name, "pretrained_model_name_or_path")
    folder = Path(name, subfolder)
    if not folder.is_dir():
        return
    names = sorted(file.name for file in folder.iterdir())
    adapter = folder / "adapter_config.json"
    if adapter.name in names and not json.loads(adapter.read_text()).get("base_model_name_or_path"):
        raise ValueError(
            f"An adapter must name its draft, got no `base_model_name_or_path` in {adapter}. Save the draft with the "
            "adapter merged into it: `merge_and_unload()`."
        )
    if needs_config and not {"config.json", adapter.name} & set(names):
        raise ValueError(f"The folder of a draft must hold `config.json`, got {names} in {folder}. Copy it again.")
    for weights, index in ((name, f"{name}.index.json") for name in ("model.safetensors", "pytorch_model.bin")):
        if weights in names:
            break
        if index in names:
            _shards(folder / index)
            if "metadata" not in json.loads((folder / index).read_text()):
                raise ValueError(f"{folder / index} must hold `metadata`, got none. Copy the folder again.")
            break
    check_stored(folder)


def check_stored(folder: Path) -> None:
    """Raise a `ValueError` for weights that were quantised, where no config tells how."""
    if (folder / "config.json").exists() and "quantization_config" in read_config(folder):
        return
    for file in folder.glob("*.safetensors"):
        with suppress(SafetensorError), safe_open(file, framework="pt") as weights:  # told where they are loaded
            dtypes = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
            wrong = [key for key, dtype in dtypes.items() if dtype not in _STORED and key != "draft_token_ids"]
            if wrong:
                raise quantised_error(wrong[0], folder, dtypes[wrong[0]])


def find_folder(path_or_repo_id: str | Path) -> Path:
    """Return the folder of a draft, which is downloaded if it is a repository on the Hub."""
    folder = Path(path_or_repo_id)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(
            f"A draft must be a folder, or a repository on the Hub, got the file {folder}. Pass {folder.parent}."
        )
    check_place(str(path_or_repo_id), "checkpoint")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    folder = Path(snapshot_download(str(path_or_repo_id), allow_patterns=patterns))
    if not any(folder.glob("*.safetensors")):  # some repositories hold all weights twice
        snapshot_download(str(path_or_repo_id), allow_patterns=["*.bin", "*.bin.index.json"])
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a draft."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise TypeError(f"it is a {type(config).__name__}")
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold the config of the draft: {error}. Copy the folder again.") from None
    if not isinstance(kind := config.get("model_type"), str | None):
        raise ValueError(f"`model_type` in {file} must be a string, got {kind!r}. Copy the folder again.")
    return config


def quantised_error(name: str, folder: Path, dtype: object) -> ValueError:
    """Tell of a weight that is an integer or of 8 bits."""
    return ValueError(
        f"{name} in {folder} must be of floating point and 16 bits or more, got {dtype}. Point to the draft as it was "
        "before it was quantised."
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """
    Read which file holds which weight.

    Raises:
        ValueError: If the index says it of no weight, or names files that are not beside it.
    """
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (KeyError, OSError, TypeError, ValueError):
        weight_map = None
    is_map = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not weight_map or not is_map:
        raise ValueError(
            f"{index} must say by `weight_map` which file holds which weight, got none of them. Copy the folder again."
        )
    outside = [shard for shard in sorted(set(weight_map.values())) if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{index.name} must name files beside it, got {outside}. Don't trust that folder.")
    return weight_map


def _shards(index: Path) -> list[Path]:
    """List the files that an index names, all of which must be there."""
    files = [index.parent / shard for shard in sorted(set(read_weight_map(index).values()))]
    if lost := [file.name for file in files if not file.exists()]:
        raise ValueError(
            f"{index} must name files beside it, got {', '.join(lost[:3])}, which are not there. Copy the folder "
            "again."
        )
    return files


def remove_replaced(folder: str | Path, shards_stay: bool, variant: str | None = None) -> None:
    """
    Remove what an earlier save left of weights in a folder: some readers would take it for those of the last.

    Args:
        folder (`str` or `Path`):
            Folder that weights were just saved to.
        shards_stay (`bool`):
            Whether shards, where there are any, are what was saved, and not one file.
        variant (`str`, *optional*):
            Variant that was saved, as in [`~transformers.PreTrainedModel.save_pretrained`].
    """
    own = f".{variant}" if variant else ""
    name = re.compile(rf"model{re.escape(own)}-\d{{5}}-of-\d{{5}}\.safetensors")
    shards = [file for file in Path(folder).iterdir() if name.fullmatch(file.name)]
    whole, index = Path(folder, f"model{own}.safetensors"), Path(folder, f"model.safetensors.index{own}.json")
    for file in [whole] if shards and shards_stay else [index, *shards]:
        file.unlink(missing_ok=True)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a draft, from safetensors or else from pickles of nothing but tensors."""
    return _read(folder, load_file)


def read_names(folder: Path) -> set[str]:
    """Read what the weights of a draft are called; of safetensors no weight is read."""
    return set(_read(folder, _names_of))


def _read(folder: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Read all files of a draft's weights, safetensors as told."""
    for name, load_one in (("model.safetensors", load), ("pytorch_model.bin", _load_pickle)):
        files, index = [folder / name], folder / f"{name}.index.json"
        if index.exists():
            files = _shards(index)
        if files[0].exists():
            try:
                return {key: value for file in files for key, value in load_one(file).items()}
            except _BROKEN as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"The weights in {folder} can't be read: {reason}. Copy the folder again.") from None
    raise ValueError(
        f"Expected `model.safetensors` or `pytorch_model.bin` in {folder}, got "
        f"{sorted(file.name for file in folder.iterdir())}. Point to the folder of a published draft."
    )


def _names_of(file: Path) -> dict[str, None]:
    with safe_open(file, framework="pt") as weights:
        return dict.fromkeys(weights.keys())


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    weights = torch.load(file, map_location="cpu", weights_only=True)
    named = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(key, str) and torch.is_tensor(value) for key, value in named):
        raise TypeError(f"{file.name} must hold tensors by their names, got {type(weights).__name__}")
    return weights


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Read the settings of positions wherever a config has them, as Transformers 5 names them."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError(
            f"`rope_scaling` of a draft must be settings of all of its layers or null, got {scaling!r}. Copy its "
            "config again, or say the settings once."
        )
    own = {name: value for name, value in scaling.items() if name not in ("type", "rope_type", "rope_theta")}
    bases = (part.get("rope_theta") for part in (scaling, config))
    base = next((value for value in bases if value is not None), 10000.0)
    if not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ValueError(f"`rope_theta` of a draft must be a number above 0, got {base!r}. Copy its config again.")
    return own | {
        "rope_type": scaling.get("type") or scaling.get("rope_type") or "default",
        "rope_theta": base,
    }


def read_flag(file: Path, config: dict[str, Any], name: str) -> bool:
    """Read a field of a config that is true or false, and false where nothing is said."""
    if not isinstance(flag := config.get(name), bool | None):
        raise ValueError(
            f"`{name}` in {file} must be true or false, got {flag!r}. Set what the draft was trained with."
        )
    return bool(flag)
