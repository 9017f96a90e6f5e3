"""Settings of the EAGLE-3 draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from transformers_msd.trees.tree import TreeConfig


@strict
class Eagle3Config(PreTrainedConfig):
    r"""
    Architecture of an [`Eagle3DraftModel`] (EAGLE-3, arXiv 2503.01840). [`load_eagle3_checkpoint`] makes one of what
    was published.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama config):
            Sizes of the draft's layers, mostly one, in Llama's terms. Its vocabulary is the target's.
        feature_layers (`list[int]`, *optional*, defaults to `[2, -2, -4]`):
            Hidden states of the target that are read, numbered as `output_hidden_states` returns them.
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
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    visual_token_ids: list[int] | None = None
    reads_placeholders: bool = True
    mrope_section: list[int] | None = None
    mrope_interleaved: bool = False
    tree_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    # All visual rows are read.
    visual_pool_size: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.visual_token_ids = self.visual_token_ids or []
        self.feature_layers = self.feature_layers or [2, -2, -4]
        if self.tree_config is not None:
            TreeConfig.checked(self.tree_config)
        vocab_size = self.get_text_config().vocab_size
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must be between 1 and the target's {vocab_size} tokens, got "
                f"{self.draft_vocab_size}. Leave it out to draft all of them."
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
        if self.visual_pool_size != 1:
            raise ValueError(f"`visual_pool_size` must be 1, got {self.visual_pool_size}: EAGLE-3 reads every row.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Eagle3Config":
        found = config_dict.get("model_type")
        if found != cls.model_type:
            raise ValueError(
                f"Expected the config of an EAGLE-3 draft of ours, of `model_type` {cls.model_type!r}, got {found!r}. "
                "Load what was published by `AutoDraftModel.from_pretrained(folder, target=target)`."
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from None


__all__ = ["Eagle3Config"]
