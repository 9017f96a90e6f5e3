"""What a model must be to run trees: served with plain's tokens, or refused before its forward by a fact about it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel
from zoo import make_draft_model, make_inputs, make_target

from transformers_msd import (
    CallInputs,
    Committed,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    StaticRuntime,
    Target,
    TokenTree,
    TreeCandidateGenerator,
    TreeConfig,
    VLMDrafter,
)


TREE = TreeConfig(num_nodes=16, depth=4, top_k=3, gate=False)
IDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TEXT = IDS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = TEXT | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4}


def make(model_class: Any, config: Any, seed: int = 0) -> PreTrainedModel:
    """A model whose weights are large enough that its answers depend on every token."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def llama(seed: int = 0, **fields: Any) -> PreTrainedModel:
    return make(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT | fields), seed)


def phi3() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 20,
    }
    config = tf.Phi3Config(
        **TEXT, max_position_embeddings=512, original_max_position_embeddings=20, rope_parameters=rope
    )
    return make(tf.Phi3ForCausalLM, config)


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return llama(max_position_embeddings=20, rope_parameters=rope)


def gpt_neo() -> PreTrainedModel:
    fields = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    return make(tf.GPTNeoForCausalLM, tf.GPTNeoConfig(**IDS, **fields, window_size=48))


