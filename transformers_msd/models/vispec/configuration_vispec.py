"""Settings of the ViSpec draft model."""

from typing import Any

from huggingface_hub.dataclasses import strict

from transformers_msd.models.msd.configuration_msd import MSDConfig


@strict
class ViSpecConfig(MSDConfig):
    r"""
    Architecture of a [`ViSpecDraftModel`] (ViSpec, arXiv 2509.15235). [`load_vispec_checkpoint`] makes one of what was
    published.

    Args:
        num_queries (`int`, *optional*, defaults to 2):
            Learned queries of a picture. What they say stands for it, but for the last, which all rows behind it read.
        adaptor_bias (`bool`, *optional*, defaults to `False`):
            Whether the keys and values that they look at have biases.
        kwargs:
            As [`MSDConfig`] has them.
    """

    model_type = "vispec_draft"

    num_queries: int = 2
    adaptor_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.visual_pool_size != 1 or not self.decoupled:
            raise ValueError(
                f"`visual_pool_size` must be 1 and `decoupled` True, got {self.visual_pool_size} and "
                f"{self.decoupled}: ViSpec has rows of its own for pictures."
            )
        if self.num_queries < 1:
            raise ValueError(f"`num_queries` must be at least 1, got {self.num_queries}. Copy it from the draft.")


__all__ = ["ViSpecConfig"]
