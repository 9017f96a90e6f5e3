"""Drafts by their names, as `generate` takes them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from transformers_msd.drafters.vlm import VLMDrafter
from transformers_msd.models.auto import OURS, AutoDraftModel, fuses
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.configuration import DraftConfig
from transformers_msd.models.files import check_stored, find_folder, read_config, read_names
from transformers_msd.models.places import check_finite
from transformers_msd.traits.support import device_of, dtype_of, is_multimodal


def auto_class(config: PreTrainedConfig) -> type:
    """Return the auto class that makes the model of a config: a target, a draft VLM, or a draft on features."""
    if isinstance(config, DraftConfig):
        return AutoModel
    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM


def is_published(name: str) -> bool:
    """Whether this is a draft that reads a target's features, as others published it."""
    folder = find_folder(name)
    return read_config(folder).get("model_type") not in OURS and fuses(read_names(folder))


def check_fits(draft_model: str, target_model: str) -> None:
    """
    Raise a `ValueError` if a draft of ours is not for a target, by their configs: no weight of the target is read.

    Args:
        draft_model (`str`):
            Folder, or repository on the Hub; of what is no draft of ours nothing is said.
        target_model (`str`):
            Folder or Hub repository of the target.
    """
    kind = OURS.get(read_config(find_folder(draft_model)).get("model_type"))
    if kind is not None:
        kind.config_class.from_pretrained(draft_model).check_target(AutoConfig.from_pretrained(target_model))


def load_draft(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """
    Load a draft for a target, in its dtype and on its device: one that reads its features, whoever published it, or a
    model of its tokens.

    Args:
        name (`str`):
            Folder, or repository on the Hub.
        target (`PreTrainedModel`):
            The target.

    Raises:
        ValueError: If it does not fit the target, or lacks weights.
    """
    if read_config(find_folder(name)).get("model_type") in OURS or is_published(name):
        return AutoDraftModel.from_pretrained(name, target=target)
    model_class = auto_class(AutoConfig.from_pretrained(name))
    check_stored(find_folder(name))
    settings = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = model_class.from_pretrained(name, dtype=dtype_of(target), **settings)
    wrong = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in found[kind]})
    if wrong:
        raise ValueError(
            f"The weights in {name} must be those of its config, got none for {wrong[:3]}. Copy the folder again, or "
            "pass a draft."
        )
    check_finite(model, name)
    return model.to(device_of(target)).eval()


def load_assistant(name: str, target: PreTrainedModel) -> FeatureDraftModel | VLMDrafter:
    """Load such a draft as `generate` takes it."""
    draft = load_draft(name, target)
    return draft if isinstance(draft, FeatureDraftModel) else VLMDrafter(draft)
