"""Drafts of any kind, told by their files."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.models.block.convert_block import is_dflash, load_dflash_checkpoint
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.eagle3.configuration_eagle3 import Eagle3Config
from transformers_msd.models.eagle3.convert_eagle3 import is_eagle3, load_eagle3_checkpoint
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.hivis.configuration_hivis import HiViSConfig
from transformers_msd.models.hivis.convert_hivis import is_hivis, load_hivis_checkpoint
from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.convert_msd import convert_msd_checkpoint
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.published import cast_weights, find_folder, read_config, read_weights
from transformers_msd.models.vispec.configuration_vispec import ViSpecConfig
from transformers_msd.models.vispec.convert_vispec import is_vispec, load_vispec_checkpoint
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel
from transformers_msd.traits.support import dtype_of


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


class AutoDraftModel:
    """Loads a draft that reads the target's features, whoever published it."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        target: PreTrainedModel | PreTrainedConfig | None = None,
        dtype: torch.dtype | None = None,
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
            dtype (`torch.dtype`, *optional*):
                Dtype of the weights; their own by default, the target's where a model is passed.
            feature_layers (`list[int]`, *optional*):
                Hidden states of the target that an EAGLE-3 draft reads, where its config does not say what it was
                trained on, numbered as `output_hidden_states` returns them.

        Returns:
            [`MSDDraftModel`], [`Eagle3DraftModel`], [`BlockDraftModel`], [`HiViSDraftModel`] or [`ViSpecDraftModel`],
            ready to be passed as `assistant_model`.
        """
        folder = find_folder(path_or_repo_id)
        config, is_model = getattr(target, "config", target), isinstance(target, PreTrainedModel)
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
            load = next((load for is_theirs, load in THEIRS if is_theirs(weights)), convert_msd_checkpoint)
            try:
                draft = load(folder, config, weights)
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                StrictDataclassError,
                TypeError,
            ) as error:
                raise ValueError(
                    f"{folder / 'config.json'} and the weights beside it must be those of a draft, got what "
                    f"makes none: {' '.join(str(error).split())}. Copy the folder again."
                ) from error
        if feature_layers is not None:
            several = isinstance(draft, Eagle3DraftModel | BlockDraftModel)
            if len(feature_layers) != len(draft.feature_layers) or not several:
                raise ValueError(
                    f"`feature_layers` must be those of a draft of several, as many as {len(draft.feature_layers)}, "
                    f"got {feature_layers} for {type(draft).__name__}. Leave them out to read what the draft names."
                )
            draft.config.feature_layers = list(feature_layers)
        if config is not None:
            draft.check_target(config)
        # What was measured is kept by this name.
        draft.config.name_or_path = str(path_or_repo_id)
        if dtype is not None or is_model:
            cast_weights(draft, dtype or dtype_of(target))
        return draft.to(target.device) if is_model else draft
