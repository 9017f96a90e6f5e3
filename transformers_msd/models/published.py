"""Drafts as others published them: their folders, configs and weights."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from transformers_msd.models.places import check_finite, check_place
from transformers_msd.models.weights import read_weight_map


def find_folder(path_or_repo_id: str | Path) -> Path:
    """Return the folder of a draft, which is downloaded if it is a repository on the Hub."""
    folder = Path(path_or_repo_id)
    if folder.is_dir():
        return folder
    check_place(str(path_or_repo_id), "checkpoint")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
    return Path(snapshot_download(str(path_or_repo_id), allow_patterns=patterns))


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a draft."""
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold the config of the draft: {error}. Copy the folder again.") from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a draft, from safetensors or else from pickles of nothing but tensors."""
    for name, load in (("model.safetensors", load_file), ("pytorch_model.bin", _load_pickle)):
        files, index = [folder / name], folder / f"{name}.index.json"
        if index.exists():
            files = [folder / shard for shard in sorted(set(read_weight_map(index).values()))]
        if files[0].exists():
            try:
                return {key: value for file in files for key, value in load(file).items()}
            except (OSError, SafetensorError, zipfile.BadZipFile) as error:
                raise ValueError(f"The weights in {folder} can't be read: {error}. Copy the folder again.") from None
    raise ValueError(
        f"Expected `model.safetensors` or `pytorch_model.bin` in {folder}, got "
        f"{sorted(file.name for file in folder.iterdir())}. Point to the folder of a published draft."
    )


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def check_weights(folder: Path, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise a `ValueError` unless every weight has its place, and every place a weight."""
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"The weights in {folder} do not make a draft for this target: missing {missing}, unexpected "
            f"{unexpected}. Check that the target is of the model family the draft was trained for."
        )
    wrong = {
        key: f"expected {tuple(expected[key].shape)}, got {tuple(value.shape)}"
        for key, value in weights.items()
        if value.shape != expected[key].shape
    }
    if wrong:
        raise ValueError(
            f"The weights in {folder} do not have the sizes its `config.json` and the target say: {wrong}. Check "
            "that the target is the one the draft was trained for."
        )


def fill_draft(draft: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> PreTrainedModel:
    """Put weights into a draft, each in its place and of the dtype that it has in `folder`, and make it ready."""
    check_weights(folder, weights, draft.state_dict())
    draft = cast_weights(draft, weights["fc.weight"].dtype)
    draft.load_state_dict(weights)
    check_finite(draft, str(folder))
    return draft.eval()


def cast_weights(draft: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a draft's weights a dtype, and leave the frequencies of its positions as precise as they are."""
    for weight in draft.parameters():
        if type(weight) is nn.Parameter and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return draft
