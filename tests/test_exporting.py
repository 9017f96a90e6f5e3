"""Drafts that leave for the engines: what is written is what was there, or nothing is written."""

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_eagle3 import NUM_LAYERS, make_deep_target
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config
from zoo import IMAGE_ID, TEXT, VOCAB_SIZE, make_inputs, make_target

from transformers_msd import (
    AutoDraftModel,
    Committed,
    Eagle3Config,
    Eagle3DraftModel,
    HiViSDraftModel,
    MSDConfig,
    MSDDraftModel,
    TokenTree,
    TreeCandidateGenerator,
    TreeConfig,
    ViSpecDraftModel,
)
from transformers_msd.compat import CACHE
from transformers_msd.drafters.assistants import assistant_for
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.exporting import export_draft


ROOT = Path(__file__).parents[1]
DRAFTED = torch.tensor(sorted({*range(3, 80, 2), 4, 8, 30}))
BOTH, ONE = ("speculators", "sglang"), ("speculators",)
AXES = {"mrope_section": [1, 2, 1]}
# Of each draft: its target, its settings, those of its layer, and the layouts that hold it.
Draft = tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]
DRAFTS: dict[str, Draft] = {
    "all tokens": ("llava", {}, {}, BOTH),
    "fewer tokens": ("llava", {"draft_vocab_size": len(DRAFTED)}, {}, BOTH),
    "wide heads": ("llava", {"draft_vocab_size": len(DRAFTED)}, {"head_dim": 12}, BOTH),
    "other layers of the target": ("llava", {"feature_layers": [1, -7, -2]}, {}, BOTH),
    "two layers of the target": ("llava", {"feature_layers": [3, 6]}, {}, BOTH),
    "norms of each": ("llava", {"fc_norm": True, "draft_vocab_size": len(DRAFTED)}, {}, BOTH),
    "a norm of the output": ("llava", {"norm_output": True}, {}, BOTH),
    "one norm": ("llava", {"norm_before_fc": True, "norm_output": True}, {}, ONE),
    "a normed residual": ("llava", {"norm_before_residual": True}, {}, ONE),
    "another base": ("llava", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, BOTH),
    "stretched positions": (
        *("llava", {}),
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}},
        BOTH,
    ),
    "axes in chunks": (
        *("qwen2_5_vl", AXES),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        BOTH,
    ),
    "axes that take turns": (
        *("qwen2_5_vl", AXES | {"mrope_interleaved": True, "draft_vocab_size": len(DRAFTED)}),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        BOTH,
    ),
    "layers of Qwen3": ("llava", {"draft_vocab_size": len(DRAFTED)}, {"class": Qwen3Config, "head_dim": 8}, ONE),
    "biases": ("llava", {}, {"attention_bias": True}, ONE),
    "a narrower draft": (
        "llava",
        {"target_hidden_size": 32, "own_embeddings": True},
        {"hidden_size": 24},
        ("sglang",),
    ),
    "embeddings of its own": ("llava", {"own_embeddings": True}, {}, ONE),
    "several layers": ("llava", {"norm_before_residual": True}, {"num_hidden_layers": 3}, ONE),
}
SAVED: list[tempfile.TemporaryDirectory] = []  # removed at the end of the process
CASES = [(name, layout) for name, (*_, layouts) in DRAFTS.items() for layout in layouts]


