"""Where a target and its data come from, as far as this machine knows."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig


def is_hub_id(name: str) -> bool:
    """Tell whether a name that something was loaded from is that of a repository on the Hub, and no path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def hub_id_of(name_or_path: str) -> str | None:
    """Return the repository of a model, for a local copy the one that its config names; None where none is known."""
    config = _local_config(name_or_path)
    if config is None:
        return name_or_path if is_hub_id(name_or_path) else None
    said = config.get("_name_or_path", "")
    # A name without an organisation may be any folder.
    return said if "/" in said and is_hub_id(said) else None


def license_of(name_or_path: str) -> dict[str, Any]:
    """Return what a model's card, or its config, says of its licence, as metadata; nothing where neither is here."""
    config, hub_id = _local_config(name_or_path), hub_id_of(name_or_path)
    card = Path(name_or_path, "README.md")
    if config is None:
        card = hub_id and try_to_load_from_cache(hub_id, "README.md")
    said = {}
    if isinstance(card, str | Path) and Path(card).is_file():
        try:
            said = ModelCard.load(card).data.to_dict()
        except (ValueError, yaml.YAMLError):  # a card that can't be read says nothing
            said = {}
    if "license" not in said:
        said = config or {}
    found = {name: said[name] for name in ("license", "license_name", "license_link") if said.get(name)}
    link = found.get("license_link", "https://")
    if "license" not in found:
        return {}
    if not link.startswith(("https://", "http://")):  # a file beside that card
        if hub_id:
            found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
        else:
            del found["license_link"]
    return found


def _local_config(name_or_path: str) -> dict[str, Any] | None:
    """Read the config in a folder; a model that was made here has no name, and one on the Hub no folder."""
    is_local = bool(name_or_path) and Path(name_or_path, "config.json").is_file()
    return PreTrainedConfig.get_config_dict(name_or_path)[0] if is_local else None
