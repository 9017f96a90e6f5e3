"""Single weights of checkpoints, read without the others."""

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from transformers_msd.models.files import read_weight_map
from transformers_msd.traits.support import is_multimodal


_FILE = "model.safetensors"


def read_head(name: str, target: PreTrainedModel) -> torch.Tensor:
    """
    Read the weights of a target's head, and no others; of tied ones, the embeddings.

    Args:
        name (`str`):
            Folder or Hub repository of the target, in safetensors.
        target (`PreTrainedModel`):
            The target, which may be without weights.

    Returns:
        `torch.Tensor`: Weights of shape `(vocab_size, hidden_size)`.

    Raises:
        ValueError: If the checkpoint has no such weights, or other than floating-point ones.
    """
    head, embeddings = target.get_output_embeddings(), target.get_input_embeddings()
    is_tied = head.weight is embeddings.weight
    return _read(name, target, "head", [head, embeddings] if is_tied else [head])


def read_embeddings(name: str, target: PreTrainedModel) -> torch.Tensor:
    """
    Read a target's table of embeddings, and no other weights; what [`read_head`] says holds here as well.

    Args:
        name (`str`):
            Folder or Hub repository of the target, in safetensors.
        target (`PreTrainedModel`):
            The target, which may be without weights.

    Returns:
        `torch.Tensor`: Weights of shape `(vocab_size, hidden_size)`.

    Raises:
        ValueError: If the checkpoint has no such weights, or other than floating-point ones.
    """
    head, embeddings = target.get_output_embeddings(), target.get_input_embeddings()
    is_tied = head.weight is embeddings.weight
    return _read(name, target, "embeddings", [embeddings, head] if is_tied else [embeddings])


def shapes_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a target without weights, in its own dtype or else in the one given."""
    auto_class = AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=config.dtype or dtype)


def _read(name: str, target: PreTrainedModel, what: str, modules: list[nn.Module]) -> torch.Tensor:
    """Read the weight of the first of some modules that a checkpoint has, all of one shape."""
    names = [_name_of(module, target) for module in modules]
    index = _find(name, f"{_FILE}.index.json")
    if index is not None:
        files = read_weight_map(index)
        keys = _matching(names, list(files))
        file = _find(name, files[keys[0]]) if keys else None
    else:
        file = _find(name, _FILE)
        with _opened(file, name) as opened:
            keys = _matching(names, list(opened.keys()))
    if not keys:
        raise ValueError(
            f"The weights in {name} must hold the target's {what}, {names[0]}.weight, got none. Point to the folder "
            "of the whole target."
        )
    with _opened(file, name) as opened:
        weight = opened.get_tensor(keys[0])
    shape = modules[0].weight.shape
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(
            f"{keys[0]} in {name} must be of floating point and shape {tuple(shape)}, got {weight.dtype} "
            f"and {tuple(weight.shape)}. Point to the target as it was before it was quantised or changed."
        )
    return weight


def _name_of(module: nn.Module, target: PreTrainedModel) -> str:
    return next(name for name, other in target.named_modules() if other is module)


def _matching(names: list[str], keys: list[str]) -> list[str]:
    """List the keys of a checkpoint that may stand for modules, best first: what stands before a name may differ."""
    whole = [f"{name}.weight" for name in names if f"{name}.weight" in keys]
    ends = [f".{name.rpartition('.')[2]}.weight" for name in names]
    return whole[:1] or [key for end in ends for key in keys if f".{key}".endswith(end)]


def _find(name: str, file: str) -> Path | None:
    """Return a file of a folder or repository, None where it has none of that name."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).exists() else None
    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError:
        return None


def _opened(file: Path | None, name: str) -> safe_open:
    if file is None:
        raise ValueError(
            f"{name} must hold its weights in safetensors, got none. Save the target by `save_pretrained`."
        )
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The weights in {name} can't be read: {error}. Copy the folder again.") from None