def shaken(draft: FeatureDraftModel) -> FeatureDraftModel:
    """Give a draft weights of which none is what a new one has."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    draft.tree_config = TreeConfig(num_nodes=9, depth=2, top_k=6, gate=False, ngrams=False)
    return draft.eval()


def make_eagle3(settings: dict[str, Any], layer: dict[str, Any]) -> Eagle3DraftModel:
    fields = {"rms_norm_eps": 1e-5, **TEXT, "num_hidden_layers": 1, **layer}
    config_class = fields.pop("class", LlamaConfig)
    fields.pop("initializer_range")
    own = {"visual_token_ids": [IMAGE_ID], **settings}
    draft = Eagle3DraftModel(Eagle3Config(text_config=config_class(**fields), **own))
    if settings.get("draft_vocab_size") == len(DRAFTED):
        draft.draft_token_ids.copy_(DRAFTED)
    elif settings.get("draft_vocab_size") is None:
        draft.draft_token_ids.copy_(torch.arange(draft.head.out_features))
    return shaken(draft)


def draft_for(name: str, target: PreTrainedModel) -> Eagle3DraftModel:
    _, settings, layer, _ = DRAFTS[name]
    known = {"visual_token_ids": [target.config.image_token_id, getattr(target.config, "video_token_id", None)]}
    return make_eagle3({key: [one for one in ids if one is not None] for key, ids in known.items()} | settings, layer)


def make_msd(**settings: Any) -> MSDDraftModel:
    return shaken(MSDDraftModel(MSDConfig.from_target(make_target("llama").config, **settings)))


def make_visual(draft_class: type[MSDDraftModel]) -> MSDDraftModel:
    return draft_class(draft_class.config_class.from_target(make_target("llama").config))


def hidden_states(draft: FeatureDraftModel, axes: bool = False) -> list[torch.Tensor]:
    """What a draft makes of a few rows, of a row of its own behind them, and its logits there."""
    generator = torch.Generator().manual_seed(4)
    size = draft.config.get_text_config().hidden_size
    embeds, own = (torch.randn(1, rows, size, generator=generator) for rows in (7, 1))
    features = torch.randn(1, 7, len(draft.feature_layers) * draft.config.target_hidden_size, generator=generator)
    places = torch.randint(0, 9, (3, 1, 8), generator=generator) if axes else torch.arange(8)[None]
    with torch.no_grad():
        first = draft(embeds, draft.fuse(features), position_ids=places[..., :7], use_cache=True)
        last = first.last_hidden_state[:, -1:]
        second = draft(own, last, position_ids=places[..., 7:], use_cache=True, **{CACHE: first[CACHE]})
        logits = [] if draft.head is None else [draft.logits(second.last_hidden_state, None)]
    return [first.last_hidden_state, second.last_hidden_state, *logits]


def proposals(
    draft: FeatureDraftModel, target: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The tokens of all trees that a draft proposes in a call."""
    trees, drafter = [], assistant_for(draft)
    make_generator = drafter.candidate_generator

    def recorded(*arguments: Any) -> TreeCandidateGenerator:
        generator = make_generator(*arguments)
        propose = generator.draft

        def record(committed: Committed) -> TokenTree:
            tree = propose(committed)
            trees.append(tree.token_ids.clone())
            return tree

        generator.draft = record
        return generator

    drafter.candidate_generator = recorded
    target.generate(**inputs, max_new_tokens=5, do_sample=False, assistant_model=drafter)
    return trees


@functools.cache
def saved(target: PreTrainedModel) -> str:
    """Save a target once, and tell where."""
    folder = tempfile.TemporaryDirectory()
    SAVED.append(folder)
    target.save_pretrained(folder.name)
    return folder.name


def exported(draft: FeatureDraftModel, layout: str, target: PreTrainedModel, folder: Path) -> Path:
    export_draft(draft, layout, saved(target), folder / "out")
    return folder / "out"


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_is_written_drafts_as_what_was_there(name: str, layout: str, tmp_path: Path) -> None:
    target = make_deep_target(DRAFTS[name][0])
    draft = draft_for(name, target)
    folder = exported(draft, layout, target, tmp_path)
    again = AutoDraftModel.from_pretrained(folder, target)
    again.tree_config = draft.tree_config
    assert draft.state_dict().keys() == again.state_dict().keys()
    states = zip(hidden_states(draft, draft.reads_axes), hidden_states(again, again.reads_axes), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in states)
    inputs = make_inputs(DRAFTS[name][0], (1,))
    ours, theirs = (proposals(one, target, inputs) for one in (draft, again))
    assert len(ours) == len(theirs) > 2
    assert all(torch.equal(*trees) for trees in zip(ours, theirs, strict=True))


def test_speculators_is_told_what_its_readers_would_guess(tmp_path: Path) -> None:
    target = make_deep_target("llava")
    draft = draft_for("other layers of the target", target)
    folder = exported(draft, "speculators", target, tmp_path)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    expected = {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": VOCAB_SIZE,
        "target_hidden_size": TEXT["hidden_size"],
        "eagle_aux_hidden_state_layer_ids": [1, NUM_LAYERS - 6, NUM_LAYERS - 1],
        "embed_requires_grad": False,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
    }
    assert {name: config[name] for name in expected} == expected
    algorithm = config["speculators_config"]
    assert algorithm["verifier"] == {
        "name_or_path": saved(target),
        "architectures": [type(target).__name__],
    }
    assert [method["speculative_tokens"] for method in algorithm["proposal_methods"]] == [2]
    layer = config["transformer_layer_config"]
    assert layer["model_type"] == "llama"
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"] == 1e4
    assert layer["rope_scaling"] is None
    embeddings = target.get_input_embeddings().weight
    assert torch.equal(weights["embed_tokens.weight"], embeddings)
    assert not {"d2t", "t2d"} & weights.keys()


