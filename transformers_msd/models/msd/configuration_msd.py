"""Settings of the MSD draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from transformers_msd.traits.decoders import check_decoder, decoder_layers_of
from transformers_msd.traits.tokens import special_token_ids, visual_token_ids
from transformers_msd.trees.tree import TreeConfig


@strict
class MSDConfig(PreTrainedConfig):
    r"""
    Architecture of an [`MSDDraftModel`] (MSD, arXiv 2505.14260). Make one with [`MSDConfig.from_target`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama config):
            Config of the draft's decoder. Its vocabulary size and special token ids are the target's, although the
            draft holds no embedding and no head.
        visual_token_ids (`list[int]`, *optional*, defaults to `[]`):
            Ids that stand for image and video features in the target's prompts.
        decoupled (`bool`, *optional*, defaults to `True`):
            Whether visual tokens enter as their embeddings alone. Without, they are fused with features like any
            other, as in EAGLE (arXiv 2401.15077).
        fc_bias (`bool`, *optional*, defaults to `True`):
            Whether the layer that fuses embeddings and features has a bias. The published drafts have one.
        input_layernorm (`bool`, *optional*, defaults to `False`):
            Whether the first decoder layer keeps its input norm. Published Llama drafts have none there, as in EAGLE
            (arXiv 2401.15077), Qwen drafts do. Further layers always have it.
        tree_config (`dict`, *optional*):
            Fields of the [`TreeConfig`] to draft with. MSD's tree when it is `None`.
        draft_vocab_size (`int`, *optional*):
            Tokens that are drafted, the most frequent of the target's, by a head of the draft's own (FR-Spec, arXiv
            2502.14856). The target's whole vocabulary and head when it is `None`.
        visual_pool_size (`int`, *optional*, defaults to 1):
            Successive visual rows of a prompt that the draft reads as one, their average. 1 keeps every row, 0 leaves
            all of them out.
    """

    model_type = "msd_draft"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    visual_token_ids: list[int] | None = None
    decoupled: bool = True
    fc_bias: bool = True
    input_layernorm: bool = False
    tree_config: dict[str, Any] | None = None
    draft_vocab_size: int | None = None
    visual_pool_size: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.visual_token_ids = self.visual_token_ids or []
        if self.tree_config is not None:
            TreeConfig.checked(self.tree_config)
        vocab_size = self.get_text_config().vocab_size
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must be between 1 and the target's {vocab_size} tokens, got "
                f"{self.draft_vocab_size}. Leave it out to draft all of them."
            )
        if self.visual_pool_size < 0:
            raise ValueError(
                f"`visual_pool_size` must not be negative, got {self.visual_pool_size}. Use 1 to keep all visual "
                "rows, 0 to drop them."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MSDConfig":
        found = config_dict.get("model_type")
        if found != cls.model_type:
            raise ValueError(
                f"Expected the config of a draft, of `model_type` {cls.model_type!r}, got {found!r}. Load the folder "
                "of a draft; for a target there is `MSDConfig.from_target(target.config)`."
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from None

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "MSDConfig":
        """
        Make the config of a draft for a target: one decoder layer of the target's text shape, as published.

        It sees everything, also where some of the target's layers see a window or are recurrent. Where a layer of the
        target's kind can't stand alone, or none of them sees everything, it is a Llama layer of the target's sizes.

        Args:
            target_config (`PreTrainedConfig`):
                Config of the target, multimodal or text-only.
            overrides (`dict[str, Any]`, *optional*):
                Fields of this config (`decoupled`, `draft_vocab_size`, `fc_bias`, `input_layernorm`, `tree_config`,
                `visual_pool_size`, `visual_token_ids`) or of its text config (`num_hidden_layers`,
                `intermediate_size`, ...).
        """
        check_target_config(target_config)
        text_config = target_config.get_text_config()
        # One layer (MSD, section 3). A wrong number of them is told below.
        num_layers = overrides.get("num_hidden_layers")
        num_layers = num_layers if isinstance(num_layers, int) and num_layers > 0 else 1
        config_class, fields = decoder_layers_of(text_config, num_layers)
        fields |= special_token_ids(target_config) | {"tie_word_embeddings": False}
        own = {
            "visual_token_ids": visual_token_ids(target_config),
            "input_layernorm": config_class.model_type != "llama",
        }
        own_names = (*own, "decoupled", "draft_vocab_size", "fc_bias", "tree_config", "visual_pool_size")
        unknown = sorted(set(overrides) - set(own_names) - set(fields))
        if unknown:
            raise ValueError(
                f"Overrides must be fields of `MSDConfig` or `{config_class.__name__}`, got {unknown}. "
                "Check the spelling, or set them on the returned config."
            )
        for name in ("hidden_size", "vocab_size"):
            if name in overrides and overrides[name] != getattr(text_config, name):
                raise ValueError(
                    f"`{name}` must be the target's, {getattr(text_config, name)}, got {overrides[name]}: the draft "
                    "reads its features and says its tokens. Make a draft smaller with `intermediate_size` or "
                    "`draft_vocab_size`."
                )
        visual = overrides.get("visual_token_ids") or ()
        if isinstance(visual, list | tuple) and any(token_id < 0 for token_id in visual if isinstance(token_id, int)):
            raise ValueError(
                f"`visual_token_ids` must be tokens of the target, got {visual}. Pass those that stand for pictures "
                "in what its processor makes of a prompt."
            )
        own.update({name: overrides.pop(name) for name in own_names if name in overrides})
        try:
            if overrides:
                check_decoder(config_class, fields, overrides)
            return cls(text_config=config_class(**{**fields, **overrides}), **own)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from None


def check_target_config(target_config: Any) -> None:
    """Raise a `ValueError` for what is no config of a target."""
    if not isinstance(target_config, PreTrainedConfig) or isinstance(target_config, MSDConfig):
        raise ValueError(
            f"`target_config` must be the config of a target, got {type(target_config).__name__}. Pass "
            "`target.config`, or what `AutoConfig.from_pretrained` gives."
        )


__all__ = ["MSDConfig", "check_target_config"]
