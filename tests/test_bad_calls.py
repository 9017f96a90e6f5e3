"""Calls that are refused: before anything runs, and with all that is the caller's as it was."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_equality import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from zoo import IMAGE_ID, TEXT, make_draft_model, make_inputs, make_target

from transformers_msd import EnsembleDrafter, MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)


def msd(target: PreTrainedModel) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TREE
    return draft


def vlm(target: PreTrainedModel, **fields: Any) -> VLMDrafter:
    return VLMDrafter(make_draft_model("llava"), tree_config=TREE, **fields)


def ensemble(target: PreTrainedModel, **fields: Any) -> EnsembleDrafter:
    return EnsembleDrafter(make_draft_model("llava"), tree_config=TREE, **fields)


def llama(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT | fields)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return llama(max_position_embeddings=40, rope_parameters=rope)


def llava() -> PreTrainedModel:
    return make_target("llava")


@dataclass
class Turn:
    """The second turn of a talk, on the cache that the first one filled."""

    target: PreTrainedModel
    assistant: Any
    arguments: dict[str, Any]
    cache: Cache


def second_turn(make_model: Callable[[], PreTrainedModel], make_assistant: Callable[..., Any]) -> Turn:
    target = make_model()
    assistant = make_assistant(target)
    inputs = make_inputs("llava" if target is llava() else "llama")
    first = target.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, assistant_model=assistant
    )
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": True}
    return Turn(target, assistant, arguments, first[CACHE])


def uneven(turn: Turn) -> dict[str, Any]:
    cache = copy.deepcopy(turn.cache)
    cache.layers[0].crop(-2)
    return {CACHE: cache}


def of_two(turn: Turn) -> dict[str, Any]:
    cache = copy.deepcopy(turn.cache)
    cache.batch_repeat_interleave(2)
    return {CACHE: cache}


def another_kind(turn: Turn) -> dict[str, Any]:
    return {CACHE: DynamicCache(config=turn.target.config.get_text_config(), offloading=True)}


def too_small(turn: Turn) -> dict[str, Any]:
    return {CACHE: StaticCache(config=turn.target.config.get_text_config(), max_cache_len=20)}


def embeds(turn: Turn) -> dict[str, Any]:
    return {"inputs_embeds": turn.target.get_input_embeddings()(turn.arguments["input_ids"])}


def with_picture(turn: Turn) -> dict[str, Any]:
    """A picture in the second turn."""
    ids = turn.arguments["input_ids"]
    ids = torch.cat([ids[:, :-1], torch.full((1, 4), IMAGE_ID), ids[:, -1:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": make_inputs("llava", seed=3)["pixel_values"],
    }


def other_picture_token() -> VLMDrafter:
    draft = copy.deepcopy(make_draft_model("llava"))
    draft.config.image_token_id = IMAGE_ID - 1
    return VLMDrafter(draft, tree_config=TREE)


# A model and what drafts for it, what is wrong with a call, and what is said.
Refused = tuple[Callable[[], PreTrainedModel], Callable[..., Any], dict[str, Any] | Callable[[Turn], Any], str]
REFUSED: dict[str, Refused] = {
    "beams": (llava, msd, {"num_beams": 2}, "num_beams=1"),
    "contrastive search": (
        llava,
        msd,
        {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False, "trust_remote_code": True},
        "penalty_alpha",
    ),
    "DoLa": (llava, vlm, {"dola_layers": "low"}, "dola_layers"),
    "guidance": (llava, msd, {"guidance_scale": 1.5}, "guidance_scale"),
    "SynthID": (llava, msd, {"watermarking_config": SynthIDTextWatermarkingConfig(5, [1, 2, 3])}, "SynthID"),
    "a stateful processor": (
        llava,
        ensemble,
        lambda turn: {"logits_processor": [UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, turn.target)]},
        "UnbatchedClassifierFreeGuidance",
    ),
    "attentions": (llava, vlm, {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "no cache": (llava, vlm, {"use_cache": False}, "use_cache"),
    "weights of assistants": (llava, msd, {"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    "sharded targets": (llava, ensemble, {"synced_gpus": True}, "synced_gpus"),
    "another tokenizer": (llava, msd, {"assistant_tokenizer": make_tokenizer()}, "assistant_tokenizer"),
    "chunks of two prompts": (llava, msd, lambda turn: embeds(turn) | {"prefill_chunk_size": 2}, "prefill_chunk_size"),
    "two caches": (llava, msd, {"cache": DynamicCache(), "past_key_values": DynamicCache()}, "got both"),
    "a list as cache": (llava, msd, {CACHE: []}, "must be a `DynamicCache` or `StaticCache`, got list"),
    "an offloaded cache": (llava, vlm, another_kind, "offloading"),
    "a cache of two": (llava, ensemble, of_two, "must hold 1 sequences, got .2."),
    "an uneven cache": (llava, msd, uneven, "layers of the cache must have the same length"),
    "a static cache too small": (llava, msd, too_small, "max_cache_len"),
    "a prompt behind its cache": (
        llava,
        msd,
        lambda turn: {name: turn.arguments[name][:, :9] for name in ("input_ids", "attention_mask")},
        "must go on from the .* columns of the cache, got 9",
    ),
    "dynamic rope, MSD": (dynamic, msd, {"max_new_tokens": 40}, "scales with the longest position"),
    "dynamic rope, VLM": (dynamic, vlm, {"max_new_tokens": 40}, "scales with the longest position"),
    "a draft of another width": (
        llava,
        msd,
        lambda turn: {"assistant_model": msd(llama(hidden_size=64))},
        "`hidden_size` 64",
    ),
    "a draft of another vocabulary": (
        llava,
        vlm,
        lambda turn: {"assistant_model": VLMDrafter(llama(vocab_size=2000))},
        "got 2000 tokens for the draft",
    ),
    "a draft of other picture tokens": (
        llava,
        lambda target: VLMDrafter(make_draft_model("llama"), tree_config=TREE),
        lambda turn: with_picture(turn) | {"assistant_model": other_picture_token()},
        "target's tokens for pictures, .90., got .89.",
    ),
    "a draft whose pictures can't be pooled": (
        llava,
        lambda target: EnsembleDrafter(make_draft_model("qwen2_vl"), views=("text_only",), tree_config=TREE),
        lambda turn: (
            with_picture(turn) | {"assistant_model": EnsembleDrafter(make_draft_model("qwen2_vl"), views=("pooled",))}
        ),
        "can be pooled in models of the LLaVA family",
    ),
    "a draft that reads no embeddings": (
        llava,
        vlm,
        lambda turn: embeds(turn) | {"input_ids": None, "attention_mask": None},
        "got no `input_ids`",
    ),
    "prompts of another call": (
        llava,
        lambda target: vlm(target, draft_inputs=make_inputs("llava")),
        lambda turn: {"assistant_model": vlm(turn.target, draft_inputs=make_inputs("llava", (1, 1)))},
        "`draft_inputs` must hold as many prompts as the call, 1, got 2",
    ),
    "a video for views": (
        lambda: make_target("llava_onevision"),
        ensemble,
        {"pixel_values_videos": torch.zeros(1, 2, 3, 8, 8)},
        "got `pixel_values_videos`",
    ),
    "a folder as draft": (llava, msd, {"assistant_model": "folder"}, "`assistant_model` must be a model"),
    "a class as draft": (llava, msd, {"assistant_model": VLMDrafter}, "`assistant_model` must be a model"),
}


def state_of(turn: Turn) -> list[Any]:
    """All that a refused call must leave as it is."""
    models = [turn.target, *getattr(turn.assistant, "models", [turn.assistant])]
    layers = [(type(layer), layer.get_seq_length(), layer.keys, layer.values) for layer in turn.cache.layers]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for model in models for part in model.modules()]
    return [
        torch.get_rng_state(),
        *(part for layer in layers for part in layer),
        vars(turn.cache).get("_speculative_state"),
        turn.target.generation_config.to_dict(),
        *(model.config.to_dict() for model in models),
        *(tensor for model in models for tensor in model.state_dict().values()),
        [vars(model).keys() for model in models],
        [model.training for model in models],
        hooks,
        turn.assistant.tree_config,
    ]


def keep(state: list[Any]) -> list[Any]:
    return [
        part.clone() if torch.is_tensor(part) else copy.deepcopy(part) if isinstance(part, dict) else part
        for part in state
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_leaves_all_as_it_was(name: str) -> None:
    make_model, make_assistant, bad, message = REFUSED[name]
    turn = second_turn(make_model, make_assistant)
    good = turn.arguments | {CACHE: turn.cache, "assistant_model": turn.assistant}
    if callable(bad):
        bad = bad(turn)
    wrong = {argument: value for argument, value in (good | bad).items() if value is not None}
    if "past_key_values" in bad and "cache" in bad:
        wrong |= bad
    torch.manual_seed(7)
    before = keep(state_of(turn))
    ran: list[int] = []
    hooks = [part.register_forward_pre_hook(lambda *args: ran.append(1)) for part in turn.target.modules()]
    with pytest.raises(ValueError, match=message):
        turn.target.generate(**wrong)
    for hook in hooks:
        hook.remove()
    assert not ran
    for then, now in zip(before, state_of(turn), strict=True):
        assert torch.equal(then, now) if torch.is_tensor(then) else then == now
    # And the same call without what was wrong with it is plain.
    plain = turn.target.generate(**turn.arguments, **{CACHE: copy.deepcopy(turn.cache)})
    torch.manual_seed(7)
    assert torch.equal(turn.target.generate(**good), plain)