def test_sglang_is_told_layers_by_their_outputs_and_tokens_by_their_distance(tmp_path: Path) -> None:
    target = make_deep_target("qwen2_5_vl")
    draft = draft_for("axes that take turns", target)
    folder = exported(draft, "sglang", target, tmp_path)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, NUM_LAYERS - 2, NUM_LAYERS - 4]
    assert config["draft_vocab_size"] == len(DRAFTED)
    axes = {"rope_type": "default", "mrope_section": [1, 2, 1], "mrope_interleaved": True}
    assert config["rope_scaling"] == axes
    assert config["rope_parameters"] == axes | {"rope_theta": 3e4}
    assert config["rope_theta"] == 3e4
    assert torch.equal(weights["d2t"] + torch.arange(len(DRAFTED)), DRAFTED)
    assert weights["t2d"].dtype == torch.bool
    assert torch.equal(weights["t2d"].nonzero()[:, 0], DRAFTED)
    layer = {name for name in weights if name.startswith("midlayer.")}
    assert weights.keys() - layer == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert {"midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight"} <= layer


EAGLES: dict[str, dict[str, Any]] = {
    "without a bias": {"fc_bias": False, "num_hidden_layers": 2},
    "with one": {"fc_bias": True},
    "scaled positions": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}},
    "other heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}


