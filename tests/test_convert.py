"""Published checkpoints convert with every weight accounted for."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from transformers_msd.cli import main
from transformers_msd.models import files
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.convert_msd import convert_msd_checkpoint
from transformers_msd.models.msd.modeling_msd import MSDDraftModel


ROOT = Path(__file__).parents[1]
# What the published folder says; its vocabulary lacks the 64 tokens that Transformers adds to the target's.
PUBLISHED = {
    "model_type": "llava",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "vocab_size": 32000,
    "pad_token_id": 0,
}
TEXT_CONFIG = {
    "vocab_size": 32064,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def llava_config():
    vision_config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlavaConfig(vision_config=vision_config, text_config=LlamaConfig(**TEXT_CONFIG), image_token_index=32000)


def published_weights(num_layers=1, input_layernorm=False, qkv_bias=False, vocab_size=32000):
    torch.manual_seed(0)
    shapes = {"embed_tokens.weight": (vocab_size, 32), "fc.weight": (32, 64), "fc.bias": (32,)}
    for i in range(num_layers):
        layer = f"layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"}
        if qkv_bias:
            shapes |= {f"{layer}.self_attn.{name}_proj.bias": (32,) for name in "qkv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (32, 48), f"{layer}.post_attention_layernorm.weight": (32,)}
        if input_layernorm or i > 0:
            shapes[f"{layer}.input_layernorm.weight"] = (32,)
        shapes[f"{layer}.self_attn.rotary_emb.inv_freq"] = (4,)
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def write_checkpoint(folder, weights, file_name="pytorch_model.bin", **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **config}))
    if file_name.endswith(".bin"):
        torch.save(weights, folder / file_name)
    else:
        save_file(weights, folder / file_name)


def assert_same_weights(draft, weights):
    names = {name: name.removeprefix("model.") for name in draft.state_dict()}
    assert all(torch.equal(value, weights[names[name]]) for name, value in draft.state_dict().items())
    dropped = weights.keys() - names.values()
    assert all("embed_tokens" in name or "inv_freq" in name for name in dropped)


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.safetensors"])
def test_published_weights_keep_their_values(tmp_path, file_name):
    weights = published_weights()
    write_checkpoint(tmp_path, weights, file_name)
    draft = convert_msd_checkpoint(tmp_path, llava_config())
    assert_same_weights(draft, weights)
    assert draft.config.get_text_config().vocab_size == 32064
    assert draft.config.visual_token_ids == [32000]
    assert not draft.config.input_layernorm


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.safetensors"])
def test_shards_are_read_through_their_index(tmp_path, file_name):
    weights = published_weights()
    names = sorted(weights)
    stem, suffix = file_name.split(".")
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        write_checkpoint(tmp_path, {key: weights[key] for key in keys}, shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (tmp_path / f"{file_name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(convert_msd_checkpoint(tmp_path, llava_config()), weights)


def test_dtype_is_that_of_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path, {key: value.half() for key, value in published_weights().items()})
    draft = convert_msd_checkpoint(tmp_path, llava_config())
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float16}


# EAGLE-1 makes layers of its own kind: biases of queries, keys and values, or none, and no norms of queries and keys.
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_layers_are_of_the_kind_that_the_tensors_have(tmp_path, config_class, qkv_bias):
    target_config = config_class(**TEXT_CONFIG, head_dim=8)
    weights = published_weights(qkv_bias=qkv_bias)
    write_checkpoint(tmp_path, weights, rope_theta=5e4)
    draft = convert_msd_checkpoint(tmp_path, target_config)
    assert_same_weights(draft, weights)
    assert draft.config.get_text_config().rope_parameters["rope_theta"] == 5e4
    draft.save_pretrained(tmp_path / "ours")
    assert_same_weights(MSDDraftModel.from_pretrained(tmp_path / "ours"), weights)


OTHER_KINDS = (
    *("cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4_moe", "granite", "helium"),
    *("ministral3", "olmo2", "phi", "qwen3", "stablelm", "starcoder2"),
)


# They scale, norm or turn otherwise, some with the very tensors of Llama's.
@pytest.mark.parametrize("model_type", OTHER_KINDS)
def test_layers_are_eagles_whatever_the_targets_are(tmp_path, model_type):
    target_config = AutoConfig.for_model(model_type, **TEXT_CONFIG)
    weights = published_weights()
    write_checkpoint(tmp_path, weights, hidden_act="silu", rope_theta=5e4)
    draft = convert_msd_checkpoint(tmp_path, target_config)
    assert_same_weights(draft, weights)
    layer = draft.config.get_text_config()
    assert (type(layer), layer.hidden_act) == (LlamaConfig, "silu")
    assert layer.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}


# Heads that are not the target's, of which the draft has four.
@pytest.mark.parametrize(("num_heads", "num_shared"), [(2, 1), (2, 2), (8, 2), (4, 1)])
@pytest.mark.parametrize("head_dim", [4, 8, 16])
@pytest.mark.parametrize("is_said", [True, False])
def test_heads_are_those_that_the_tensors_have(tmp_path, num_heads, num_shared, head_dim, is_said):
    weights = published_weights()
    for name, number in {"q": num_heads, "k": num_shared, "v": num_shared}.items():
        weights[f"layers.0.self_attn.{name}_proj.weight"] = torch.randn(number * head_dim, 32)
    weights["layers.0.self_attn.o_proj.weight"] = torch.randn(32, num_heads * head_dim)
    said = {"num_attention_heads": num_heads, "num_key_value_heads": num_shared if is_said else None}
    write_checkpoint(tmp_path, weights, **said)
    draft = convert_msd_checkpoint(tmp_path, llava_config())
    assert_same_weights(draft, weights)
    layer = draft.config.get_text_config()
    assert (layer.num_attention_heads, layer.num_key_value_heads) == (num_heads, num_shared)
    assert layer.head_dim == head_dim


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# What configs say of positions, and the settings that are read; the base is 10000 where none is named.
ROPES = {
    "nothing": ({}, {}),
    "a base": ({"rope_theta": 5e4}, {"rope_theta": 5e4}),
    "null": ({"rope_scaling": None, "rope_theta": 5e4}, {"rope_theta": 5e4}),
    "a factor": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "as Transformers 5 does": ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, {"rope_theta": 7e3}),
    "bands": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_type": "llama3", **LLAMA3}),
    "a part of it": ({"text_config": {"rope_theta": 5e4}}, {"rope_theta": 5e4}),
    "axes": ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, {}),
}


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("name", ROPES)
def test_positions_are_turned_as_the_config_beside_the_weights_says(tmp_path, name, config_class):
    published, expected = ROPES[name]
    theirs = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    target_config = config_class(**TEXT_CONFIG, head_dim=8, rope_parameters=theirs)
    weights = published_weights()
    write_checkpoint(tmp_path, weights, **published)
    draft = convert_msd_checkpoint(tmp_path, target_config)
    assert_same_weights(draft, weights)
    settings = {"rope_type": "default", "rope_theta": 10000.0} | expected
    assert draft.config.get_text_config().rope_parameters == settings
    draft.save_pretrained(tmp_path / "ours")
    again = MSDDraftModel.from_pretrained(tmp_path / "ours")
    wanted = LlamaRotaryEmbedding(LlamaConfig(**TEXT_CONFIG, rope_parameters=settings)).inv_freq
    assert torch.equal(draft.model.rotary_emb.inv_freq, wanted)
    assert torch.equal(again.model.rotary_emb.inv_freq, wanted)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "must be settings of all of its layers"),
        ({"rope_theta": 0}, "must be a number above 0, got 0"),
        ({"rope_theta": -5.0}, "must be a number above 0"),
        ({"rope_theta": "1e6"}, "must be a number above 0, got '1e6'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "must be scaled as in default, linear"),
    ],
)
def test_positions_that_are_not_understood_are_told(tmp_path, said, message):
    write_checkpoint(tmp_path, published_weights(), **said)
    with pytest.raises(ValueError, match=message):
        convert_msd_checkpoint(tmp_path, llava_config())


def test_layers_of_the_targets_kind_are_made_where_eagle_has_none(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    target_config = Qwen3Config(**TEXT_CONFIG, head_dim=8, rope_parameters=rope)
    weights = published_weights() | {f"layers.0.self_attn.{name}_norm.weight": torch.randn(8) for name in "qk"}
    write_checkpoint(tmp_path, weights, rope_theta=5e4)
    draft = convert_msd_checkpoint(tmp_path, target_config)
    assert_same_weights(draft, weights)
    layer = draft.config.get_text_config()
    assert type(layer) is Qwen3Config
    assert (layer.rope_parameters["rope_type"], layer.rope_parameters["rope_theta"]) == ("default", 5e4)


def test_biases_of_no_known_layer_are_named(tmp_path):
    weights = published_weights(qkv_bias=True)
    write_checkpoint(tmp_path, weights | {"layers.0.self_attn.o_proj.bias": torch.ones(32)})
    with pytest.raises(ValueError, match=r"unexpected \[.*'model.layers.0.self_attn.o_proj.bias'"):
        convert_msd_checkpoint(tmp_path, llava_config())


def test_several_layers_convert(tmp_path):
    weights = published_weights(num_layers=2)
    write_checkpoint(tmp_path, weights, num_hidden_layers=2)
    assert_same_weights(convert_msd_checkpoint(tmp_path, llava_config()), weights)


def test_qwen_drafts_keep_their_input_norm(tmp_path):
    weights = published_weights(input_layernorm=True, qkv_bias=True, vocab_size=500)
    write_checkpoint(tmp_path, weights, model_type="qwen2_vl", vocab_size=500, rope_theta=5e5)
    rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    target_config = Qwen2VLConfig(text_config={**TEXT_CONFIG, "rope_parameters": rope_parameters})
    draft = convert_msd_checkpoint(tmp_path, target_config)
    assert_same_weights(draft, weights)
    assert draft.config.input_layernorm
    # On all axes positions would be the same.
    assert draft.config.get_text_config().rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_fc_without_bias_converts(tmp_path):
    weights = published_weights()
    del weights["fc.bias"]
    write_checkpoint(tmp_path, weights, bias=False)
    assert convert_msd_checkpoint(tmp_path, llava_config()).fc.bias is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("fc.bias"), r"missing \['fc.bias'\], unexpected \[\]"),
        (lambda weights: weights.update({"norm.weight": torch.ones(32)}), r"unexpected \['model.norm.weight'\]"),
        (lambda weights: weights.update({"fc.weight": torch.ones(32, 32)}), r"'fc.weight': .* got \(32, 32\)"),
    ],
)
def test_weights_that_do_not_fit_raise(tmp_path, change, message):
    weights = published_weights()
    change(weights)
    write_checkpoint(tmp_path, weights)
    with pytest.raises(ValueError, match=message):
        convert_msd_checkpoint(tmp_path, llava_config())


def test_another_hidden_size_than_the_target_raises(tmp_path):
    write_checkpoint(tmp_path, published_weights(), hidden_size=64)
    with pytest.raises(ValueError, match="The draft is 64 wide and reads a target as wide, got one of 32"):
        convert_msd_checkpoint(tmp_path, llava_config())


@pytest.mark.parametrize("file_names", [["pytorch_model.bin"], ["pytorch_model.bin", "model.safetensors"]])
def test_of_weights_that_a_repository_holds_twice_one_file_is_fetched(tmp_path, monkeypatch, file_names):
    weights, cache = published_weights(), tmp_path / "cache"
    for file_name in file_names:
        write_checkpoint(tmp_path / "repository", weights, file_name)
    cache.mkdir()

    def fetch(repo_id, allow_patterns):
        assert repo_id == "someone/draft"
        for file in (tmp_path / "repository").iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(files, "snapshot_download", fetch)
    assert_same_weights(convert_msd_checkpoint("someone/draft", llava_config()), weights)
    assert {file.name for file in cache.iterdir()} == {"config.json", file_names[-1]}


def test_a_folder_without_weights_raises(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    with pytest.raises(ValueError, match="Expected `model.safetensors` or `pytorch_model.bin`"):
        convert_msd_checkpoint(tmp_path, llava_config())


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload",)


def test_weights_that_are_not_finite_are_neither_converted_nor_loaded(tmp_path):
    weights = published_weights()
    weights["fc.weight"][0, 0] = float("nan")
    write_checkpoint(tmp_path / "published", weights)
    with pytest.raises(ValueError, match="NaN or inf in fc.weight"):
        convert_msd_checkpoint(tmp_path / "published", llava_config())
    draft = MSDDraftModel(MSDConfig.from_target(llava_config()))
    draft.fc.weight.data[0, 0] = float("inf")
    draft.save_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match="NaN or inf in fc.weight"):
        MSDDraftModel.from_pretrained(tmp_path / "draft")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, shard):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    with pytest.raises(ValueError, match="must name files beside it"):
        convert_msd_checkpoint(tmp_path, llava_config())


def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path, {"fc.weight": Payload()})
    with pytest.raises(Exception, match="weights_only"):
        convert_msd_checkpoint(tmp_path, llava_config())
    assert not (tmp_path / "payload").exists()


# One process for all folders: it takes longer to start than to convert.
CONVERT_EACH = """
import sys
from transformers_msd.cli import main
for published in sys.argv[2:]:
    main(["convert", published, "--target_model", sys.argv[1], "--output", f"{published}-draft"])
assert "trl" not in sys.modules
"""


def test_command_writes_drafts_that_load(tmp_path):
    llava_config().save_pretrained(tmp_path / "target")
    weights = published_weights()
    folders = {name: tmp_path / name.split(".")[0] for name in ("pytorch_model.bin", "model.safetensors")}
    for file_name, folder in folders.items():
        write_checkpoint(folder, weights, file_name)
    command = [sys.executable, "-c", CONVERT_EACH, str(tmp_path / "target"), *map(str, folders.values())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for folder in folders.values():
        draft = MSDDraftModel.from_pretrained(f"{folder}-draft")
        assert isinstance(draft.config, MSDConfig)
        assert_same_weights(draft, weights)


def test_command_reports_errors_in_one_line(tmp_path):
    llava_config().save_pretrained(tmp_path / "target")
    write_checkpoint(tmp_path / "published", {"fc.weight": torch.ones(32, 64)})
    command = f"convert {tmp_path}/published --target_model {tmp_path}/target --output {tmp_path}/draft"
    # A text as exit code is printed, and the code is 1.
    with pytest.raises(SystemExit, match=r"missing \['fc.bias'") as ended:
        main(command.split())
    assert "\n" not in ended.value.code
