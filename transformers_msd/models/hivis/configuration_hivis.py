"""Settings of the HiViS draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict

from transformers_msd.models.msd.configuration_msd import MSDConfig


@strict
class HiViSConfig(MSDConfig):
    r"""
    Architecture of a [`HiViSDraftModel`] (HiViS, arXiv 2509.23928). [`load_hivis_checkpoint`] makes one of what was
    published.

    Args:
        num_biases (`int`, *optional*, defaults to 4):
            Biases of the layer that fuses embeddings and features: of rows that stand, then of each level of a tree;
            levels below share the last.
        tokens_before (`int`, *optional*, defaults to 0):
            Tokens before each picture that are left out with it.
        tokens_behind (`int`, *optional*, defaults to 0):
            Tokens behind it.
        renumbers (`bool`, *optional*, defaults to `True`):
            Whether the tokens left count their positions anew, and do not keep their places.
        fc_bias (`bool`, *optional*, defaults to `False`):
            That layer has those of each depth, and no other.
        visual_pool_size (`int`, *optional*, defaults to 0):
            All visual rows are left out.
        kwargs:
            As [`MSDConfig`] has them.
    """

    model_type = "hivis_draft"

    num_biases: int = 4
    tokens_before: int = 0
    tokens_behind: int = 0
    renumbers: bool = True
    fc_bias: bool = False
    visual_pool_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.visual_pool_size != 0 or self.fc_bias:
            raise ValueError(
                f"`visual_pool_size` must be 0 and `fc_bias` False, got {self.visual_pool_size} and {self.fc_bias}: "
                "HiViS reads no visual row, and has a bias of each depth. Leave them out."
            )
        wrong = {name: getattr(self, name) for name in ("tokens_before", "tokens_behind") if getattr(self, name) < 0}
        if self.num_biases < 1 or wrong:
            raise ValueError(
                f"`num_biases` must be at least 1, `tokens_before` and `tokens_behind` 0, got {self.num_biases}"
                f"{f' and {wrong}' if wrong else ''}. Copy them from the draft's own config."
            )


__all__ = ["HiViSConfig"]
