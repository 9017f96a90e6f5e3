"""A draft attached to a target serves every call on it, changes no token, and leaves with `detach`."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from oracle import Oracle
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation import GenerationMixin, LogitsProcessor
from zoo import VOCAB_SIZE, make_draft_model, make_inputs, make_target

from transformers_msd import (
    Caption,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    NgramDrafter,
    SpeculativeStats,
    StaticRuntime,
    TreeConfig,
    VLMDrafter,
    attach,
    detach,
)
from transformers_msd.call.stats import observer
from transformers_msd.compat import CACHE
from transformers_msd.drafters import attached


NUM_TOKENS = 20
GREEDY = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
SAMPLED = {"max_new_tokens": NUM_TOKENS, "do_sample": True, "top_k": 0}


def make_msd(architecture: str = "llava") -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(make_target(architecture).config)).eval()
    draft.tree_config = TreeConfig(8, 3, 2, gate=False)
    return draft


def make_oracle(architecture: str = "llava", **inputs: Any) -> Oracle:
    target, inputs = make_target(architecture), inputs or make_inputs(architecture)
    plain = target.generate(**inputs, **GREEDY)
    return Oracle(plain[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE, error_rate=0.1)


def captions(inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """Let the draft say what it sees, by a call of its own."""
    draft = make_draft_model("llava")
    said = draft.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return said.tolist()


DRAFTS: dict[str, Callable[[], Any]] = {
    "oracle": make_oracle,
    "msd": make_msd,
    "vlm": lambda: VLMDrafter(make_draft_model("llava")),
    "ensemble": lambda: EnsembleDrafter(make_draft_model("llava")),
    "captions": lambda: EnsembleDrafter(make_draft_model("llava"), views=["multimodal", Caption(captions)]),
    "ngrams": NgramDrafter,
    "runtime": lambda: StaticRuntime(make_msd()),
}


@pytest.fixture
def target() -> Iterator[PreTrainedModel]:
    target = make_target("llava")
    yield target
    detach(target)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(attached.logger, "warning", found.append)
    return found


def count_forwards(target: PreTrainedModel, run: Callable[[], Any]) -> tuple[Any, int]:
    """Run something, and count the forwards of a target in it."""
    count = 0

    def count_one(*_: Any) -> None:
        nonlocal count
        count += 1

    with target.register_forward_hook(count_one):
        return run(), count


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_observer_is_told_what_a_call_that_returns_tokens_alone_does_not_say(
    batch_size: int, target: PreTrainedModel
) -> None:
    inputs = {name: value.expand(batch_size, *value.shape[1:]) for name, value in make_inputs("llava").items()}
    attach(target, make_oracle(**inputs))
    found: list[SpeculativeStats] = []
    token = observer.set(found.append)
    try:
        tokens = target.generate(**inputs, **GREEDY)
    finally:
        observer.reset(token)
    output = target.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(tokens, output.sequences)
    assert len(found) == 1
    assert found[0].mean_acceptance_length > 1
    expected = vars(output.speculative_stats)
    assert torch.equal(found[0].acceptance_lengths, expected.pop("acceptance_lengths"))
    assert vars(found[0]) == expected | {"acceptance_lengths": found[0].acceptance_lengths}


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_and_generator_are_those_of_a_plain_call(
    name: str, settings: dict[str, Any], target: PreTrainedModel
) -> None:
    inputs, draft = make_inputs("llava"), DRAFTS[name]()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        return target.generate(**inputs, **settings), torch.rand(3)

    plain, plain_forwards = count_forwards(target, run)
    torch.manual_seed(3)
    explicit = target.generate(**inputs, **settings, assistant_model=draft, return_dict_in_generate=True)
    attach(target, draft)
    assisted, forwards = count_forwards(target, run)
    detach(target)
    after, after_forwards = count_forwards(target, run)
    assert all(map(torch.equal, assisted, plain))
    assert all(map(torch.equal, after, plain))
    assert after_forwards == plain_forwards
    # As many rounds as a call that passes the draft, beside the prefill.
    assert forwards == explicit.speculative_stats.num_rounds + 1


def test_a_batch_is_drafted_for(target: PreTrainedModel) -> None:
    inputs = make_inputs("llava", (1, 0, 2))
    draft = make_oracle(**inputs)
    plain, num_plain = count_forwards(target, lambda: target.generate(**inputs, **GREEDY))
    attach(target, draft)
    output, num_assisted = count_forwards(
        target, lambda: target.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    )
    assert torch.equal(output.sequences, plain)
    assert num_assisted < num_plain
    assert output.speculative_stats.mean_acceptance_length > 1.5
    assert len(output.scores) == NUM_TOKENS


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    "no cache": ({"use_cache": False}, "needs the cache"),
    "contrastive guidance": ({"guidance_scale": 1.5}, "guidance"),
    "a setting of Transformers' assistants": ({"num_assistant_tokens": 3}, "num_assistant_tokens"),
    "embeddings alone": ({"inputs_embeds": None}, "inputs_embeds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_is_the_plain_call_and_says_why_once(
    name: str, target: PreTrainedModel, warnings: list[str]
) -> None:
    settings, reason = REFUSED[name]
    # Without a cache, Transformers reads pictures anew at every step, and fails.
    inputs = make_inputs("llava", (0,) if name in ("embeddings alone", "no cache") else (1,))
    if name == "embeddings alone":
        settings = {"inputs_embeds": target.get_input_embeddings()(inputs.pop("input_ids"))}
    settings = GREEDY | settings

    def run(**more: Any) -> torch.Tensor:
        output = target.generate(**inputs, **(settings | more))
        return output if torch.is_tensor(output) else output.sequences

    plain, num_plain = count_forwards(target, run)
    attach(target, VLMDrafter(make_draft_model("llava")))
    output, num_forwards = count_forwards(target, run)
    assert torch.equal(output, plain)
    assert num_forwards == num_plain
    assert torch.equal(run(max_new_tokens=NUM_TOKENS - 3), plain[:, :-3])
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert warnings[0].startswith("LlavaForConditionalGeneration generates without the draft attached to it.")


class Filling(StaticCache):
    """A cache of another class than those that drafting knows."""


def test_a_cache_that_turns_up_late_is_refused_before_anything_runs(
    target: PreTrainedModel, warnings: list[str]
) -> None:
    inputs = make_inputs("llava")
    columns = inputs["input_ids"].shape[1] + NUM_TOKENS
    plain = target.generate(**inputs, **GREEDY)
    attach(target, make_msd())
    cache = Filling(config=target.config.get_text_config(), max_cache_len=columns)
    output, num_forwards = count_forwards(target, lambda: target.generate(**inputs, **GREEDY, **{CACHE: cache}))
    assert torch.equal(output, plain)
    assert num_forwards == NUM_TOKENS
    assert "Filling" in warnings[0]
    # Told apart only once the prompt is known: too short a static cache, on which plain decoding fails, too.
    short = StaticCache(config=target.config.get_text_config(), max_cache_len=columns - NUM_TOKENS)
    with pytest.raises(Exception) as plainly:  # noqa: PT011
        target.generate(**inputs, **GREEDY, **{CACHE: short})
    assert not isinstance(plainly.value, attached.Refusal)
    assert "columns" in warnings[1]


def test_no_other_error_is_swallowed(target: PreTrainedModel) -> None:
    class Broken:
        def candidate_generator(self, *_: Any) -> Any:
            raise ValueError("a fault of the drafter")

    class Unfit(Broken):
        fits = True

        def check_target(self, *_: Any) -> None:
            if not self.fits:
                raise ValueError("another model's draft")

    inputs = make_inputs("llava")
    attach(target, Broken())
    with pytest.raises(ValueError, match="a fault of the drafter"):
        target.generate(**inputs, **GREEDY)
    unfit = Unfit()
    attach(target, unfit)
    unfit.fits = False
    with pytest.raises(ValueError, match="another model's draft"):
        target.generate(**inputs, **GREEDY)
    with pytest.raises(ValueError, match="another model's draft"):
        attach(target, unfit)


def test_what_a_call_passes_comes_first(target: PreTrainedModel, warnings: list[str]) -> None:
    inputs, own, other = make_inputs("llava"), make_oracle(), make_oracle()
    plain = target.generate(**inputs, **GREEDY)
    attach(target, own)
    assert torch.equal(target.generate(**inputs, **GREEDY, assistant_model=other), plain)
    assert other.trees
    assert not own.trees
    text = make_inputs("llava", (0,))  # Transformers' own n-grams read no pictures
    expected = target.generate(**text, **GREEDY, prompt_lookup_num_tokens=3)
    assert not own.trees
    assert torch.equal(expected, target.generate(**text, **GREEDY, assistant_model=make_msd()))
    target.generate(**inputs, **GREEDY)
    assert own.trees
    # One attached later takes its place.
    own.trees.clear()
    other.trees.clear()
    attach(target, other)
    target.generate(**inputs, **GREEDY)
    assert other.trees
    assert not own.trees
    assert not warnings


def test_a_decoding_method_that_was_passed_is_left_alone_and_may_come_back(target: PreTrainedModel) -> None:
    inputs, oracle = make_inputs("llava"), make_oracle()
    plain = target.generate(**inputs, **GREEDY)
    attach(target, oracle)

    def own_way(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return input_ids[:, :3]

    assert target.generate(**inputs, **GREEDY, custom_generate=own_way).shape[1] == 3
    assert not oracle.trees

    def again(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return model.generate(**inputs, **GREEDY)

    assert torch.equal(target.generate(**inputs, **GREEDY, custom_generate=again), plain)
    assert oracle.trees


def test_a_call_inside_a_drafted_one_is_plain(target: PreTrainedModel) -> None:
    inputs, oracle = make_inputs("llava"), make_oracle()
    plain = target.generate(**inputs, **GREEDY)
    inner = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if not inner:
                num_trees = len(oracle.trees)
                inner.append(target.generate(**inputs, **GREEDY))
                assert len(oracle.trees) == num_trees
            return torch.zeros(len(input_ids), dtype=torch.bool)

    attach(target, oracle)
    assert torch.equal(target.generate(**inputs, **GREEDY, stopping_criteria=[Asks()]), plain)
    assert torch.equal(inner[0], plain)
    assert oracle.trees


class Counting(LogitsProcessor):
    """Keeps a state that nobody can see: how often it was called."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        favoured = torch.arange(VOCAB_SIZE) == self.num_calls * 7 % 90
        return torch.where(favoured, scores + 8, scores)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("num_pictures", "is_drafted"), [((1,), True), ((1, 0, 2), False)])
