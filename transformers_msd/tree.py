"""Token trees as plain tensors: their settings, how they grow, and the attention mask that lays them flat."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TreeConfig:
    """
    Size and shape of the token tree drafted in each round (EAGLE-2, arXiv 2406.16858, section 4).

    Args:
        num_nodes (`int`, *optional*, defaults to 59):
            Most nodes of the tree, the root included. A tree that can't fill them is smaller.
        depth (`int`, *optional*, defaults to 6):
            Most drafted tokens on one path. The draft runs `depth` times a round.
        top_k (`int`, *optional*, defaults to 10):
            Children tried for each expanded node, and nodes expanded at each depth. `1` drafts a chain.

    The defaults are MSD's (arXiv 2505.14260): its `total_token=59, depth=5, top_k=10`.
    """

    num_nodes: int = 59
    depth: int = 6
    top_k: int = 10

    def __post_init__(self) -> None:
        for name, least in (("num_nodes", 2), ("depth", 1), ("top_k", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`TreeConfig.{name}` must be an integer of at least {least}, got {value!r}. "
                    "The smallest tree, `TreeConfig(num_nodes=2, depth=1, top_k=1)`, drafts one token per round."
                )
