"""Fields of public classes: what can't be is told with the field's name, and the nearest that can is taken."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaConfig
from zoo import TEXT, make_draft_model, make_target

from transformers_msd import (
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    Pooled,
    StaticRuntime,
    TextOnly,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.drafters.msd import MSDDrafter


NAN, INF = float("nan"), float("inf")


def config(**fields: Any) -> MSDConfig:
    return MSDConfig.from_target(LlamaConfig(**TEXT), **fields)


def ensemble(**fields: Any) -> EnsembleDrafter:
    return EnsembleDrafter(make_draft_model("llava"), **fields)


def set_tree(tree_config: Any) -> MSDDraftModel:
    draft = MSDDraftModel(config())
    draft.tree_config = tree_config
    return draft


# What makes it, the field, values that can't be, and one that can.
TABLE: dict[str, tuple[Callable[..., Any], str, list[Any], Any]] = {
    "nodes of a tree": (TreeConfig, "num_nodes", [1, -3, 2.5, "8", True], 2),
    "depth of a tree": (TreeConfig, "depth", [0, -1, 1.0, None, True], 1),
    "children in a tree": (TreeConfig, "top_k", [0, -1, "3", None, True], 1),
    "confidence of a tree": (TreeConfig, "min_probability", [-0.1, 1.0, NAN, INF, "0.1"], 0.99),
    "gate of a tree": (TreeConfig, "gate", ["no", 2, None], False),
    "tree of a config": (config, "tree_config", [{"nodes": 3}, {"depth": 0}, {"top_k": "2"}], {"depth": 2}),
    "tree of a draft": (set_tree, "tree_config", [{"nodes": 3}, 3, "32,6,4", None], {"depth": 2}),
    "tree of a drafter": (
        lambda **fields: VLMDrafter(make_draft_model("llava"), **fields),
        "tree_config",
        [{"nodes": 3}, 3, "32,6,4"],
        TreeConfig(8, 2, 2),
    ),
    "tree of an MSD drafter": (
        lambda **fields: MSDDrafter(MSDDraftModel(config()), **fields),
        "tree_config",
        [{"nodes": 3}, 3, "32,6,4"],
        {"num_nodes": 8},
    ),
    "tokens of a config": (config, "draft_vocab_size", [0, -1, 97, 1.5], 96),
    "pooling of a config": (config, "visual_pool_size", [-1, 0.5, "2"], 0),
    "width of a config": (config, "hidden_size", [16, 64], 32),
    "an unknown field of a config": (config, "num_layer", [2], None),
    "views of an ensemble": (ensemble, "views", [(), ("sideways",)], ("text_only", TextOnly())),
    "weights of an ensemble": (
        ensemble,
        "weights",
        [(1.0,), (0, 0), (-1, 2), (NAN, 1), (INF, 1), "best"],
        (0, 1),
    ),
    "window of an ensemble": (ensemble, "window", [-1, 0.5, "3"], 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_cannot_be_is_told_and_its_neighbour_taken(name: str) -> None:
    make, field, wrong, right = TABLE[name]
    for value in wrong:
        with pytest.raises(ValueError, match=field.replace("tree_config", "tree_config|TreeConfig")):
            make(**{field: value})
    if right is not None:
        make(**{field: right})


@pytest.mark.parametrize("wrong", ["folder", None, 3, {}], ids=str)
def test_a_runtime_wraps_assistants_alone(wrong: Any) -> None:
    with pytest.raises(ValueError, match="Expected an `MSDDraftModel`"):
        StaticRuntime(wrong)
    StaticRuntime(MSDDraftModel(MSDConfig.from_target(make_target("llava").config)))


def test_a_pooled_picture_has_rows() -> None:
    for size in ((0, 2), (2, -1)):
        with pytest.raises(ValueError, match="`Pooled`"):
            Pooled(*size)
    Pooled(1, 1)
