"""Settings of the MSD draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from transformers_msd.models.configuration import DraftConfig, check_target_config, make_draft_config
from transformers_msd.traits.decoders import decoder_layers_of
from transformers_msd.traits.tokens import visual_token_ids


@strict
class MSDConfig(DraftConfig):
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

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.visual_token_ids = self.visual_token_ids or []
        self.check()
        if self.visual_pool_size < 0:
            raise ValueError(
                f"`visual_pool_size` must not be negative, got {self.visual_pool_size}. Use 1 to keep all visual "
                "rows, 0 to drop them."
            )

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
        # One layer (MSD, section 3). A wrong number of them is told below.
        num_layers = overrides.get("num_hidden_layers")
        num_layers = num_layers if isinstance(num_layers, int) and num_layers > 0 else 1
        config_class, fields = decoder_layers_of(target_config.get_text_config(), num_layers)
        own = {
            "visual_token_ids": visual_token_ids(target_config),
            "input_layernorm": config_class.model_type != "llama",
        }
        names = (*own, "decoupled", "draft_vocab_size", "fc_bias", "tree_config", "visual_pool_size")
        return make_draft_config(cls, target_config, config_class, fields, own, names, overrides)


__all__ = ["MSDConfig"]
