"""Four methods of Transformers are wrapped, can be put back, and pass on all that is not ours."""

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Oracle
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.generation import GenerationMixin
from zoo import TEXT, VOCAB_SIZE, make_draft_model, make_inputs, make_target

import transformers_msd
from transformers_msd import EnsembleDrafter, MSDConfig, MSDDraftModel, StaticRuntime, VLMDrafter, hook


SIGNATURES = {
    "generate": (
        "self, inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, synced_gpus, "
        "assistant_model, streamer, negative_prompt_ids, negative_prompt_attention_mask, custom_generate, kwargs"
    ),
    "_validate_generation_mode": "self, generation_mode, generation_config, generation_mode_kwargs",
    "_assisted_decoding": (
        "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, "
        "inputs_tensor, assistant_model, assistant_tokenizer, tokenizer, model_kwargs"
    ),
    "_sample": (
        "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs"
    ),
    "_prefill": "self, input_ids, generation_config, model_kwargs, is_first_iteration",
    "_optimize_model_for_decode": "self",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_transformers_still_has_the_methods_we_stand_on(name: str) -> None:
    assert ", ".join(inspect.signature(getattr(GenerationMixin, name)).parameters) == SIGNATURES[name]


def make_oracle(target: Any, inputs: dict[str, torch.Tensor]) -> Oracle:
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    return Oracle(plain[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE)


def test_a_generate_put_over_ours_does_not_switch_the_checks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    oracle = make_oracle(target, inputs)
    original, ours = hook._generate, GenerationMixin.generate

    @functools.wraps(original)
    def around_transformers(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    @functools.wraps(ours)
    def around_ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", around_transformers)
    with pytest.raises(ValueError, match="was replaced after"):
        target.generate(**inputs, max_new_tokens=12, assistant_model=oracle)
    monkeypatch.setattr(GenerationMixin, "generate", around_ours)
    target.generate(**inputs, max_new_tokens=12, assistant_model=oracle)
    assert oracle.trees


def test_disable_puts_everything_back_and_enable_takes_it_again() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    oracle = make_oracle(target, inputs)
    ours = {name: vars(GenerationMixin)[name] for name in hook._REPLACED}
    try:
        transformers_msd.disable()
        for name, (original, _) in hook._REPLACED.items():
            assert vars(GenerationMixin)[name] is original
            assert original.__module__ == "transformers.generation.utils"
        with pytest.raises(AttributeError):
            target.generate(**inputs, max_new_tokens=12, assistant_model=oracle)
    finally:
        transformers_msd.enable()
    transformers_msd.enable()
    assert {name: vars(GenerationMixin)[name] for name in hook._REPLACED} == ours
    target.generate(**inputs, max_new_tokens=12, assistant_model=oracle)
    assert oracle.trees


def make_msd() -> MSDDraftModel:
    return MSDDraftModel(MSDConfig.from_target(make_target("llava").config)).eval()


DRAFTS: dict[str, Callable[[], Any]] = {
    "MSD": make_msd,
    "MSD, compiled by hand": lambda: torch.compile(make_msd(), backend="eager"),
    "VLM": lambda: VLMDrafter(make_draft_model("llava")),
    "ensemble": lambda: EnsembleDrafter(make_draft_model("llava")),
    "runtime": lambda: StaticRuntime(make_msd()),
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_says_whose_it_is_where_the_package_is_disabled(name: str, do_sample: bool) -> None:
    draft, target, inputs = DRAFTS[name](), make_target("llava"), make_inputs("llava")
    transformers_msd.disable()
    try:
        with pytest.raises(AttributeError, match="by `transformers_msd` alone: call `transformers_msd.enable"):
            target.generate(**inputs, max_new_tokens=3, do_sample=do_sample, assistant_model=draft)
    finally:
        transformers_msd.enable()


def test_a_model_without_a_head_is_no_assistant() -> None:
    target, headless = make_target("llama"), AutoModel.from_config(LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match="must say tokens, got LlamaModel, which has no head"):
        target.generate(**make_inputs("llama"), max_new_tokens=3, assistant_model=headless)


def test_disable_leaves_what_somebody_wrapped_since(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook.generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", wrapped)
    try:
        transformers_msd.disable()
        assert vars(GenerationMixin)["generate"] is wrapped
        target, inputs = make_target("llava"), make_inputs("llava")
        target.generate(**inputs, max_new_tokens=3)
    finally:
        transformers_msd.enable()


def test_other_assistants_reach_transformers_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llama")
    torch.manual_seed(1)
    assistant = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT | {"num_hidden_layers": 1})).eval()
    inputs = make_inputs("llama")
    calls = {"assistant": {"assistant_model": assistant}, "lookup": {"prompt_lookup_num_tokens": 3}, "plain": {}}
    monkeypatch.setattr(hook, "tree_decoding", lambda *args, **kwargs: pytest.fail("took our path"))
    results = {}
    for name, call in calls.items():
        results[name] = target.generate(**inputs, **call, max_new_tokens=12, do_sample=False)
        transformers_msd.disable()
        try:
            stock = target.generate(**inputs, **call, max_new_tokens=12, do_sample=False)
        finally:
            transformers_msd.enable()
        assert torch.equal(results[name], stock)
    assert torch.equal(results["assistant"], results["plain"])
    with pytest.raises(ValueError, match="num_return_sequences"):
        target.generate(**inputs, assistant_model=assistant, do_sample=True, num_return_sequences=2)


def test_the_assistant_gets_the_arguments_of_the_call() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    oracle = make_oracle(target, inputs)
    seen = {}

    class Curious:
        def candidate_generator(self, target: Any, call_inputs: Any) -> Any:
            seen.update(call_inputs.arguments)
            return oracle.candidate_generator(target, call_inputs)

    input_ids = inputs.pop("input_ids")
    target.generate(input_ids, **inputs, max_new_tokens=12, assistant_model=Curious())
    assert seen["inputs"] is input_ids
    assert seen["pixel_values"] is inputs["pixel_values"]
    assert hook._call.get() is None


def test_import_needs_torch_and_transformers_only() -> None:
    program = """
import sys
for name in ("trl", "datasets", "accelerate", "evaluate", "PIL", "torchvision"):
    sys.modules[name] = None
import transformers_msd
assert callable(transformers_msd.MSDDraftModel.from_pretrained)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
