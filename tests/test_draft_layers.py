"""What layers the draft of a target is made of, for every architecture, and what no draft can be made of."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3_5TextConfig,
)
from transformers.cache_utils import DynamicLayer
from zoo import TEXT

from training.evidence.tiny import make_config, model_types
from transformers_msd import MSDConfig, MSDDraftModel


# Configs that give lists for their layers, some of which see a window or are recurrent, whose text part AutoModel does
# not know, that scale embeddings, or that name embeddings and norms otherwise.
OWN = (
    *("cohere2_vision", "deepseek_v3", "emu3", "ernie4_5_vl_moe", "gemma3", "gpt_neox", "gpt_oss", "granite4_vision"),
    *("lfm2_vl", "llama4", "mellum", "minimax_m3_vl_text", "mistral", "mllama", "olmo2", "paddleocr_vl", "phi"),
    *("qwen2_5_omni_thinker", "qwen3_5", "qwen3_vl_moe", "smollm3"),
)
# Layers that can't stand alone, have no `layers`, are of several parts, or come with a tower for pictures.
OTHERS = (
    *("blip-2", "chameleon", "falcon", "falcon_h1", "falcon_mamba", "gemma3n", "gemma4", "gpt2", "longcat_flash"),
    *("opt", "phi4_multimodal"),
)
# Nothing tiny is made of these.
UNMADE = ("blt", "gemma4_assistant", "pi0")


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("model_type", [name for name in (*OWN, *OTHERS) if name in CONFIG_MAPPING])
def test_layers_are_of_the_target_s_kind_and_see_everything(model_type, num_layers, tmp_path):
    target_config = CONFIG_MAPPING[model_type]()
    config = MSDConfig.from_target(target_config, num_hidden_layers=num_layers)
    theirs, text_config = target_config.get_text_config(), config.get_text_config()
    assert type(text_config) is (type(theirs) if model_type in OWN else LlamaConfig)
    assert config.input_layernorm == (model_type in OWN)
    assert text_config.hidden_size == theirs.hidden_size
    assert getattr(text_config, "embedding_multiplier", 1.0) == 1.0
    assert None not in config.visual_token_ids
    assert {type(layer) for layer in DynamicCache(config=text_config).layers} <= {DynamicLayer}
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        draft = MSDDraftModel(MSDConfig.from_pretrained(tmp_path))
    assert len(draft.model.layers) == num_layers
    assert {name.split(".")[1] for name, _ in draft.model.named_parameters(prefix="model")} == {"layers"}


@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in UNMADE])
@torch.no_grad()
def test_every_draft_sees_the_past_alone_and_loads_as_it_was_saved(model_type, tmp_path):
    torch.manual_seed(0)
    target_config = make_config(model_type)
    if target_config.is_encoder_decoder:
        with pytest.raises(ValueError, match="which has an encoder"):
            MSDConfig.from_target(target_config)
        return
    # Of the others that can't be targets, drafts are made none the less.
    draft = MSDDraftModel(MSDConfig.from_target(target_config)).eval()
    hidden_size = draft.config.get_text_config().hidden_size
    inputs_embeds, features = torch.randn(2, 2, 7, hidden_size)
    changed = features.clone()
    changed[:, 4:] += 1
    for mask in (None, torch.ones(2, 7, dtype=torch.long)):
        before, after = (
            draft(inputs_embeds, rows, attention_mask=mask).last_hidden_state for rows in (features, changed)
        )
        torch.testing.assert_close(after[:, :4], before[:, :4])
        assert not torch.allclose(after[:, 4:], before[:, 4:])
    draft.save_pretrained(tmp_path)
    again = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(inputs_embeds, features).last_hidden_state, draft(inputs_embeds, features)[0])
    half = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype is half.fc.weight.dtype is torch.bfloat16


FIELDS = TEXT | {"head_dim": 8}
REFUSED = {
    "a window": (MistralConfig(**FIELDS, sliding_window=6), {"sliding_window": 4}),
    "a layer with a window": (Gemma3TextConfig(**FIELDS, sliding_window=6), {"layer_types": ["sliding_attention"]}),
    "a layer with a state": (Qwen3_5TextConfig(**FIELDS), {"layer_types": ["linear_attention"]}),
    "one of two layers with a state": (
        Qwen3_5TextConfig(**FIELDS),
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_no_tree_can_stand_on_are_refused(case):
    target_config, overrides = REFUSED[case]
    with pytest.raises(ValueError, match="must see everything"):
        MSDConfig.from_target(target_config, **overrides)
    config = MSDConfig.from_target(target_config)
    vars(config.text_config).update(overrides)
    with pytest.raises(ValueError, match="must see everything"):
        MSDDraftModel(config)


def test_a_norm_that_layers_lack_is_not_left_out():
    config = MSDConfig.from_target(CONFIG_MAPPING["olmo2"](), input_layernorm=False)
    with pytest.raises(ValueError, match="`input_layernorm` must be True"), torch.device("meta"):
        MSDDraftModel(config)


def test_how_a_target_is_loaded_is_not_how_its_draft_is():
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config = MSDConfig.from_target(MistralConfig(**FIELDS, quantization_config=quantized))
    assert not hasattr(config.get_text_config(), "quantization_config")


def test_a_config_that_can_t_be_loaded_by_its_name_has_a_draft_of_llama_layers(tmp_path):
    class OwnConfig(Qwen2Config):
        model_type = "of_a_notebook"

    class OwnModel(Qwen2Model):
        config_class = OwnConfig

    draft = MSDDraftModel(MSDConfig.from_target(OwnConfig(**TEXT)))
    draft.save_pretrained(tmp_path)
    assert type(MSDDraftModel.from_pretrained(tmp_path).config.text_config) is LlamaConfig


def test_sizes_by_layer_are_those_of_the_target():
    config = MSDConfig.from_target(CONFIG_MAPPING["laguna"](**FIELDS, num_attention_heads_per_layer=[2, 2]))
    assert config.get_text_config().num_attention_heads_per_layer == [2]  # not `num_attention_heads`, 4
