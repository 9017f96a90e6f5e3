"""Drafts of any kind, told by their files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.models.block.convert_block import is_dflash, load_dflash_checkpoint
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.eagle3.configuration_eagle3 import Eagle3Config
from transformers_msd.models.eagle3.convert_eagle3 import is_eagle3, load_eagle3_checkpoint
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.files import find_folder, read_config, read_weights
from transformers_msd.models.hivis.configuration_hivis import HiViSConfig
from transformers_msd.models.hivis.convert_hivis import is_hivis, load_hivis_checkpoint
from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.convert_msd import convert_msd_checkpoint
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.published import cast_weights
from transformers_msd.models.vispec.configuration_vispec import ViSpecConfig
from transformers_msd.models.vispec.convert_vispec import is_vispec, load_vispec_checkpoint
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel
from transformers_msd.traits.support import device_of, dtype_of


OURS = {
    MSDConfig.model_type: MSDDraftModel,
    Eagle3Config.model_type: Eagle3DraftModel,
    BlockDraftConfig.model_type: BlockDraftModel,
    HiViSConfig.model_type: HiViSDraftModel,
    ViSpecConfig.model_type: ViSpecDraftModel,
}
# By what their weights look like; the others are those of MSD and EAGLE-1.
THEIRS = (
    (is_dflash, load_dflash_checkpoint),
    (is_eagle3, load_eagle3_checkpoint),
    (is_vispec, load_vispec_checkpoint),
    (is_hivis, load_hivis_checkpoint),
)
# What is raised where a config and weights make no draft, sizes below nothing among it.
_MAKES_NONE = (ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError)


def fuses(names: Iterable[str]) -> bool:
    """Tell whether weights of these names join a target's features with something else, as drafts on them do."""
    return any(name.removeprefix("model.") == "fc.weight" for name in names)


class AutoDraftModel:
    """Loads a draft that reads the target's features, whoever published it."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        target: PreTrainedModel | PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        feature_layers: list[int] | None = None,
    ) -> FeatureDraftModel:
        """
        Look at the files of a draft and load it.

        Args:
            path_or_repo_id (`str` or `Path`):
                Folder, or repository on the Hub: a draft of ours, of MSD, EAGLE-3, HiViS, ViSpec, DFlash or DSpark
                as published.
            target (`PreTrainedModel` or `PreTrainedConfig`, *optional*):
                The target or its config, which drafts of ours do not need.
            dtype (`torch.dtype` or `str`, *optional*):
                Dtype of the weights, or its name; their own by default or if it is `"auto"`, the target's where a
                model is passed.
            feature_layers (`list[int]`, *optional*):
                Hidden states of the target that an EAGLE-3 draft reads, where its config does not say what it was
                trained on, numbered as `output_hidden_states` returns them.

        Returns:
            [`MSDDraftModel`], [`Eagle3DraftModel`], [`BlockDraftModel`], [`HiViSDraftModel`] or [`ViSpecDraftModel`],
            ready to be passed as `assistant_model`.
        """
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        is_dtype = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if dtype not in (None, "auto") and not is_dtype:
            raise ValueError(
                f'`dtype` must be one of floating point and 16 bits or more, its name or "auto", got {dtype!r}. Leave '
                "it out for the target's."
            )
        folder = find_folder(path_or_repo_id)
        # A model may be wrapped, by PEFT or `torch.compile`.
        config, is_model = getattr(target, "config", target), isinstance(target, nn.Module)
        if config is not None:
            check_target_config(config)
        draft: Any
        if (ours := OURS.get(read_config(folder).get("model_type"))) is not None:
            draft = ours.from_pretrained(folder).eval()
        elif config is None:
            raise ValueError(
                f"A draft as others published it needs its target, got none for {path_or_repo_id}. Pass "
                "`target=model`, or its config."
            )
        else:
            weights = read_weights(folder)
            try:
                load = next((load for is_theirs, load in THEIRS if is_theirs(weights)), _load_others)
                draft = load(folder, config, weights)
            except _MAKES_NONE as error:
                raise ValueError(
                    f"{folder / 'config.json'} and the weights beside it must be those of a draft, got what "
                    f"makes none: {' '.join(str(error).split())}. Copy the folder again."
                ) from error
        if feature_layers is not None:
            several = isinstance(draft, Eagle3DraftModel | BlockDraftModel)
            are_layers = isinstance(feature_layers, list | tuple) and all(isinstance(n, int) for n in feature_layers)
            if not several or not are_layers or len(feature_layers) != len(draft.feature_layers):
                raise ValueError(
                    f"`feature_layers` must be those of a draft of several, as many as {len(draft.feature_layers)}, "
                    f"got {feature_layers!r} for {type(draft).__name__}. Leave them out to read what the draft names."
                )
            draft.config.feature_layers = list(feature_layers)
        if config is not None:
            draft.check_target(config)
        # What was measured is kept by this name.
        draft.config.name_or_path = str(path_or_repo_id)
        if dtype is None and is_model:
            dtype = dtype_of(target)
        if isinstance(dtype, torch.dtype):
            cast_weights(draft, dtype)
        return draft.to(device_of(target)) if is_model else draft


def _load_others(folder: Path, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> MSDDraftModel:
    if not fuses(weights):
        raise ValueError(
            f"A draft that reads the target's features has a layer `fc`, got none in {folder}. A model of its own "
            "drafts as `VLMDrafter(model)`."
        )
    return convert_msd_checkpoint(folder, config, weights)
