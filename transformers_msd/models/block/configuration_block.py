"""Settings of the block draft model."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from transformers_msd.models.configuration import DraftConfig, check_target_config, checked_tree, make_draft_config
from transformers_msd.traits.decoders import llama_layers_of, llama_shape_of, number_of
from transformers_msd.traits.tokens import visual_token_ids
from transformers_msd.trees.tree import TreeConfig


logger = logging.get_logger(__name__)
_OF_LLAMA_ALONE = ("mlp_bias", "model_type", "pretraining_tp")
VISUAL_ROWS = ("kept", "decoupled", "dropped")
EDGE_TYPES = ("vanilla", "gated", "bilinear")


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
        causal (`bool` or `list[bool]`, *optional*, defaults to `True`):
            Whether a row of a block sees those before it alone (JetSpec), and not all of them (DFlash), in all layers
            or in each of them.
        windows (`list[int | None]`, *optional*):
            How many places, its own included, a row of each layer sees before itself, and as many behind where it sees
            these; `None` for all of them, as by default in all layers.
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
        edge_type (`str`, *optional*, defaults to `"vanilla"`):
            What part the row that says those that follow has in what it adds: none (`"vanilla"`), that of a gate
            (`"gated"`, both DSpark) or of a factor (`"bilinear"`, DFlash 2).
        conv_kernel_size (`int`, *optional*, defaults to 0):
            Rows of a block, each and those right before it, that are mixed before and behind the attention and the MLP
            of every layer (DFlash 2); 0 for none.
        conv_group_size (`int`, *optional*, defaults to 16):
            Neighbouring channels that are mixed by the same weights, as far as a row chooses these itself.
        embedding_scale (`float`, *optional*):
            What rows of the target's embedding table are multiplied by. The draft reads what the target's layers do,
            where it is `None`; some of these multiply them by numbers of their own, which published drafts do not.
        output_multiplier (`float`, *optional*):
            What a head's logits are multiplied by before edges are added; what the target does to its own is done
            where it is `None`, and published drafts were trained without.
        final_logit_softcapping (`float`, *optional*):
            What they are then held below, by a hyperbolic tangent, where `output_multiplier` is given.
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
    causal: bool | list[bool] = True
    windows: list[int | None] | None = None
    predicts_next: bool = True
    reads_feature: bool = False
    mask_token_id: int | None = None
    draft_vocab_size: int | None = None
    edge_rank: int = 0
    edge_type: str = "vanilla"
    conv_kernel_size: int = 0
    conv_group_size: int = 16
    embedding_scale: float | int | None = None
    output_multiplier: float | int | None = None
    final_logit_softcapping: float | int | None = None
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
        checked_tree(self.tree_config or {}, self.num_levels)
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
        self._check_layers()

    def _check_layers(self) -> None:
        num_layers, size = self.get_text_config().num_hidden_layers, self.get_text_config().hidden_size
        for name in ("causal", "windows"):
            if isinstance(given := getattr(self, name), list) and len(given) != num_layers:
                raise ValueError(f"`{name}` must tell of each of {num_layers} layers, got {given}. Leave it out.")
        windows = [window for window in self.windows or () if window is not None]
        if any(window < 1 for window in windows):
            raise ValueError(f"`windows` must be at least 1, or None for all, got {self.windows}.")
        if windows and self.visual_rows == "dropped":
            raise ValueError(
                "`windows` are counted in places, of which visual rows that are dropped leave none, got "
                f"{self.windows} with `visual_rows='dropped'`. Leave one out."
            )
        if self.edge_type not in EDGE_TYPES or (self.edge_type != "vanilla" and not self.edge_rank):
            raise ValueError(
                f"`edge_type` must be one of {EDGE_TYPES}, the first where there are no edges, got {self.edge_type!r} "
                f"with `edge_rank={self.edge_rank}`. 256 is a common rank."
            )
        for name in ("embedding_scale", "output_multiplier", "final_logit_softcapping"):
            if (scale := getattr(self, name)) is not None and not 0 < scale < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, got {scale}. Leave it out.")
        if self.final_logit_softcapping is not None and self.output_multiplier is None:
            raise ValueError(
                "`final_logit_softcapping` holds what `output_multiplier` has made of logits, got none of that. Set "
                "that to 1.0 for the head's own."
            )
        if (
            self.conv_kernel_size < 0
            or self.conv_group_size < 1
            or self.conv_kernel_size
            and size % self.conv_group_size
        ):
            raise ValueError(
                "`conv_kernel_size` must not be negative, and `conv_group_size` divide the width of the layers, got "
                f"{self.conv_kernel_size} and {self.conv_group_size} of {size}. 2 and 16 are common."
            )

    @property
    def layer_sights(self) -> list[tuple[bool, int | None]]:
        """Of each layer, whether its rows see those before them alone, and its window."""
        num_layers = self.get_text_config().num_hidden_layers
        causal = self.causal if isinstance(self.causal, list) else [self.causal] * num_layers
        return list(zip(causal, self.windows or [None] * num_layers, strict=True))

    @property
    def num_levels(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size - (not self.predicts_next)

    @classmethod
    def fit_saved(cls, saved: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        tree, of_block = saved.get("tree_config"), saved | dict(given)
        block_size, predicts_next = (
            of_block.get(name, getattr(cls, name)) for name in ("block_size", "predicts_next")
        )
        if not isinstance(tree, dict) or not isinstance(block_size, int):
            return saved
        num_levels = block_size - (not predicts_next)
        if num_levels < 1 or "depth" not in tree or (depth := TreeConfig.checked(tree).depth) <= num_levels:
            return saved
        logger.warning(
            f"The tree of a draft must be no deeper than its block, of {num_levels} tokens, got a saved one of depth "
            f"{depth}. It is cut to {num_levels}; set `draft.tree_config` to another, and save the draft."
        )
        return saved | {"tree_config": tree | {"depth": num_levels}}

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "BlockDraftConfig":
        """
        Make the config of a draft for a target: one Qwen3 layer of the target's text shape on the hidden states 2,
        L // 2 and L - 3 of L layers, whose rows read the feature.

        Args:
            target_config (`PreTrainedConfig`):
                Config of the target, multimodal or text-only.
            overrides (`dict[str, Any]`, *optional*):
                Fields of this config or of its text config (`num_hidden_layers`, `intermediate_size`, ...).
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
            *("block_size", "causal", "conv_group_size", "conv_kernel_size", "draft_vocab_size", "edge_rank"),
            *("edge_type", "embedding_scale", "final_logit_softcapping", "mask_token_id", "output_multiplier"),
            *("predicts_next", "tree_config", "visual_rows", "windows"),
        )
        return make_draft_config(cls, target_config, Qwen3Config, fields, own, names, overrides)


__all__ = ["BlockDraftConfig"]
