"""Drafts of ours in the layouts that engines read, exact or not at all."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from transformers_msd.models.auto import AutoDraftModel
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.block.export_block import block_config, block_weights
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.configuration import UNSAID
from transformers_msd.models.eagle3.export_eagle3 import eagle3_weights, sglang_config, speculators_config
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.files import remove_replaced
from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.msd.export_msd import msd_config, msd_weights
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.places import check_output
from transformers_msd.models.published import EXPORTER, check_kept, layers_read
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel
from transformers_msd.models.weights import read_embeddings, shapes_of
from transformers_msd.traits.scales import scales_embeddings, wants_scales
from transformers_msd.traits.tokens import visual_token_ids


LAYOUTS = ("speculators", "sglang")
# Those that are compared in other words stand here, too.
_NOT_COMPARED = UNSAID | {
    *("text_config", "feature_layers", "draft_vocab_size", "model_type", "rope_parameters"),
    *("causal", "conv_group_size", "embedding_scale", "fc_bias", "mrope_interleaved", "output_multiplier", "windows"),
}
# Nor do these where no token is visual.
_OF_PICTURES = {"decoupled", "reads_placeholders", "visual_pool_size"}


def export_draft(draft: FeatureDraftModel, layout: str, target_model: str, output: str | Path) -> None:
    """
    Write a draft in a layout that engines read. It is loaded again before anything is left in `output`.

    Args:
        draft ([`MSDDraftModel`], [`Eagle3DraftModel`] or [`BlockDraftModel`]):
            The draft.
        layout (`str`):
            `"speculators"`, which vLLM reads, or `"sglang"`, which is SpecForge's for EAGLE-3 and EAGLE's for MSD.
        target_model (`str`):
            Folder or Hub repository of the target. Its config is read, and for `"speculators"` its embeddings.
        output (`str` or `Path`):
            Folder to write to.

    Raises:
        ValueError: If the layout would lose something of the draft.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if isinstance(draft, HiViSDraftModel | ViSpecDraftModel):
        raise ValueError(
            f"`draft` must be one of EAGLE-3, MSD or a block, got {type(draft).__name__}, which is not written for "
            "engines. Keep it in our own layout."
        )
    check_output(output, "output", target=target_model)
    target_config = AutoConfig.from_pretrained(target_model)
    draft.check_target(target_config)
    if draft.needs_tokens:
        raise ValueError(
            "The tokens that a draft says must be chosen before it leaves, got one whose tokens are still to be "
            "chosen. Train it first."
        )
    shapes = shapes_of(target_config, draft.dtype)
    published, weights = _parts(draft, layout, target_model, target_config, shapes)
    published |= {"torch_dtype": str(draft.dtype).removeprefix("torch."), "exported_by": EXPORTER}
    Path(output).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output) as folder:
        written = Path(folder)
        (written / "config.json").write_text(json.dumps(published, indent=2) + "\n")
        own = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        save_file(own, written / "model.safetensors", metadata={"format": "pt"})
        again = AutoDraftModel.from_pretrained(written, target_config)
        ours, theirs = (_described(one, target_config) for one in (draft, again))
        check_kept(layout, {f"`{name}`": value != theirs.get(name) for name, value in ours.items()})
        loaded = again.state_dict()
        check_kept(layout, {key: not torch.equal(loaded[key], old.cpu()) for key, old in draft.state_dict().items()})
        for file in written.iterdir():
            file.replace(Path(output, file.name))
    remove_replaced(output, shards_stay=False)


def _parts(
    draft: FeatureDraftModel,
    layout: str,
    target_model: str,
    target_config: PreTrainedConfig,
    shapes: PreTrainedModel,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Make the config and the weights that a layout holds."""
    is_scaled = scales_embeddings(shapes) or wants_scales(shapes)
    scaled = {"the scales of the target's embeddings and logits": is_scaled}
    if isinstance(draft, MSDDraftModel):
        if layout != "sglang":
            raise ValueError(
                f"`{layout}` must be given an EAGLE-3 draft, got one of MSD, for which it has no format. Write it for "
                "`sglang`, or keep it in our own layout."
            )
        check_kept(layout, scaled)
        return msd_config(draft, target_config), msd_weights(draft)
    if isinstance(draft, BlockDraftModel):
        if layout != "speculators":
            raise ValueError(
                f"`{layout}` must be given a draft of EAGLE-3 or MSD, got a block. Write it for `speculators`, or "
                "keep it in our own layout."
            )
        reads_stored = draft.embedding_scale is not None and draft.logit_scales is not None
        check_kept(layout, {} if reads_stored else scaled)
        return block_config(draft, target_model, target_config), block_weights(draft)
    assert isinstance(draft, Eagle3DraftModel)
    losses = {
        "the scale of the target's embeddings": scales_embeddings(shapes) and not draft.config.own_embeddings,
        "the features of pictures in place of their tokens": not draft.config.reads_placeholders
        and _sees_pictures(draft, target_config),
    }
    check_kept(layout, losses)
    weights = eagle3_weights(draft, layout)
    if layout == "sglang":
        return sglang_config(draft, target_config), weights
    published = speculators_config(draft, target_model, target_config)
    if not draft.config.own_embeddings:
        weights["embed_tokens.weight"] = read_embeddings(target_model, shapes).to(draft.dtype)
    return published, weights


def _sees_pictures(draft: FeatureDraftModel, target_config: PreTrainedConfig) -> bool:
    return bool(draft.config.visual_token_ids or visual_token_ids(target_config))


def _described(draft: FeatureDraftModel, target_config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of a draft by which it drafts, in words that do not depend on where it comes from."""
    left_out = _NOT_COMPARED | (set() if _sees_pictures(draft, target_config) else _OF_PICTURES)
    text_config = draft.config.get_text_config()
    fields = text_config.to_dict() | draft.config.to_dict()
    rope = {name: value for name, value in text_config.rope_parameters.items() if not name.startswith("mrope_")}
    return {name: value for name, value in fields.items() if name not in left_out} | {
        "feature_layers": layers_read(draft, target_config),
        "rope_parameters": rope,
        "mrope_interleaved": bool(fields.get("mrope_section") and fields["mrope_interleaved"]),
        "num_draft_tokens": draft.head.out_features if draft.head is not None else None,
        "kind_of_layer": text_config.model_type,
        "sights": draft.config.layer_sights if isinstance(draft, BlockDraftModel) else None,
        "channels": fields.get("conv_group_size") if fields.get("conv_kernel_size") else None,
    }


__all__ = ["LAYOUTS", "export_draft"]