def vision(**fields: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    return sizes | fields


def qwen_vision() -> Any:
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    return tf.AutoConfig.for_model("qwen2_5_vl_vision", **sizes, patch_size=4)


def hyperclovax() -> PreTrainedModel:
    text = tf.AutoConfig.for_model("hyperclovax", **TEXT, head_dim=8)
    config = tf.HyperCLOVAXVisionV2Config(
        text_config=text, vision_config=qwen_vision(), image_token_id=90, video_token_id=91
    )
    return make(tf.HyperCLOVAXVisionV2ForConditionalGeneration, config)


def exaone() -> PreTrainedModel:
    text = tf.AutoConfig.for_model(
        "exaone4", **TEXT, sliding_window=None, layer_types=["full_attention", "full_attention"]
    )
    vision_config = tf.Exaone4_5_Config().vision_config.to_dict()
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision_config |= sizes | {"patch_size": 4, "num_key_value_heads": 2, "fullatt_block_indexes": [0]}
    config = tf.Exaone4_5_Config(
        text_config=text.to_dict(), vision_config=vision_config, image_token_id=90, video_token_id=91
    )
    return make(tf.Exaone4_5_ForConditionalGeneration, config)


def unlimited_ocr() -> PreTrainedModel:
    text = TEXT | {"head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    sam = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64, "mlp_dim": 48}
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tf.UnlimitedOcrConfig(
        text_config=text | {"layer_types": ["full_attention"] * 2},
        vision_config={"sam_config": sam | {"output_channels": 32}, "encoder_config": encoder},
        image_token_id=90,
    )
    return make(tf.UnlimitedOcrForConditionalGeneration, config)


def mllama() -> PreTrainedModel:
    own = {"num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    text = TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = tf.MllamaConfig(
        text_config=text,
        vision_config=vision(**own, intermediate_layers_indices=[0], vision_output_dim=64),
        image_token_index=90,
    )
    return make(tf.MllamaForConditionalGeneration, config)


def idefics() -> PreTrainedModel:
    own = {"embed_dim": 32, "image_size": 16, "patch_size": 4, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = tf.IdeficsConfig(**{**TEXT, "num_key_value_heads": 4}, vision_config=own, use_resampler=False)
    return make(tf.IdeficsForVisionText2Text, config)


def git() -> PreTrainedModel:
    fields = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    return make(tf.GitForCausalLM, tf.GitConfig(**fields, vision_config=vision(num_attention_heads=4)))


def in_training() -> PreTrainedModel:
    model = llama()
    model.gradient_checkpointing_enable()
    return model.train()


def dropping() -> PreTrainedModel:
    model = llama()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    return model.train()


def prompt(length: int = 12, num_rows: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(3, 90, (num_rows, length), generator=generator)}


def padded(inputs: dict[str, torch.Tensor], num_columns: int = 4) -> dict[str, torch.Tensor]:
    """Prompts the first of which is shorter."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :num_columns] = 0
    return inputs | {"attention_mask": mask, "input_ids": inputs["input_ids"] * mask}


def pictures(num_rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(num_rows, 3, 16, 16, generator=torch.Generator().manual_seed(4))}


def generate(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**{"max_new_tokens": 20} | inputs | settings)


# -- targets

ROTARY = "rotary embedding"
# What is refused, and why.
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "dynamic rope beyond its length": (dynamic, prompt() | {"max_new_tokens": 10}, f"{ROTARY}.*beyond 20 tokens"),
    "longrope across its switch": (phi3, prompt() | {"max_new_tokens": 10}, f"{ROTARY}.*after 20 tokens"),
    "longrope, one row before its switch": (phi3, padded(prompt(22, 2)), f"{ROTARY}.*after 20 tokens"),
    "local attention beyond its window": (gpt_neo, prompt() | {"max_new_tokens": 22}, "window of 48 columns"),
    "local attention in a static cache": (
        gpt_neo,
        prompt() | {"cache_implementation": "static", "max_new_tokens": 4, "disable_compile": True},
        "fixed width",
    ),
    "a window above attention": (
        lambda: make(tf.DogeForCausalLM, tf.DogeConfig(**TEXT, keep_window_size=24)),
        prompt(),
        "window of 24 columns",
    ),
    "positions of its own": (
        lambda: make(
            tf.Kosmos2_5ForConditionalGeneration,
            tf.Kosmos2_5Config(
                text_config=IDS | {"embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48},
                vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            ),
        ),
        prompt(),
        "makes positions of its own",
    ),
    "no decoder": (
        lambda: make(
            tf.BertLMHeadModel,
            tf.BertConfig(
                vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            ),
        ),
        prompt(),
        "set up as no decoder",
    ),
    "no positions (BLOOM)": (
        lambda: make(tf.BloomForCausalLM, tf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4)),
        prompt(),
        "takes no `position_ids`",
    ),
    "no positions (MPT)": (
        lambda: make(tf.MptForCausalLM, tf.MptConfig(**IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
        prompt(),
        "takes no `position_ids`",
    ),
    "alibi": (
        lambda: make(
            tf.FalconForCausalLM,
            tf.FalconConfig(**IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        ),
        prompt(),
        "attention biases",
    ),
    "no cache": (
        lambda: make(tf.OpenAIGPTLMHeadModel, tf.OpenAIGPTConfig(**GPT)),
        prompt(),
        "takes no cache",
    ),
    "a cache of its own": (
        lambda: make(tf.MiniMaxForCausalLM, tf.MiniMaxConfig(**MOE, layer_types=["full_attention"] * 2)),
        prompt(),
        "makes a cache of its own",
    ),
    "a prefill of its own": (unlimited_ocr, prompt(), "runs its prompt by a method of its own"),
    "several streams": (
        lambda: make(
            tf.Gemma3nForCausalLM,
            tf.Gemma3nTextConfig(
                **TEXT,
                head_dim=8,
                layer_types=["full_attention"] * 2,
                vocab_size_per_layer_input=96,
                hidden_size_per_layer_input=8,
                num_kv_shared_layers=0,
                laurel_rank=4,
                activation_sparsity_pattern=None,
            ),
        ),
        prompt(),
        "several hidden states for each token",
    ),
    "cross-attention": (mllama, prompt(), "cross-attention"),
    "inputs of its own": (idefics, prompt(), "image_attention_mask, image_hidden_states"),
    "padding where pictures have no tokens": (git, padded(prompt(12, 2)), "no tokens for pictures"),
    "padding beside pictures without tokens": (git, padded(prompt(12, 2)) | pictures(2), "no tokens for pictures"),
    "gradient checkpointing": (in_training, prompt(), "call its `eval"),
    "dropout": (dropping, prompt(), "drops at random while it trains"),
    "prompt tuning": (
        lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval(),
        prompt(),
        "prompt learning",
    ),
    "prefix tuning": (
        lambda: get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval(),
        prompt(),
        "prompt learning",
    ),
    "aLoRA": (
        lambda: get_peft_model(
            llama(), LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
        ).eval(),
        prompt(),
        "aLoRA",
    ),
}
# Neighbours of these that are served.
SERVED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dynamic rope inside its length": (dynamic, prompt() | {"max_new_tokens": 9}),
    "longrope before its switch": (phi3, prompt() | {"max_new_tokens": 9}),
    "longrope behind its switch": (phi3, prompt(21)),
    "longrope behind its switch, padded": (phi3, padded(prompt(26, 2))),
    "local attention inside its window": (gpt_neo, prompt() | {"max_new_tokens": 20}),
    "positions that are dropped (HyperCLOVA X)": (hyperclovax, prompt()),
    "positions that are dropped, padded": (hyperclovax, padded(prompt(12, 2))),
    "positions that are dropped (EXAONE 4.5)": (exaone, prompt()),
    "training without dropout": (lambda: llama().train(), prompt()),
    "a decoder that its config does not call one": (
        lambda: make(
            tf.GPTNeoXForCausalLM,
            tf.GPTNeoXConfig(**IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        ),
        prompt(),
    ),
    "no alibi": (
        lambda: make(
            tf.FalconForCausalLM,
            tf.FalconConfig(**IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
        ),
        prompt(),
    ),
    "pictures without tokens": (git, prompt(12, 2) | pictures(2)),
    "learned positions to the last": (
        lambda: make(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT, n_positions=31)),
        prompt(),
    ),
    "learned positions to the last (OPT)": (
        lambda: make(
            tf.OPTForCausalLM,
            tf.OPTConfig(
                **IDS,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=31,
                word_embed_proj_dim=32,
            ),
        ),
        prompt(),
    ),
    "LoRA": (lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2)).eval(), prompt()),
}


def assert_equal_to_plain(model: Any, inputs: dict[str, Any], assistant: Any) -> None:
    for do_sample in (False, True):
        settings = inputs | {"do_sample": do_sample}
        plain = generate(model, settings)
        assert torch.equal(generate(model, settings, assistant_model=assistant), plain)


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_cannot_be_served_are_refused_before_their_forward(name: str) -> None:
    make_model, inputs, reason = REFUSED[name]
    model = make_model()
    ran: list[int] = []
    for part in model.modules():
        part.register_forward_pre_hook(lambda *args: ran.append(1))
    with pytest.raises(ValueError, match=reason) as error:
        generate(model, inputs, assistant_model=VLMDrafter(llama(1), tree_config=TREE))
    assert "assistant_model" in str(error.value)
    assert not ran


@pytest.mark.parametrize("name", SERVED)
def test_their_neighbours_are_served(name: str) -> None:
    make_model, inputs = SERVED[name]
    model = make_model()
    assert_equal_to_plain(model, inputs, VLMDrafter(llama(1), tree_config=TREE))


@pytest.mark.parametrize("name", [name for name in SERVED if name != "LoRA"])
def test_every_kind_of_target_has_a_draft_on_its_features(name: str) -> None:
    make_model, inputs = SERVED[name]
    model = make_model()
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(model.config)).eval()
    draft.tree_config = TREE
    assert_equal_to_plain(model, inputs, draft)


@pytest.mark.parametrize("is_drafted", [False, True], ids=["plain", "drafted"])
def test_a_call_beyond_the_last_learned_position_fails_as_plain_does(is_drafted: bool) -> None:
    model = make(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT, n_positions=24))
    with pytest.raises(IndexError):
        generate(model, prompt(), assistant_model=VLMDrafter(llama(1), tree_config=TREE) if is_drafted else None)


def test_positions_behind_the_end_do_not_reach_further() -> None:
    """A draft that is right grows its tree over the end of the call."""
    model = make(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT, n_positions=31))
    assert_equal_to_plain(model, prompt(), VLMDrafter(model, tree_config=TREE))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
def test_a_tower_may_have_another_dtype(architecture: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    model = copy.deepcopy(make_target(architecture)).to(dtypes[1])
    model.model.visual.to(dtypes[0])
    inputs = make_inputs(architecture)
    draft = MSDDraftModel(MSDConfig.from_target(model.config)).eval().to(dtypes[1])
    draft.tree_config = TREE
    plain = generate(model, inputs)
    drafted = generate(model, inputs, assistant_model=draft)
    # In half precision a near-tie may fall the other way.
    assert drafted.shape == plain.shape
    assert dtypes[1] is torch.bfloat16 or torch.equal(drafted, plain)


# -- drafts

HYBRID = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def mistral(window: int) -> PreTrainedModel:
    return make(tf.MistralForCausalLM, tf.MistralConfig(**TEXT, sliding_window=window))


def meta() -> PreTrainedModel:
    return llama().to("meta")


REFUSED_DRAFTS: dict[str, tuple[Callable[[], Any], str]] = {
    "recurrent": (
        lambda: make(tf.Qwen3_5ForCausalLM, tf.Qwen3_5TextConfig(**TEXT, **HYBRID)),
        "recurrent state",
    ),
    "convolutions": (
        lambda: make(tf.Lfm2ForCausalLM, tf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])),
        "recurrent state",
    ),
    "encoder and decoder": (
        lambda: make(tf.BartForConditionalGeneration, tf.BartConfig(**BART)),
        "an encoder and a decoder",
    ),
    "no positions": (REFUSED["no positions (BLOOM)"][0], "takes no `position_ids`"),
    "no head": (lambda: make(tf.LlamaModel, tf.LlamaConfig(**TEXT)), "has no head"),
    "an MSD draft": (lambda: MSDDraftModel(MSDConfig.from_target(tf.LlamaConfig(**TEXT))), "target's features"),
    "in training": (in_training, "call its `eval"),
    "offloaded": (meta, "offloaded"),
    "another vocabulary": (lambda: llama(vocab_size=2000), "target's vocabulary"),
}


@pytest.mark.parametrize("drafter", [VLMDrafter, EnsembleDrafter])
@pytest.mark.parametrize("name", REFUSED_DRAFTS)
def test_drafts_that_cannot_draft_are_refused_before_the_target_runs(name: str, drafter: Any) -> None:
    make_model, reason = REFUSED_DRAFTS[name]
    target, ran = llama(), []
    target.register_forward_pre_hook(lambda *args: ran.append(1))
    with pytest.raises(ValueError, match=reason):
        generate(target, prompt(), assistant_model=drafter(make_model(), tree_config=TREE))
    assert not ran


@pytest.mark.parametrize("wrong", ["a folder", 3, torch.nn.Linear(1, 1)], ids=lambda value: type(value).__name__)
def test_what_is_no_draft_is_told(wrong: Any) -> None:
    with pytest.raises(ValueError, match="must be a `PreTrainedModel`, got"):
        VLMDrafter(wrong)


def test_a_draft_with_learned_rows_is_told() -> None:
    wrapped = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ValueError, match="prompt learning"):
        VLMDrafter(wrapped)


def test_a_draft_with_a_wide_window_drafts() -> None:
    target = llama()
    assert_equal_to_plain(target, prompt(), VLMDrafter(mistral(64), tree_config=TREE))


@pytest.mark.parametrize("drafter", [VLMDrafter, EnsembleDrafter])
@pytest.mark.parametrize("wrapper", ["peft", "compiled"])
def test_a_wrapped_draft_sees_the_pictures(wrapper: str, drafter: Any) -> None:
    target, inputs, draft = make_target("llava"), make_inputs("llava", (2, 0, 1)), make_draft_model("llava")
    wrapped: Any = copy.deepcopy(draft)
    if wrapper == "peft":
        wrapped = get_peft_model(wrapped, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    else:
        wrapped = torch.compile(wrapped, backend="eager", dynamic=True)
    outputs = [
        generate(target, inputs, assistant_model=drafter(model, tree_config=TREE), return_dict_in_generate=True)
        for model in (draft, wrapped)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].speculative_stats.num_accepted == outputs[1].speculative_stats.num_accepted


SETTINGS = {
    "num_beams": 4,
    "use_cache": False,
    "cache_implementation": "static",
    "stop_strings": ["x"],
    "token_healing": True,
    "prefill_chunk_size": 3,
    "output_attentions": True,
    "max_length": 3,
    "repetition_penalty": 5.0,
}


@pytest.mark.parametrize("drafter", [VLMDrafter, EnsembleDrafter])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_draft_are_for_its_own_answers(setting: str, drafter: Any) -> None:
    target, inputs, draft = make_target("llava"), make_inputs("llava", (2, 0, 1)), make_draft_model("llava")
    other = copy.deepcopy(draft)
    setattr(other.generation_config, setting, SETTINGS[setting])
    before = other.generation_config.to_dict()
    outputs = [
        generate(target, inputs, assistant_model=drafter(model, tree_config=TREE), return_dict_in_generate=True)
        for model in (draft, other)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].speculative_stats.num_accepted == outputs[1].speculative_stats.num_accepted
    assert other.generation_config.to_dict() == before


def test_a_draft_whose_context_is_full_lets_the_call_go_on() -> None:
    target = llama()
    draft = make(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT, n_positions=18))
    assert_equal_to_plain(target, prompt(), VLMDrafter(draft, tree_config=TREE))


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "runtime"])
def test_an_msd_draft_that_is_not_ready_is_refused(is_captured: bool) -> None:
    target = make_target("llava")
    draft = MSDDraftModel(MSDConfig.from_target(target.config))
    draft.gradient_checkpointing_enable()
    draft.train()
    assistant = StaticRuntime(draft) if is_captured else draft
    with pytest.raises(ValueError, match="keeps no cache"):
        generate(target, make_inputs("llava"), assistant_model=assistant)
    draft.gradient_checkpointing_disable()
    draft.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="drops at random"):
        generate(target, make_inputs("llava"), assistant_model=assistant)
    draft.eval().to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        generate(target, make_inputs("llava"), assistant_model=assistant)


# -- settings and trees

EMBEDS = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("settings", "neighbour", "name"),
    [
        ({"dola_layers": "low"}, {}, "dola_layers"),
        (
            {"inputs_embeds": EMBEDS, "prefill_chunk_size": 1},
            {"inputs_embeds": EMBEDS},
            "prefill_chunk_size",
        ),
    ],
    ids=["DoLa", "both prompts in chunks"],
)
def test_settings_that_change_plain_decoding_are_refused(
    settings: dict[str, Any], neighbour: dict[str, Any], name: str
) -> None:
    target, assistant = llama(), VLMDrafter(llama(1), tree_config=TREE)
    with pytest.raises(ValueError, match=name):
        generate(target, prompt() | settings, assistant_model=assistant)
    assert_equal_to_plain(target, prompt() | neighbour, assistant)


class Mistaken(TreeCandidateGenerator):
    """Drafts trees with another root than the token emitted last, or with parents that can't be."""

    def __init__(self, token_ids: list[int], parents: list[int]) -> None:
        self.tree = TokenTree(
            torch.tensor([token_ids]), torch.tensor([parents]), torch.zeros(1, len(parents)), len(parents) - 1
        )

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "Mistaken":
        return self

    def draft(self, committed: Committed) -> TokenTree:
        return self.tree


def test_tokens_that_a_model_runs_its_towers_for_are_not_tried() -> None:
    """Phi-4-multimodal looks for pictures wherever such a token stands, and has none behind the prompt."""
    sizes = TEXT | {"max_position_embeddings": 512, "original_max_position_embeddings": 512}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower |= {"image_size": 16, "patch_size": 4, "crop_size": 16, "feature_layer": -2, "image_token_id": 95}
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}
    config = tf.Phi4MultimodalConfig(**sizes, vision_config=tower, audio_config=audio | {"audio_token_id": 94})
    model = make(tf.Phi4MultimodalForCausalLM, config)
    ids = torch.tensor([[1, 5, *[95] * 13, 7, 8]])
    pixels = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "suppress_tokens": [94, 95]}
    settings |= {"image_pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]])}
    settings["image_attention_mask"] = torch.ones(1, 2, 4, 4, dtype=torch.long)
    assert_equal_to_plain(model, settings, Mistaken([9, 95, 94, 94], [-1, 0, 0, 1]))
    # By the first of them a draft knows where pictures are.
    assert MSDConfig.from_target(config).visual_token_ids == [95]


@pytest.mark.parametrize("parents", [[-1, 0, 1, 2], [0, 0, 1, 2], [-1, 2, 1, 3], [3, 0, 3, 0], [-1, 1, 9, 0]], ids=str)
def test_trees_that_cannot_be_change_no_token(parents: list[int]) -> None:
    target = llama()
    first = generate(target, prompt(), max_new_tokens=3)[0, 12:].tolist()
    for token_ids in ([9, 4, 4, 4], [first[0], *first]):
        assert_equal_to_plain(target, prompt(), Mistaken(token_ids, parents))


# -- scores


class Spoiling:
    """Makes the scores of a step what no token can be sampled from."""

    def __init__(self, kind: str, length: int) -> None:
        self.kind, self.length = kind, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self.length:
            return scores
        if self.kind == "nothing left":
            return torch.full_like(scores, float("-inf"))
        return scores.index_fill(1, torch.tensor(3), float(self.kind))


@pytest.mark.parametrize("kind", ["nan", "inf", "nothing left"])
@pytest.mark.parametrize("draft_seed", [0, 1], ids=["right", "wrong"])
def test_sampling_raises_where_plain_sampling_does(kind: str, draft_seed: int) -> None:
    target, settings = llama(), {"do_sample": True, "top_k": 0, "logits_processor": [Spoiling(kind, 17)]}
    for assistant in (None, VLMDrafter(llama(draft_seed), tree_config=TREE)):
        with pytest.raises(RuntimeError):
            generate(target, prompt(), **settings, assistant_model=assistant)


@pytest.mark.parametrize("draft_seed", [0, 1], ids=["right", "wrong"])
def test_sampling_raises_where_a_head_says_nan(draft_seed: int) -> None:
    target, draft = llama(), llama(draft_seed)
    target.lm_head.weight.data[3] = float("nan")
    for assistant in (None, VLMDrafter(draft, tree_config=TREE)):
        with pytest.raises(RuntimeError):
            generate(target, prompt(), do_sample=True, top_k=0, assistant_model=assistant)
