"""Settings of the block draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config
from transformers.configuration_utils import SubConfigSpec

from transformers_msd.models.configuration import DraftConfig, check_target_config, make_draft_config
from transformers_msd.traits.decoders import llama_layers_of, llama_shape_of, number_of
from transformers_msd.traits.tokens import visual_token_ids


_OF_LLAMA_ALONE = ("mlp_bias", "model_type", "pretraining_tp")
VISUAL_ROWS = ("kept", "decoupled", "dropped")


@strict
class BlockDraftConfig(DraftConfig):
    r"""
    Architecture of a [`BlockDraftModel`] (DFlash, arXiv 2602.06036). Make one with
    [`BlockDraftConfig.from_target`]; [`load_dflash_checkpoint`] makes one of what was published.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Qwen3 config):
            Sizes of the draft's layers, in Qwen3's terms. Its vocabulary is the target's.
        feature_layers (`list[int]`, *optional*, defaults to `[2, -2, -4]`):
            Hidden states of the target that are read, numbered as `output_hidden_states` returns them.
        block_size (`int`, *optional*, defaults to 8):
            Rows of a block: the token emitted last, and masks.
        causal (`bool`, *optional*, defaults to `True`):
            Whether a row of a block sees those before it alone (JetSpec), and not all of them (DFlash).
        predicts_next (`bool`, *optional*, defaults to `True`):
            Whether a row says the token after its own place, so that `block_size` tokens are drafted (DSpark, arXiv
            2607.05147), and not the one in its place, one less (DFlash).
        reads_feature (`bool`, *optional*, defaults to `False`):
            Whether each row of a block is the fusion of its embedding with what is known of the target at the token
            before the block, as the rows of MSD (arXiv 2505.14260) are, and not its embedding alone. No published
            block does; those that [`BlockDraftConfig.from_target`] makes do.
        mask_token_id (`int`, *optional*):
            Token of the target whose embedding stands where a token is not known. A vector of the draft's own does,
            where it is `None`.
        draft_vocab_size (`int`, *optional*):
            Tokens that are drafted, by a head of the draft's own. All of them are, by the target's head, when it is
            `None`.
        edge_rank (`int`, *optional*, defaults to 0):
            Rank of what a token adds to the scores of those that follow it (DSpark); 0 for nothing.
        visual_token_ids (`list[int]`, *optional*, defaults to `[]`):
            Ids that stand for image and video features in the target's prompts.
        visual_rows (`str`, *optional*, defaults to `"kept"`):
            What is read of a visual token: the target's hidden states, as of any other (`"kept"`), its visual feature
            in place of these (`"decoupled"`, as in MSD, arXiv 2505.14260), or nothing (`"dropped"`, as in HiViS).
        tree_config (`dict`, *optional*):
            Fields of the [`TreeConfig`] to draft with.
    """

    model_type = "block_draft"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3")}

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    feature_layers: list[int] | None = None
    block_size: int = 8
    causal: bool = True
    predicts_next: bool = True
    reads_feature: bool = False
    mask_token_id: int | None = None
    draft_vocab_size: int | None = None
    edge_rank: int = 0
    visual_token_ids: list[int] | None = None
    visual_rows: str = "kept"
    tree_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.visual_token_ids = self.visual_token_ids or []
        self.feature_layers = [2, -2, -4] if self.feature_layers is None else self.feature_layers
        self.check()
        if not self.feature_layers:
            raise ValueError("`feature_layers` must name a hidden state at least, got none. Leave it out for three.")
        if self.num_levels < 1:
            raise ValueError(
                f"`block_size` must leave a token to draft, got {self.block_size}, of which the first row says "
                f"{'the next' if self.predicts_next else 'none'}. 8 is common."
            )
        if self.edge_rank < 0:
            raise ValueError(f"`edge_rank` must not be negative, got {self.edge_rank}. 0 leaves edges out.")
        vocab_size = self.get_text_config().vocab_size
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < vocab_size:
            raise ValueError(
                f"`mask_token_id` must be one of the target's {vocab_size} tokens, got {self.mask_token_id}. Pass the "
                "target that the draft was trained for."
            )
        if self.visual_rows not in VISUAL_ROWS:
            raise ValueError(f"`visual_rows` must be one of {VISUAL_ROWS}, got {self.visual_rows!r}.")

    @property
    def num_levels(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size - (not self.predicts_next)

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "BlockDraftConfig":
        """
        Make the config of a draft for a target: one Qwen3 layer of the target's text shape on the hidden states 2,
        L // 2 and L - 3 of L layers, whose rows read the feature.

        Args:
            target_config (`PreTrainedConfig`):
                Config of the target, multimodal or text-only.
            overrides (`dict[str, Any]`, *optional*):
                Fields of this config (`block_size`, `causal`, `draft_vocab_size`, `edge_rank`, `feature_layers`,
                `mask_token_id`, `predicts_next`, `reads_feature`, `tree_config`, `visual_rows`, `visual_token_ids`) or
                of its text config (`num_hidden_layers`, `intermediate_size`, ...).
        """
        check_target_config(target_config)
        text_config = target_config.get_text_config()
        shape = llama_layers_of(text_config) | llama_shape_of(text_config)
        fields = {name: value for name, value in shape.items() if name not in _OF_LLAMA_ALONE}
        num_layers = number_of(text_config, "num_hidden_layers") or 0
        own = {
            "visual_token_ids": visual_token_ids(target_config),
            "feature_layers": sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 0)}),
            "reads_feature": True,
        }
        names = (
            *own,
            *("block_size", "causal", "draft_vocab_size", "edge_rank", "mask_token_id", "predicts_next"),
            *("tree_config", "visual_rows"),
        )
        return make_draft_config(cls, target_config, Qwen3Config, fields, own, names, overrides)


__all__ = ["BlockDraftConfig"]
