"""The draft layer equals the published one, and keeps to the Transformers contract of a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

from transformers_msd.compat import CACHE
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.traits.tokens import visual_token_mask
from transformers_msd.trees.tree import TreeConfig


GOLDEN = Path(__file__).parents[2] / "shared" / "reference" / "golden"
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 0,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
TARGETS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llava": lambda: LlavaConfig(text_config=LlamaConfig(**SIZES), image_token_index=90),
    "llava_next": lambda: LlavaNextConfig(text_config=LlamaConfig(**SIZES), image_token_index=90),
    "llava_onevision": lambda: LlavaOnevisionConfig(
        text_config=Qwen2Config(**SIZES), image_token_index=90, video_token_index=91
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(text_config={**SIZES, **MROPE}, image_token_id=90, video_token_id=91),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(text_config={**SIZES, **MROPE}, image_token_id=90, video_token_id=91),
}
VISUAL_TOKEN_IDS = {
    "llama": [],
    "llava": [90],
    "llava_next": [90],
    "llava_onevision": [90, 91],
    "qwen2_vl": [90, 91],
    "qwen2_5_vl": [90, 91],
}


@pytest.fixture(scope="module", autouse=True)
def registration():
    AutoConfig.register(MSDConfig.model_type, MSDConfig, exist_ok=True)
    AutoModel.register(MSDConfig, MSDDraftModel, exist_ok=True)


def make_draft(target="llava", **overrides):
    torch.manual_seed(0)
    return MSDDraftModel(MSDConfig.from_target(TARGETS[target](), **overrides)).eval()


def make_rows(length=9, batch_size=1):
    torch.manual_seed(1)
    return torch.randn(batch_size, length, 32), torch.randn(batch_size, length, 32)


def load_golden(name):
    path = GOLDEN / f"msd_reference_{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def golden_draft(meta, tensors):
    fields = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    fields = (*fields, "num_hidden_layers", "rms_norm_eps")
    rope_parameters = {"rope_type": "default", "rope_theta": meta["rope_theta"]}
    text_config = LlamaConfig(**{name: meta[name] for name in fields}, rope_parameters=rope_parameters)
    draft = MSDDraftModel(MSDConfig(text_config=text_config, fc_bias=meta["fc_bias"])).eval()
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    embed_tokens = weights.pop("embed_tokens.weight")
    draft.load_state_dict({key if key.startswith("fc.") else f"model.{key}": value for key, value in weights.items()})
    return draft, embed_tokens


def golden_image_rows(meta, tensors, embed_tokens):
    ids, visual_embeds = tensors["io.image_text_ids"], tensors["io.image_visual_embeds"]
    start, end = meta["image_position"], meta["image_position"] + visual_embeds.shape[1]
    embeds = [embed_tokens[ids[:, :start]], visual_embeds, embed_tokens[ids[:, start:]]]
    embeds = torch.cat([*embeds, embed_tokens[tensors["io.image_sampled"]]], dim=1)
    visual_mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual_mask[:, start:end] = True
    return embeds[:, 1:], tensors["io.image_target_hidden"], visual_mask[:, 1:]


# The published layer runs in float32 too; the tolerance covers another order of summation.
@pytest.mark.parametrize("name", ["a", "c"])
@torch.no_grad()
def test_text_prompt_equals_the_published_layer(name):
    meta, tensors = load_golden(name)
    draft, embed_tokens = golden_draft(meta, tensors)
    ids = torch.cat([tensors["io.text_ids"], tensors["io.text_sampled"]], dim=1)
    outputs = draft(embed_tokens[ids[:, 1:]], tensors["io.text_target_hidden"])
    torch.testing.assert_close(outputs.last_hidden_state, tensors["io.text_draft_hidden"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["a", "c"])
@torch.no_grad()
def test_image_prompt_equals_the_published_layer(name):
    meta, tensors = load_golden(name)
    draft, embed_tokens = golden_draft(meta, tensors)
    outputs = draft(*golden_image_rows(meta, tensors, embed_tokens))
    torch.testing.assert_close(outputs.last_hidden_state, tensors["io.image_draft_hidden"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_next_round_with_the_cache_kept_equals_the_published_layer():
    meta, tensors = load_golden("a")
    draft, embed_tokens = golden_draft(meta, tensors)
    prefix = golden_image_rows(meta, tensors, embed_tokens)
    cache = draft(*prefix, use_cache=True)[CACHE]
    ids = torch.cat([tensors["io.round2_committed"], tensors["io.round2_sampled"]], dim=1)
    rows = embed_tokens[ids], tensors["io.round2_target_hidden"]
    hidden = draft(*rows, **{CACHE: cache}).last_hidden_state

    whole = [torch.cat(pair, dim=1) for pair in zip(prefix, (*rows, torch.zeros_like(ids).bool()), strict=True)]
    torch.testing.assert_close(hidden, draft(*whole).last_hidden_state[:, -3:], atol=1e-4, rtol=0)
    # The golden file holds the tree of this round: its first level is the best tokens of the last row.
    first_level = tensors["io.round2_tree_tokens"][0, tensors["io.round2_tree_positions"] == 1]
    best = (hidden[0, -1] @ tensors["lm_head.weight"].T).topk(meta["top_k"]).indices
    assert set(first_level.tolist()) <= set(best.tolist())
    assert best[0] in first_level


@pytest.mark.parametrize("target", TARGETS)
def test_config_follows_the_target(target):
    config = MSDConfig.from_target(TARGETS[target]())
    text_config = config.get_text_config()
    assert config.visual_token_ids == VISUAL_TOKEN_IDS[target]
    assert (text_config.num_hidden_layers, text_config.vocab_size, text_config.hidden_size) == (1, 99, 32)
    assert (text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id) == (1, [2, 5], 0)
    assert config.input_layernorm == ("llama" not in text_config.model_type)


def test_special_token_ids_at_the_top_of_the_target_config_are_found():
    target_config = LlavaConfig(text_config=LlamaConfig(**{**SIZES, "pad_token_id": None}))
    target_config.pad_token_id = 7
    assert MSDConfig.from_target(target_config).get_text_config().pad_token_id == 7


def test_overrides_reach_the_level_they_belong_to():
    tree_config = {"num_nodes": 16, "depth": 4, "top_k": 4}
    overrides = {"num_hidden_layers": 2, "intermediate_size": 24, "fc_bias": False, "input_layernorm": True}
    draft = make_draft("qwen2_5_vl", **overrides, tree_config=tree_config)
    assert len(draft.model.layers) == 2
    assert draft.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    assert draft.fc.bias is None
    assert draft.tree_config == TreeConfig(**tree_config)


@pytest.mark.parametrize("overrides", [{"num_layers": 2}, {"hidden_size": 64}])
def test_wrong_overrides_raise(overrides):
    with pytest.raises(ValueError, match=next(iter(overrides))):
        MSDConfig.from_target(TARGETS["llava"](), **overrides)


def test_the_folder_of_a_target_is_no_draft(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'msd_draft', got 'llama'"):
        MSDDraftModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs the `hidden_size` and `vocab_size`"):
        MSDConfig.from_target(CONFIG_MAPPING["blt"]())


def test_visual_token_mask_marks_every_placeholder():
    input_ids = torch.tensor([[1, 90, 90, 3], [91, 4, 90, 5]])
    assert visual_token_mask(input_ids, [90, 91]).int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    assert not visual_token_mask(input_ids, []).any()


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_visual_rows_ignore_the_features(target):
    draft = make_draft(target)
    inputs_embeds, features = make_rows()
    visual_mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1]]).bool()  # three images
    expected = draft(inputs_embeds, features, visual_mask).last_hidden_state
    changed = features + visual_mask[..., None] * torch.randn_like(features)
    assert torch.equal(draft(inputs_embeds, changed, visual_mask).last_hidden_state, expected)
    assert not torch.equal(draft(inputs_embeds, changed).last_hidden_state, expected)


@torch.no_grad()
def test_a_mask_without_visual_rows_changes_nothing():
    draft = make_draft()
    inputs_embeds, features = make_rows()
    visual_mask = torch.zeros(1, 9, dtype=torch.bool)
    assert torch.equal(
        draft(inputs_embeds, features, visual_mask).last_hidden_state, draft(inputs_embeds, features).last_hidden_state
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()  # two layers of large weights: 2e-5 apart in another order of summation
def test_additive_causal_mask_equals_no_mask(target, attn_implementation):
    draft = make_draft(target, num_hidden_layers=2)
    draft.set_attn_implementation(attn_implementation)
    rows = make_rows()
    mask = torch.full((1, 1, 9, 9), torch.finfo(torch.float32).min).triu(1)
    outputs, expected = draft(*rows, attention_mask=mask), draft(*rows)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)
    cache = draft(rows[0][:, :6], rows[1][:, :6], use_cache=True)[CACHE]
    outputs = draft(rows[0][:, 6:], rows[1][:, 6:], attention_mask=mask[:, :, 6:], **{CACHE: cache})
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state[:, 6:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_left_padding_changes_no_real_row(target):
    draft = make_draft(target)
    inputs_embeds, features = make_rows(batch_size=2)
    attention_mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    outputs = draft(inputs_embeds, features, attention_mask=attention_mask, position_ids=position_ids)
    expected = draft(inputs_embeds[1:, 3:], features[1:, 3:])
    torch.testing.assert_close(outputs.last_hidden_state[1:, 3:], expected.last_hidden_state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_saved_draft_loads_through_the_auto_classes(target, tmp_path):
    draft = make_draft(target)
    draft.tree_config = TreeConfig(num_nodes=16, depth=4, top_k=4)
    draft.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    rows = make_rows()
    assert isinstance(loaded, MSDDraftModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MSDConfig)
    assert loaded.tree_config == TreeConfig(num_nodes=16, depth=4, top_k=4)
    assert torch.equal(loaded(*rows).last_hidden_state, draft(*rows).last_hidden_state)
    assert (
        AutoModel.from_pretrained(tmp_path, attn_implementation="eager").model.config._attn_implementation == "eager"
    )


def test_default_tree_is_the_published_one():
    assert make_draft().tree_config == TreeConfig(num_nodes=59, depth=6, top_k=10)


def test_bfloat16_reaches_every_weight(tmp_path):
    make_draft().save_pretrained(tmp_path)
    draft = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}
    target_config = TARGETS["llava"]()
    target_config.get_text_config().dtype = torch.bfloat16
    draft = MSDDraftModel(MSDConfig.from_target(target_config))
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_vocabulary_size_is_stored(target):
    draft = make_draft(target)
    assert not [key for key, value in draft.state_dict().items() if 99 in value.shape]


def test_only_the_first_layer_lacks_its_input_norm():
    keys = [key for key in make_draft(num_hidden_layers=2).state_dict() if "norm" in key]
    assert keys == [
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ]


def test_a_decoder_layer_stays_on_one_device():
    assert make_draft()._no_split_modules == {"LlamaDecoderLayer"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 9, 16)}, "`inputs_embeds` must have shape .* got \\(1, 9, 16\\)"),
        ({"features": torch.zeros(1, 8, 32)}, "`features` must have the shape .* got \\(1, 8, 32\\)"),
        ({"visual_mask": torch.zeros(1, 10).bool()}, "`visual_mask` must have shape .* got \\(1, 10\\)"),
        ({"attention_mask": torch.ones(1, 1, 9, 9).bool()}, "must be an additive float mask, got torch.bool"),
    ],
)
def test_wrong_inputs_raise(change, message):
    inputs_embeds, features = make_rows()
    with pytest.raises(ValueError, match=message):
        make_draft()(**{"inputs_embeds": inputs_embeds, "features": features, **change})
