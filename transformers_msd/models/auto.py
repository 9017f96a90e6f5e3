"""Drafts of any kind, told by their files."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.eagle3.configuration_eagle3 import Eagle3Config
from transformers_msd.models.eagle3.convert_eagle3 import is_eagle3, load_eagle3_checkpoint
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.convert_msd import convert_msd_checkpoint
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.published import find_folder, read_config, read_weights
from transformers_msd.traits.support import dtype_of


OURS = {MSDConfig.model_type: MSDDraftModel, Eagle3Config.model_type: Eagle3DraftModel}


class AutoDraftModel:
    """Loads a draft that reads the target's features, whoever published it."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        target: PreTrainedModel | PreTrainedConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> FeatureDraftModel:
        """
        Look at the files of a draft and load it.

        Args:
            path_or_repo_id (`str` or `Path`):
                Folder, or repository on the Hub: a draft of ours, of MSD or EAGLE-3 as published.
            target (`PreTrainedModel` or `PreTrainedConfig`, *optional*):
                The target or its config, which drafts of ours do not need.
            dtype (`torch.dtype`, *optional*):
                Dtype of the weights; their own by default, the target's where a model is passed.

        Returns:
            [`MSDDraftModel`] or [`Eagle3DraftModel`], ready to be passed as `assistant_model`.
        """
        folder = find_folder(path_or_repo_id)
        config, is_model = getattr(target, "config", target), isinstance(target, PreTrainedModel)
        if dtype is None and is_model:
            dtype = dtype_of(target)
        draft: Any
        if (ours := OURS.get(read_config(folder).get("model_type"))) is not None:
            draft = ours.from_pretrained(folder).eval()
        elif config is None:
            raise ValueError(
                f"A draft as others published it needs its target, got none for {path_or_repo_id}. Pass "
                "`target=model`, or its config."
            )
        else:
            load = load_eagle3_checkpoint if is_eagle3(read_weights(folder)) else convert_msd_checkpoint
            draft = load(folder, config)
        draft = draft if dtype is None else draft.to(dtype)
        if is_model:
            draft.check_target(target)
            draft = draft.to(target.device)
        return draft