@pytest.mark.parametrize("name", EAGLES)
def test_a_draft_without_pictures_leaves_as_eagle(name: str, tmp_path: Path) -> None:
    target, draft = make_target("llama"), make_msd(**EAGLES[name])
    fc_bias = draft.config.fc_bias
    folder = exported(draft, "sglang", target, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert bool(weights["fc.bias"].any()) == fc_bias
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle"]
    again = AutoDraftModel.from_pretrained(folder, target)
    again.tree_config = draft.tree_config
    states = zip(hidden_states(draft), hidden_states(again), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in states)
    ours, theirs = (proposals(one, target, make_inputs("llama", (0,))) for one in (draft, again))
    assert len(ours) == len(theirs) > 2
    assert all(torch.equal(*trees) for trees in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("decoupled", [False, True])
def test_how_pictures_are_read_is_nothing_to_lose_without_them(decoupled: bool, layout: str, tmp_path: Path) -> None:
    target = make_target("llama")
    own = {"visual_token_ids": [], "feature_layers": [1], "reads_placeholders": False, "decoupled": decoupled}
    draft = make_eagle3(own, {})
    again = AutoDraftModel.from_pretrained(exported(draft, layout, target, tmp_path), target)
    again.tree_config = draft.tree_config
    ours, theirs = (proposals(one, target, make_inputs("llama", (0,))) for one in (draft, again))
    assert len(ours) == len(theirs) > 2
    assert all(torch.equal(*trees) for trees in zip(ours, theirs, strict=True))


def of_llava(**settings: Any) -> Callable[[], FeatureDraftModel]:
    layer = settings.pop("layer", {})
    return lambda: make_eagle3(settings, layer)


def msd_with_pictures() -> MSDDraftModel:
    return MSDDraftModel(MSDConfig.from_target(make_deep_target("llava").config, decoupled=False))


def msd_with_a_head() -> MSDDraftModel:
    draft = make_msd(draft_vocab_size=8)
    draft.draft_token_ids.copy_(torch.arange(8))
    return draft


REFUSED: dict[str, tuple[str, str, Callable[[], FeatureDraftModel], str]] = {
    "a normed residual": ("llava", "sglang", of_llava(norm_before_residual=True), "`norm_before_residual`"),
    "one norm": ("llava", "sglang", of_llava(norm_before_fc=True), "`norm_before_fc`"),
    "biases": ("llava", "sglang", of_llava(layer={"attention_bias": True}), "biases of the attention"),
    "biases of the MLP": ("llava", "sglang", of_llava(layer={"mlp_bias": True}), "biases of the MLP"),
    "embeddings of its own": ("llava", "sglang", of_llava(own_embeddings=True), "its own embeddings"),
    "another width": (
        *("llava", "speculators"),
        of_llava(target_hidden_size=32, own_embeddings=True, layer={"hidden_size": 24}),
        "another width than the target's",
    ),
    "layers": ("llava", "sglang", of_llava(layer={"num_hidden_layers": 2}), "layers behind the first"),
    "an activation": ("llava", "sglang", of_llava(layer={"hidden_act": "gelu"}), "the activation gelu"),
    "layers of Qwen3": ("llava", "sglang", of_llava(layer={"class": Qwen3Config, "head_dim": 8}), "layers of qwen3"),
    "layers of Granite": (
        "llava",
        "speculators",
        of_llava(layer={"class": GraniteConfig, "head_dim": 8}),
        "of granite",
    ),
    "the embeddings": ("llava", "sglang", of_llava(feature_layers=[0, 2, 4]), "read as hidden states"),
    "the last norm": ("llava", "sglang", of_llava(feature_layers=[2, 4, -1]), "behind the target's last norm"),
    "the last norm, too": ("llava", "speculators", of_llava(feature_layers=[2, 4, 8]), "behind the target's last nor"),
    "pictures as they are": ("llava", "speculators", of_llava(reads_placeholders=False), "the features of pictures"),
    "pictures instead of features": (
        *("llava", "speculators"),
        of_llava(reads_placeholders=False, decoupled=True),
        "the features of pictures",
    ),
    "other pictures": ("llava", "sglang", of_llava(visual_token_ids=[7]), "`visual_token_ids`"),
    "biases of a reader's": ("llava", "speculators", of_llava(layer={"mlp_bias": True}), "biases of the MLP"),
    "stretched axes": (
        *("qwen2_5_vl", "sglang"),
        of_llava(**AXES, layer={"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        "positions on axes that are scaled besides",
    ),
    "tokens to be chosen": ("llava", "speculators", of_llava(draft_vocab_size=8), "still to be chosen"),
    "a scale of embeddings": (
        "gemma3",
        "speculators",
        of_llava(feature_layers=[1, 1, 1]),
        "the scale of the target's embeddings",
    ),
    "another target": (
        "llava",
        "sglang",
        of_llava(layer={"vocab_size": 200}),
        "made for a target of `vocab_size` 200",
    ),
    "HiViS": (
        *("llama", "sglang"),
        lambda: make_visual(HiViSDraftModel),
        "got HiViSDraftModel, which is not written for engines",
    ),
    "ViSpec": (
        *("llava", "speculators"),
        lambda: make_visual(ViSpecDraftModel),
        "got ViSpecDraftModel, which is not written",
    ),
    "MSD for speculators": ("llama", "speculators", make_msd, "must be given an EAGLE-3 draft, got one of MSD"),
    "MSD with pictures": ("llava", "sglang", msd_with_pictures, "rows of pictures"),
    "MSD with a head": ("llama", "sglang", msd_with_a_head, "its own head"),
    "MSD with a norm": ("llama", "sglang", lambda: make_msd(input_layernorm=True), "`input_layernorm`"),
    "MSD of other positions": (
        *("llama", "sglang"),
        lambda: make_msd(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "must be scaled as in default, linear",
    ),
    "an engine that is none": ("llama", "vllm", make_msd, "must be one of speculators, sglang"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    architecture, layout, make_draft, message = REFUSED[name]
    target = make_target(architecture) if architecture in ("llama", "gemma3") else make_deep_target(architecture)
    with pytest.raises(ValueError, match=message):
        exported(make_draft(), layout, target, tmp_path)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_draft_of_a_target_that_scales_its_logits_stays(tmp_path: Path) -> None:
    target = GraniteForCausalLM(GraniteConfig(**TEXT, logits_scaling=2.0))
    draft = MSDDraftModel(MSDConfig.from_target(target.config))
    with pytest.raises(ValueError, match="lose the scales of the target's embeddings and logits"):
        exported(draft, "sglang", target, tmp_path)


def pickled(draft: FeatureDraftModel, folder: Path) -> None:
    draft.save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SAVES: dict[str, Callable[[FeatureDraftModel, Path], Any]] = {
    "whole": lambda draft, folder: draft.save_pretrained(folder),
    "sharded": lambda draft, folder: draft.save_pretrained(folder, max_shard_size="3KB"),
    "sharded more": lambda draft, folder: draft.save_pretrained(folder, max_shard_size="1KB"),
    "a variant": lambda draft, folder: draft.save_pretrained(folder, variant="fp16"),
    "an export": lambda draft, folder: export_draft(draft, "sglang", saved(make_target("llama")), folder),
    "pickled": pickled,
}


@pytest.mark.parametrize("before", SAVES)
@pytest.mark.parametrize("after", [name for name in SAVES if name not in ("a variant", "pickled")])
def test_what_is_saved_over_another_draft_is_all_that_readers_find(before: str, after: str, tmp_path: Path) -> None:
    old, new = make_msd(fc_bias=False), make_msd(fc_bias=False)
    with torch.no_grad():
        new.fc.weight.add_(1)
    SAVES[before](old, tmp_path / "over")
    for name in ("notes.txt", "adapter.safetensors", "model-card.md", "model-00001.safetensors"):
        (tmp_path / "over" / name).write_text("the user's")
    not_ours = {file.name for file in (tmp_path / "over").iterdir() if file.name.startswith(("pytorch", "model.fp16"))}
    for folder in ("over", "alone"):
        SAVES[after](new, tmp_path / folder)
    again = AutoDraftModel.from_pretrained(tmp_path / "over", make_target("llama").config)
    assert torch.equal(again.fc.weight, new.fc.weight)
    names = {folder: {file.name for file in (tmp_path / folder).iterdir()} for folder in ("over", "alone")}
    kept = {"notes.txt", "adapter.safetensors", "model-card.md", "model-00001.safetensors"} | not_ours
    assert names["over"] == names["alone"] | kept
    assert all((tmp_path / "over" / name).read_bytes() for name in kept)


@pytest.mark.parametrize("sizes", [("3KB", "1GB"), ("1GB", "3KB")])
def test_variants_are_saved_over_variants(sizes: tuple[str, str], tmp_path: Path) -> None:
    whole, drafts = make_msd(), [make_msd() for _ in sizes]
    whole.save_pretrained(tmp_path)
    for number, (draft, size) in enumerate(zip(drafts, sizes, strict=True)):
        draft.fc.weight.data.add_(number + 1)
        draft.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    for draft, variant in ((whole, None), (drafts[1], "fp16")):
        assert torch.equal(MSDDraftModel.from_pretrained(tmp_path, variant=variant).fc.weight, draft.fc.weight)


def test_command_writes_what_loads(tmp_path: Path) -> None:
    target = make_deep_target("llava")
    draft = draft_for("fewer tokens", target)
    draft.save_pretrained(tmp_path / "ours")
    code = "import sys; from transformers_msd.cli import main; main(); assert 'trl' not in sys.modules"
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        "ours",
        "--target_model",
        saved(target),
        "--output",
        "out",
        "--to",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "speculators"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = AutoDraftModel.from_pretrained(tmp_path / "out", target)
    assert all(torch.equal(one, other) for one, other in zip(hidden_states(draft), hidden_states(again), strict=True))


OPENED = [
    name
    for name, (_, settings, _, layouts) in DRAFTS.items()
    if "speculators" in layouts and "mrope_section" not in settings
]


@pytest.mark.parametrize("name", OPENED)
def test_speculators_own_reader_sees_the_same_draft(name: str, tmp_path: Path) -> None:
    speculators = pytest.importorskip("speculators")
    target = copy.deepcopy(make_deep_target("llava"))
    draft = draft_for(name, target)
    folder = exported(draft, "speculators", target, tmp_path)
    config = speculators.SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = speculators.SpeculatorModel.from_pretrained(folder, config=config).eval()
    assert theirs.config.eagle_aux_hidden_state_layer_ids == [
        layer % (NUM_LAYERS + 1) for layer in draft.feature_layers
    ]
    seen = []
    theirs.lm_head.register_forward_hook(lambda module, inputs, outputs: seen.append((inputs[0], outputs)))
    ids = torch.randint(3, 80, (1, 9), generator=torch.Generator().manual_seed(5))
    taps = torch.randn(1, 9, theirs.fc.in_features, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        theirs(hidden_states=taps, input_ids=ids, document_ids=torch.zeros(1, 9, dtype=torch.long), ttt_steps=2)
        own = draft.get_input_embeddings()
        embeds = (target.get_input_embeddings() if own is None else own)(ids)
        first = draft(embeds[:, :8], draft.fuse(taps[:, :8]), use_cache=True)
        second = draft(embeds[:, 8:], first.last_hidden_state[:, 7:], use_cache=True, **{CACHE: first[CACHE]})
        for outputs, rows, (their_states, their_logits) in zip(
            (first, second), (slice(8), slice(7, 8)), seen, strict=True
        ):
            states = outputs.last_hidden_state if draft.config.norm_output else draft.norm(outputs.last_hidden_state)
            # Products are summed in another order.
            torch.testing.assert_close(their_states[:, rows], states, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(their_logits[:, rows], draft.head(states), atol=1e-5, rtol=1e-5)
