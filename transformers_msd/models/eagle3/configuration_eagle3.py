"""Settings of the EAGLE-3 draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from transformers_msd.models.configuration import DraftConfig, check_target_config, make_draft_config
from transformers_msd.traits.decoders import llama_layers_of, llama_shape_of, number_of
from transformers_msd.traits.tokens import visual_token_ids


@strict
class Eagle3Config(DraftConfig):
    r"""
    Architecture of an [`Eagle3DraftModel`] (EAGLE-3, arXiv 2503.01840). Make one with
    [`Eagle3Config.from_target`]; [`load_eagle3_checkpoint`] makes one of what was published.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama config):
            Sizes of the draft's layers, mostly one, in Llama's terms. Its vocabulary is the target's.
        feature_layers (`list[int]`, *optional*, defaults to `[2, -2, -4]`):
            Hidden states of the target that are read, numbered as `output_hidden_states` returns them.
        target_hidden_size (`int`, *optional*):
            Width of these; that of the draft's layers when it is `None`.
        own_embeddings (`bool`, *optional*, defaults to `False`):
            Whether tokens have embeddings of the draft's own, as they must where it is of another width than its
            target, and not the target's.
        draft_vocab_size (`int`, *optional*):
            Tokens that are drafted, by the draft's own head; all of the target's when it is `None`.
        norm_before_residual (`bool`, *optional*, defaults to `False`):
            Whether what is added to the attention's output is the feature after its norm.
        fc_norm (`bool`, *optional*, defaults to `False`):
            Whether each hidden state of the target has a norm of its own before they are fused.
        norm_before_fc (`bool`, *optional*, defaults to `False`):
            Whether all of them together have one.
        norm_output (`bool`, *optional*, defaults to `False`):
            Whether the next level reads a prediction after the last norm, and not before it.
        visual_token_ids (`list[int]`, *optional*, defaults to `[]`):
            Ids that stand for image and video features in the target's prompts.
        reads_placeholders (`bool`, *optional*, defaults to `True`):
            Whether a visual token enters as the embedding of its placeholder, as in training; else as the visual
            feature that the target has in its place.
        decoupled (`bool`, *optional*, defaults to `False`):
            Whether a visual token enters as its visual feature alone, in place of the target's hidden states, too, as
            in MSD (arXiv 2505.14260).
        mrope_section (`list[int]`, *optional*):
            Rotary frequencies that turn with time, height and width of a token's place in a picture, where positions
            have these axes; they are the target's then.
        mrope_interleaved (`bool`, *optional*, defaults to `False`):
            Whether the frequencies of the three take turns, and do not lie in three chunks.
        tree_config (`dict`, *optional*):
            Fields of the [`TreeConfig`] to draft with.
    """

    model_type = "eagle3_draft"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    feature_layers: list[int] | None = None
    target_hidden_size: int | None = None
    own_embeddings: bool = False
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    visual_token_ids: list[int] | None = None
    reads_placeholders: bool = True
    decoupled: bool = False
    mrope_section: list[int] | None = None
    mrope_interleaved: bool = False
    tree_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.visual_token_ids = self.visual_token_ids or []
        self.feature_layers = [2, -2, -4] if self.feature_layers is None else self.feature_layers
        hidden_size = self.get_text_config().hidden_size
        self.target_hidden_size = self.target_hidden_size or hidden_size
        self.check()
        if self.target_hidden_size != hidden_size and not self.own_embeddings:
            raise ValueError(
                f"A draft of another width than its target, {hidden_size} and {self.target_hidden_size}, must have "
                "`own_embeddings`, got False: the target's are too wide for it, or too narrow. Set it to True."
            )
        if self.own_embeddings and not self.reads_placeholders:
            raise ValueError(
                "A draft that has `own_embeddings` reads no visual features of the target, got "
                "`reads_placeholders=False`. Set it to True."
            )
        if not self.feature_layers:
            raise ValueError("`feature_layers` must name a hidden state at least, got none. Leave it out for three.")
        if self.decoupled and self.reads_placeholders:
            raise ValueError(
                "A draft that is `decoupled` reads visual features, got `reads_placeholders=True` with it. Set one of "
                "them to False."
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError(
                "One of `fc_norm` and `norm_before_fc` may be True, got both. A checkpoint has the norms of one."
            )
        section, num_frequencies = self.mrope_section, self.get_text_config().head_dim // 2
        if section is not None and (len(section) != 3 or sum(section) != num_frequencies):
            raise ValueError(
                f"`mrope_section` must divide the {num_frequencies} frequencies of a head in three, got {section}. "
                "Copy it from the draft's own config."
            )

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "Eagle3Config":
        """
        Make the config of a draft for a target: one Llama layer of the target's text shape, as engines read it, on the
        hidden states 2, L // 2 and L - 3 of L layers (EAGLE-3).

        Args:
            target_config (`PreTrainedConfig`):
                Config of the target, multimodal or text-only.
            overrides (`dict[str, Any]`, *optional*):
                Fields of this config (`decoupled`, `draft_vocab_size`, `fc_norm`, `feature_layers`, `norm_before_fc`,
                `norm_before_residual`, `norm_output`, `reads_placeholders`, `tree_config`, `visual_token_ids`) or of
                its text config (`intermediate_size`, ...). Positions have one axis.
        """
        check_target_config(target_config)
        text_config = target_config.get_text_config()
        fields = llama_layers_of(text_config) | llama_shape_of(text_config)
        num_layers = number_of(text_config, "num_hidden_layers") or 0
        own = {
            "visual_token_ids": visual_token_ids(target_config),
            "feature_layers": sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 0)}),
            "reads_placeholders": not overrides.get("decoupled", False),
        }
        flags = ("decoupled", "fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
        names = (*own, *flags, "draft_vocab_size", "tree_config")
        return make_draft_config(cls, target_config, LlamaConfig, fields, own, names, overrides)


__all__ = ["Eagle3Config"]
