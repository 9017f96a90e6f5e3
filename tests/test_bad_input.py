"""Fields of public classes: what can't be is told with the field's name, and the nearest that can is taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_equality import make_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig
from zoo import TEXT, VOCAB_SIZE, make_draft_model, make_inputs, make_target

from transformers_msd import (
    CallInputs,
    Caption,
    Committed,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    Pooled,
    StaticRuntime,
    Target,
    TextOnly,
    TokenTree,
    TreeCandidateGenerator,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.drafters.msd import MSDDrafter


NAN, INF = float("nan"), float("inf")


def config(**fields: Any) -> MSDConfig:
    return MSDConfig.from_target(LlamaConfig(**TEXT), **fields)


def config_of(target_config: Any) -> MSDConfig:
    return MSDConfig.from_target(target_config)


def vlm(**fields: Any) -> VLMDrafter:
    return VLMDrafter(**{"draft_vlm": make_draft_model("llava")} | fields)


def ensemble(**fields: Any) -> EnsembleDrafter:
    return EnsembleDrafter(**{"draft_vlm": make_draft_model("llava")} | fields)


def set_tree(tree_config: Any) -> MSDDraftModel:
    draft = MSDDraftModel(config())
    draft.tree_config = tree_config
    return draft


def tree(**fields: Any) -> TokenTree:
    ids = torch.zeros(1, 3, dtype=torch.long)
    return TokenTree(**{"token_ids": ids, "parents": ids - 1, "scores": ids.float(), "depth": 1} | fields)


IDS = make_inputs("llava")["input_ids"]
# What makes it, the field, values that can't be, and one that can.
TABLE: dict[str, tuple[Callable[..., Any], str, list[Any], Any]] = {
    "nodes of a tree": (TreeConfig, "num_nodes", [1, -3, 2.5, "8", True], 2),
    "depth of a tree": (TreeConfig, "depth", [0, -1, 1.0, None, True], 1),
    "children in a tree": (TreeConfig, "top_k", [0, -1, "3", None, True], 1),
    "confidence of a tree": (TreeConfig, "min_probability", [-0.1, 1.0, NAN, INF, "0.1"], 0.99),
    "gate of a tree": (TreeConfig, "gate", ["no", 2, None], False),
    "tree of a config": (config, "tree_config", [{"nodes": 3}, {"depth": 0}, {"top_k": "2"}, 3, "8"], {"depth": 2}),
    "tree of a draft": (set_tree, "tree_config", [{"nodes": 3}, 3, "32,6,4", None], {"depth": 2}),
    "tree of a drafter": (vlm, "tree_config", [{"nodes": 3}, 3, "32,6,4"], TreeConfig(8, 2, 2)),
    "tree of an MSD drafter": (
        lambda **fields: MSDDrafter(MSDDraftModel(config()), **fields),
        "tree_config",
        [{"nodes": 3}, 3, "32,6,4"],
        {"num_nodes": 8},
    ),
    "target of a config": (
        config_of,
        "target_config",
        [None, "folder", {"hidden_size": 32}, config(), make_draft_model("llama")],
        LlamaConfig(**TEXT),
    ),
    "target without tokens": (config_of, "vocab_size", [CLIPVisionConfig()], None),
    "coupling of a config": (config, "decoupled", ["no", 1, None], False),
    "bias of a config": (config, "fc_bias", ["no", 1, None], False),
    "norm of a config": (config, "input_layernorm", ["no", 1, None], True),
    "pictures of a config": (config, "visual_token_ids", [[-200], 90, ["90"], [9.5], "90"], [90]),
    "tokens of a config": (config, "draft_vocab_size", [0, -1, VOCAB_SIZE + 1, 1.5], VOCAB_SIZE),
    "pooling of a config": (config, "visual_pool_size", [-1, 0.5, "2", None], 0),
    "width of a config": (config, "hidden_size", [16, 64, "32"], 32),
    "vocabulary of a config": (config, "vocab_size", [95, 97, 0], VOCAB_SIZE),
    "layers of a config": (config, "num_hidden_layers", [0, -1, 1.5, "2"], 2),
    "inner width of a config": (config, "intermediate_size", [0, -3, 1.5, "2"], 2),
    "heads of a config": (config, "num_attention_heads", [0, -4, 3, "4"], 2),
    "shared heads of a config": (config, "num_key_value_heads", [0, -2, 3, 8], 4),
    "activation of a config": (config, "hidden_act", ["nothing", 3], "gelu"),
    "positions of a config": (config, "max_position_embeddings", [0, -1, "a"], 64),
    "an unknown field of a config": (config, "num_layer", [2], None),
    "draft of a drafter": (vlm, "draft_vlm", [None, 3, "folder", [make_draft_model("llava")], ()], None),
    "drafts of an ensemble": (ensemble, "draft_vlm", [None, 3, "folder", (), [None]], [make_draft_model("llava")]),
    "prompt of a drafter": (
        vlm,
        "draft_inputs",
        [{}, "text", [1], {"input_ids": IDS.float()}, {"input_ids": IDS[0]}],
        {"input_ids": IDS},
    ),
    "mask of a prompt": (
        lambda **fields: ensemble(draft_inputs={"input_ids": IDS, **fields}),
        "attention_mask",
        [IDS[:, 1:], IDS[0], "text"],
        torch.ones_like(IDS),
    ),
    "views of an ensemble": (ensemble, "views", [(), ("sideways",), None, (3,), (Pooled,)], ("text_only", TextOnly())),
    "weights of an ensemble": (ensemble, "weights", [(1.0,), (-1, 2), (NAN, 1), "best", None], (0, 1)),
    "weights that are all 0": (ensemble, "weights", [(0, 0), ("1", "2"), (INF, 1), 1], (0.5, 0.5)),
    "window of an ensemble": (ensemble, "window", [-1, 0.5, "3", None, True], 0),
    "height of a picture": (Pooled, "height", [0, -1, 1.5, "3", None], 1),
    "width of a picture": (Pooled, "width", [0, -1, 1.5, "3", None], 1),
    "text for a picture": (TextOnly, "replacement_ids", [3, "ab", (1.5,), (-1,), None], (5,)),
    "caption of a picture": (Caption, "ids", [3, "ab", (1.5,), (-1,), None], (5,)),
    "tokens of a token tree": (
        tree,
        "token_ids",
        [torch.zeros(1, 3), torch.zeros(3).long(), torch.zeros(1, 4).long()],
        None,
    ),
    "parents in a token tree": (
        tree,
        "parents",
        [torch.zeros(1, 3), torch.zeros(2, 3).long()],
        torch.tensor([[-1, 0, 1]]),
    ),
    "scores in a token tree": (tree, "scores", [torch.zeros(1, 2), torch.zeros(3)], torch.ones(1, 3)),
    "depth of a token tree": (tree, "depth", [-1], 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_cannot_be_is_told_and_its_neighbour_taken(name: str) -> None:
    make, field, wrong, right = TABLE[name]
    assert len(wrong) <= 5
    for value in wrong:
        with pytest.raises(ValueError, match=field.replace("tree_config", "tree_config|TreeConfig")):
            make(**{"target_config" if make is config_of else field: value})
    if right is not None:
        make(**{field: right})


@pytest.mark.parametrize("wrong", ["folder", None, 3, {}, VLMDrafter], ids=str)
def test_a_runtime_wraps_assistants_alone(wrong: Any) -> None:
    with pytest.raises(ValueError, match="Expected an `MSDDraftModel`"):
        StaticRuntime(wrong)
    StaticRuntime(MSDDraftModel(MSDConfig.from_target(make_target("llava").config)))


class Drafts(TreeCandidateGenerator):
    """Drafts what it was given, as a user may who writes one of these."""

    def __init__(self, drafted: Any) -> None:
        self.drafted = drafted

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "Drafts":
        return self

    def draft(self, committed: Committed) -> Any:
        return self.drafted


def test_a_candidate_generator_gives_a_tree_for_each_row() -> None:
    target, inputs = make_target("llava"), make_inputs("llava", (1, 0))
    settings = {"max_new_tokens": 6, "do_sample": False}
    for drafted, found in ((None, "NoneType"), (tree(), "1 trees")):
        with pytest.raises(ValueError, match=f"`draft` of Drafts must return a `TokenTree` of 2 rows, got {found}"):
            target.generate(**inputs, **settings, assistant_model=Drafts(drafted))
    both = TokenTree(*(getattr(tree(), name).repeat(2, 1) for name in ("token_ids", "parents", "scores")), 2)
    drafted = target.generate(**inputs, **settings, assistant_model=Drafts(both))
    assert torch.equal(drafted, target.generate(**inputs, **settings))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("depth", range(6))
def test_nodes_deeper_than_a_tree_says_and_tokens_that_are_none_change_no_token(depth: int, do_sample: bool) -> None:
    target, inputs = make_target("llama"), make_inputs("llama")
    settings: dict[str, Any] = {**inputs, "max_new_tokens": 12, "do_sample": do_sample}
    torch.manual_seed(0)
    plain = target.generate(**settings)
    said = plain[0, inputs["input_ids"].shape[1] :].tolist()
    # A chain that is right, so that all of it would be accepted, and tokens that no model says beside it.
    chain = torch.tensor([[*said[:6], VOCAB_SIZE, -1]])
    parents = torch.tensor([[-1, 0, 1, 2, 3, 4, 0, 0]])
    torch.manual_seed(0)
    drafted = target.generate(**settings, assistant_model=Drafts(TokenTree(chain, parents, torch.zeros(1, 8), depth)))
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize(
    "wrong",
    [VLMDrafter, MSDDraftModel, "folder", make_tokenizer(), {"config": 3}],
    ids=lambda wrong: getattr(wrong, "__name__", type(wrong).__name__),
)
def test_what_drafts_nothing_is_no_assistant(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`assistant_model` must be a model"):
        make_target("llava").generate(**make_inputs("llava"), max_new_tokens=2, assistant_model=wrong)