def test_processors_of_others_may_keep_a_state(
    num_pictures: tuple[int, ...],
    is_drafted: bool,
    settings: dict[str, Any],
    target: PreTrainedModel,
    warnings: list[str],
) -> None:
    inputs = make_inputs("llava", num_pictures)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        return target.generate(**inputs, **settings, logits_processor=[Counting()]), torch.rand(3)

    plain = run()
    oracle = Oracle(plain[0][:, inputs["input_ids"].shape[1] :], VOCAB_SIZE)
    attach(target, oracle)
    assert all(map(torch.equal, run(), plain))
    assert bool(oracle.trees) == is_drafted
    assert is_drafted or "got Counting for several sequences" in warnings[0]
    assert len(warnings) == (not is_drafted)


@pytest.mark.parametrize("where", ["criterion", "caption"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_refusal_of_a_call_inside_a_drafted_one_is_raised(
    settings: dict[str, Any], where: str, target: PreTrainedModel, warnings: list[str]
) -> None:
    inputs, small = make_inputs("llava"), make_draft_model("llava")
    num_asked = 0

    def ask(*_: Any) -> None:
        nonlocal num_asked
        num_asked += 1
        small.generate(**inputs, **GREEDY, num_beams=2, assistant_model=NgramDrafter())

    class Asks(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if where == "criterion" and input_ids.shape[1] > inputs["input_ids"].shape[1] + 5:
                ask()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    view = Caption(ask) if where == "caption" else "multimodal"
    attach(target, EnsembleDrafter(small, views=[view]))
    with pytest.raises(ValueError, match="got beam_search"):
        target.generate(**inputs, **settings, stopping_criteria=[Asks()])
    assert num_asked == 1
    assert not warnings


def test_a_draft_may_have_a_draft_of_its_own(target: PreTrainedModel) -> None:
    inputs, small = make_inputs("llava"), make_draft_model("llava")
    plain = target.generate(**inputs, **GREEDY)
    attach(target, DRAFTS["captions"]())
    own = make_oracle()
    attach(small, own)
    try:
        assert torch.equal(target.generate(**inputs, **GREEDY), plain)
        assert not own.trees
    finally:
        detach(small)


def test_detaching_during_a_call_lets_it_end_as_it_began(target: PreTrainedModel) -> None:
    inputs, oracle = make_inputs("llava"), make_oracle()
    plain = target.generate(**inputs, **GREEDY)

    class Detaches(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            detach(target)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    attach(target, oracle)
    output, num_forwards = count_forwards(
        target, lambda: target.generate(**inputs, **GREEDY, stopping_criteria=[Detaches()])
    )
    assert torch.equal(output, plain)
    assert num_forwards < NUM_TOKENS
    oracle.trees.clear()
    target.generate(**inputs, **GREEDY)
    assert not oracle.trees


def test_threads_draft_beside_one_another(target: PreTrainedModel) -> None:
    prompts = [make_inputs("llava", seed=seed) for seed in range(4)]
    plain = [target.generate(**inputs, **GREEDY) for inputs in prompts]
    attach(target, make_msd())
    found: list[Any] = [None] * len(prompts)

    def run(place: int) -> None:
        found[place] = target.generate(**prompts[place], **GREEDY)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, plain))


def test_a_target_is_not_kept_alive_and_carries_nothing_along(tmp_path: Any) -> None:
    target = AutoModelForImageTextToText.from_config(make_target("llava").config).eval()
    names = set(vars(target))
    attach(target, NgramDrafter())
    assert set(vars(target)) == names
    twin = copy.deepcopy(target)
    target.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().keys() == target.config.to_dict().keys()
    assert attached.attachment_of(twin) is None
    gone, before = weakref.ref(target), len(attached._attachments)
    del target
    gc.collect()
    assert gone() is None
    assert len(attached._attachments) == before - 1


def lora(target: PreTrainedModel) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


WRAPPED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "PEFT": lora,
    "torch.compile": torch.compile,
    "module": lambda target: nn.DataParallel(target),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_target_may_be_wrapped(name: str) -> None:
    torch.manual_seed(0)
    target = AutoModelForImageTextToText.from_config(make_target("llava").config).eval()
    target.generation_config.eos_token_id = None
    outer, inputs = WRAPPED[name](target), make_inputs("llava")
    plain = target.generate(**inputs, **GREEDY)
    oracle = Oracle(plain[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE, error_rate=0.1)
    attach(outer, oracle)
    generate = outer.generate if hasattr(outer, "generate") else target.generate
    assert torch.equal(generate(**inputs, **GREEDY), plain)
    assert oracle.trees
    detach(outer)
    oracle.trees.clear()
    assert torch.equal(generate(**inputs, **GREEDY), plain)
    assert not oracle.trees


def test_a_streamer_sees_what_it_would_see(target: PreTrainedModel, warnings: list[str]) -> None:
    class Listening(TextIteratorStreamer):
        def __init__(self) -> None:
            self.heard: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.heard.append(value.flatten().tolist())

        def end(self) -> None:
            self.heard.append([])

    inputs, heard = make_inputs("llava"), []
    for draft, settings in ((None, {}), (make_oracle(), {}), (make_oracle(), {"output_attentions": True})):
        if draft is not None:
            attach(target, draft)
        streamer = Listening()
        target.generate(**inputs, **GREEDY, **settings, streamer=streamer)
        heard.append(streamer.heard)
    assert heard[0] == heard[1] == heard[2]
    assert len(warnings) == 1


def make_narrow_config() -> MSDConfig:
    config = copy.deepcopy(make_target("llava").config)
    config.text_config.hidden_size = 16
    return MSDConfig.from_target(config)


BAD: dict[str, tuple[Any, Any, str]] = {
    "a folder": (lambda: make_target("llava"), lambda: "draft", "`assistant_model` must be a draft"),
    "a model as it is": (lambda: make_target("llava"), lambda: make_draft_model("llava"), "Wrap a model"),
    "no target": (lambda: nn.Linear(2, 2), NgramDrafter, "`target` must be a `PreTrainedModel`"),
    "another target's draft": (
        lambda: make_target("llava"),
        lambda: MSDDraftModel(make_narrow_config()),
        "hidden_size",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_told_at_once(name: str) -> None:
    make_model, make_draft, message = BAD[name]
    target = make_model()
    with pytest.raises(ValueError, match=message) as error:
        attach(target, make_draft())
    assert not isinstance(error.value, attached.Refusal)
    assert attached.attachment_of(target) is None


def test_a_target_whose_generate_hands_on_is_drafted_for_where_it_decodes() -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    assert Blip2ForConditionalGeneration.generate is not GenerationMixin.generate
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=small | {"image_size": 8, "patch_size": 4},
        qformer_config=small | {"encoder_hidden_size": 32, "vocab_size": 32},
        text_config=small | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 64},
        num_query_tokens=4,
        image_token_index=60,
    )
    torch.manual_seed(0)
    target = Blip2ForConditionalGeneration(config).eval()
    inputs = {
        "pixel_values": torch.randn(1, 3, 8, 8),
        "input_ids": torch.tensor([[60, 60, 60, 60, 5, 6, 7]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
    }
    settings = GREEDY | {"eos_token_id": None, "pad_token_id": 0}
    plain = target.generate(**inputs, **settings)
    attach(target, NgramDrafter())
    _, num_forwards = count_forwards(target.language_model, lambda: target.generate(**inputs, **settings))
    assert torch.equal(target.generate(**inputs, **settings), plain)
    assert num_forwards <= NUM_TOKENS
    assert attached.attachment_of(target.language_model) is not None
    detach(target)
    assert attached.attachment_of(target.language_model) is None
