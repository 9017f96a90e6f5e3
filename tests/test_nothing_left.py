"""A call leaves nothing behind: no hook on a model, a true cache and generator whatever ends it, copies that work."""

import copy
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import Oracle
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import output_capturing
from zoo import ARCHITECTURES, READ_EMBEDS, VOCAB_SIZE, make_draft_model, make_inputs, make_target

from transformers_msd import (
    CallInputs,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    StaticRuntime,
    Target,
    TreeCandidateGenerator,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.compat import CACHE
from transformers_msd.drafters.base import models_of
from transformers_msd.drafters.wrapped import Wrapped
from transformers_msd.target.capturing import FLAG
from transformers_msd.trees.noise import NoiseTape


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
NUM_TOKENS = 16


def make_msd(target: PreTrainedModel) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TREE
    return draft


ASSISTANTS: dict[str, Callable[[str, PreTrainedModel], Any]] = {
    "msd": lambda architecture, target: make_msd(target),
    "vlm": lambda architecture, target: VLMDrafter(never_run(make_draft_model(architecture)), tree_config=TREE),
    "ensemble": lambda architecture, target: EnsembleDrafter(
        never_run(make_draft_model(architecture)), tree_config=TREE
    ),
    "runtime": lambda architecture, target: StaticRuntime(make_msd(target)),
}


def never_run(model: PreTrainedModel) -> PreTrainedModel:
    """A twin of a model that no test has run: plain calls with pictures leave hooks, too."""
    twin = type(model)(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def fresh_target(architecture: str = "llava") -> PreTrainedModel:
    return never_run(make_target(architecture))


def generate(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True, "disable_compile": True}
    return target.generate(**inputs, **settings | kwargs)


def hooks_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, hook) for name, module in model.named_modules() for hook in module._forward_hooks.values()]


def flags_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if FLAG in vars(module)]


def num_hidden_states(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers + 1


# -- hooks


@pytest.mark.parametrize("kind", ASSISTANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_are_as_before(architecture: str, kind: str) -> None:
    if kind == "ensemble" and architecture not in READ_EMBEDS:
        pytest.skip("its `generate` takes no `inputs_embeds`")
    target, inputs = fresh_target(architecture), make_inputs(architecture)
    assistant = ASSISTANTS[kind](architecture, target)
    drafted = generate(target, inputs, assistant_model=assistant)
    for model in (target, *models_of(assistant)):
        assert hooks_of(model) == flags_of(model) == []
    # A flag without hooks would give no hidden states.
    states = target(input_ids=drafted.sequences, output_hidden_states=True).hidden_states
    assert len(states) == num_hidden_states(target)
    assert all(state is not None for state in states)


def test_hooks_that_were_there_before_stay() -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    target(**inputs, output_hidden_states=True)
    seen: list[nn.Module] = []
    target.model.language_model.layers[0].register_forward_hook(lambda module, args, output: seen.append(module))
    hooks, flags = hooks_of(target), flags_of(target)
    assert len(hooks) > 2
    generate(target, inputs, assistant_model=make_msd(target))
    assert (hooks_of(target), flags_of(target)) == (hooks, flags)
    assert seen
    assert len(target(**inputs, output_hidden_states=True).hidden_states) == num_hidden_states(target)


def test_hooks_come_back_for_the_next_call_as_they_were() -> None:
    """Code that was compiled with them must be found again."""
    target, inputs = fresh_target(), make_inputs("llava")
    seen = []
    for _ in range(3):
        criterion = lambda *args: seen.append(hooks_of(target)) or torch.tensor([False])  # noqa: E731
        generate(target, inputs, assistant_model=make_msd(target), stopping_criteria=[criterion])
    assert seen[0]
    assert all(hooks == seen[0] for hooks in seen)


def test_a_layer_that_was_replaced_is_hooked_anew() -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    generate(target, inputs, assistant_model=make_msd(target))
    layers = target.model.language_model.layers
    layers[0] = copy.deepcopy(layers[0])
    drafted = generate(target, inputs, assistant_model=make_msd(target))
    assert hooks_of(target) == []
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)


class Meeting:
    """Two threads, the second of which does something while the first waits inside its call."""

    def __init__(self) -> None:
        self.reached, self.done = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.done.wait(30)


class Waiting(BaseStreamer):
    """Waits at a step of the call."""

    def __init__(self, meeting: Meeting, step: int = 2) -> None:
        self.meeting, self.step = meeting, step

    def put(self, value: torch.Tensor) -> None:
        self.step -= 1
        if self.step == 0:
            self.meeting.wait()

    def end(self) -> None:
        pass


def run_in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


@pytest.mark.parametrize("is_second", [False, True], ids=["first call", "later call"])
def test_a_forward_in_another_thread_keeps_the_hooks_it_relies_on(is_second: bool) -> None:
    """It begins while a call of ours has the model hooked, and ends after that call."""
    target, inputs = fresh_target(), make_inputs("llava")
    draft = make_msd(target)
    if is_second:
        generate(target, inputs, assistant_model=draft)
    call, forward = Meeting(), Meeting()
    caller, drafted = run_in_thread(
        lambda: generate(target, inputs, assistant_model=draft, streamer=Waiting(call), return_dict_in_generate=False)
    )
    assert call.reached.wait(30)
    blocked = target.model.language_model.layers[1].register_forward_pre_hook(
        lambda module, args: forward.wait() if threading.current_thread() is reader else None
    )
    reader = threading.Thread(target=lambda: states.append(target(**inputs, output_hidden_states=True).hidden_states))
    states: list[Any] = []
    reader.start()
    assert forward.reached.wait(30)
    call.done.set()
    caller.join()
    forward.done.set()
    reader.join()
    blocked.remove()
    assert torch.equal(drafted[0], generate(target, inputs).sequences)
    assert len(states[0]) == num_hidden_states(target)
    # As if the forward had run alone: its hooks are the user's, and work.
    assert len(target(**inputs, output_hidden_states=True).hidden_states) == num_hidden_states(target)
    assert hooks_of(target)


class Blocking(OrderedDict[int, Any]):
    """Hooks of a module that wait for a meeting before one is taken off."""

    def __init__(self, hooks: dict[int, Any], meeting: Meeting) -> None:
        super().__init__(hooks)
        self.meeting = meeting

    def pop(self, *args: Any) -> Any:
        self.meeting.wait()
        return super().pop(*args)


def assert_in_order(target: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Transformers' own capturing works, with one hook for each name."""
    assert len(target(**inputs, output_hidden_states=True).hidden_states) == num_hidden_states(target)
    names = [name for name, _ in hooks_of(target)]
    assert len(set(names)) == len(names) > 0
    assert torch.equal(generate(target, inputs).sequences, generate(make_target("llava"), inputs).sequences)


@pytest.mark.parametrize("place", ["vision_tower.encoder", "language_model"])
def test_a_picture_in_another_thread_keeps_the_hooks_of_its_tower(place: str) -> None:
    """Plain `generate` is in the vision tower when the first drafted call, which has come as far or further, ends."""
    target, inputs = fresh_target(), make_inputs("llava")
    draft, call, picture = make_msd(target), Meeting(), Meeting()

    def wait_at(layers: nn.Module, thread: threading.Thread, meeting: Meeting) -> None:
        layers[0].register_forward_pre_hook(
            lambda *args: meeting.wait() if threading.current_thread() is thread else None
        )

    said: list[torch.Tensor] = []
    caller = threading.Thread(target=lambda: generate(target, inputs, assistant_model=draft, max_new_tokens=1))
    reader = threading.Thread(target=lambda: said.append(generate(target, inputs).sequences))
    wait_at(target.model.get_submodule(place).layers, caller, call)
    wait_at(target.model.vision_tower.encoder.layers, reader, picture)
    for thread, meeting in ((caller, call), (reader, picture)):
        thread.start()
        assert meeting.reached.wait(30)
    for thread, meeting in ((caller, call), (reader, picture)):
        meeting.done.set()
        thread.join()
    assert torch.equal(said[0], generate(make_target("llava"), inputs).sequences)
    assert_in_order(target, inputs)


def test_a_call_begins_while_transformers_hooks_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    draft, meeting, call = make_msd(target), Meeting(), Meeting()
    generate(target, inputs, assistant_model=draft)  # its hooks are kept for the next call
    install = output_capturing.install_output_capuring_hook

    def slowly(*args: Any) -> None:
        install(*args)
        if threading.current_thread() is reader and not meeting.reached.is_set():
            meeting.wait()

    monkeypatch.setattr(output_capturing, "install_output_capuring_hook", slowly)
    states: list[Any] = []
    reader = threading.Thread(target=lambda: states.append(target(**inputs, output_hidden_states=True).hidden_states))
    reader.start()
    assert meeting.reached.wait(30)
    caller, drafted = run_in_thread(
        lambda: generate(target, inputs, assistant_model=draft, streamer=Waiting(call), return_dict_in_generate=False)
    )
    call.reached.wait(1)  # in vain: it waits for Transformers
    meeting.done.set()
    reader.join()
    call.done.set()
    caller.join()
    assert len(states[0]) == num_hidden_states(target)
    assert torch.equal(drafted[0], generate(make_target("llava"), inputs).sequences)
    assert_in_order(target, inputs)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_begins_while_a_call_takes_its_hooks(layer: int) -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    draft, call, taking = make_msd(target), Meeting(), Meeting()
    caller, _ = run_in_thread(
        lambda: generate(target, inputs, assistant_model=draft, streamer=Waiting(call), return_dict_in_generate=False)
    )
    assert call.reached.wait(30)
    module = target.model.language_model.layers[layer]
    module._forward_hooks = Blocking(module._forward_hooks, taking)
    call.done.set()
    assert taking.reached.wait(30)
    reader, states = run_in_thread(lambda: target(**inputs, output_hidden_states=True).hidden_states)
    reader.join(1)  # it waits for the call
    taking.done.set()
    for thread in (caller, reader):
        thread.join()
    assert len(states[0]) == num_hidden_states(target)
    assert_in_order(target, inputs)


def test_the_last_of_several_calls_takes_the_hooks() -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    settings = {"assistant_model": make_msd(target), "output_hidden_states": True}
    plain = generate(target, inputs, output_hidden_states=True)
    target = fresh_target()
    meeting = Meeting()
    caller, drafted = run_in_thread(lambda: generate(target, inputs, **settings, streamer=Waiting(meeting)))
    assert meeting.reached.wait(30)
    generate(target, inputs, **settings)
    assert hooks_of(target)
    meeting.done.set()
    caller.join()
    assert hooks_of(target) == flags_of(target) == []
    for ours, theirs in zip(drafted[0].hidden_states, plain.hidden_states, strict=True):
        for state, plain_state in zip(ours, theirs, strict=True):
            torch.testing.assert_close(state, plain_state, atol=1e-4, rtol=1e-4)


def test_forwards_and_calls_in_threads_get_all_hidden_states() -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    draft, wrong, stop = make_msd(target), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if len(target(**inputs, output_hidden_states=True).hidden_states) != num_hidden_states(target):
                wrong.append("forward")

    def call() -> None:
        for _ in range(30):
            outputs = generate(target, inputs, assistant_model=draft, output_hidden_states=True, max_new_tokens=3)
            if any(len(states) != num_hidden_states(target) for states in outputs.hidden_states):
                wrong.append("call")

    reader, callers = threading.Thread(target=read), [threading.Thread(target=call) for _ in range(2)]
    for thread in (reader, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong


# -- what ends a call


class Stop(Exception):
    """What a user's code raises."""


class Raising(Wrapped):
    """Raises in its second round, or before the first."""

    def __init__(self, assistant: Any, error: type[BaseException], rounds: int = 2) -> None:
        super().__init__(assistant)
        self.error, self.rounds = error, rounds

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        if not self.rounds:
            raise self.error
        candidates = super().candidate_generator(target, inputs)
        draft, left = candidates.draft, iter(range(self.rounds))

        def raising(committed: Any) -> Any:
            if next(left, None) is None:
                raise self.error
            return draft(committed)

        candidates.draft = raising
        return candidates


def raise_at(step: int, error: type[BaseException] = Stop) -> Callable[..., Any]:
    """A processor or criterion that raises when it is called for the `step`-th time."""
    calls = iter(range(step - 1))

    def called(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise error
        return scores

    return called


def never(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(len(input_ids), dtype=torch.bool)


class RaisingCriterion:
    def __init__(self, step: int, error: type[BaseException] = Stop) -> None:
        self.check = raise_at(step, error)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.check(input_ids, scores)
        return never(input_ids, scores)


class RaisingStreamer(BaseStreamer):
    def __init__(self, step: int) -> None:
        self.steps = iter(range(step))

    def put(self, value: torch.Tensor) -> None:
        if next(self.steps, None) is None:
            raise Stop

    def end(self) -> None:
        pass


# What ends the call, and after how many tokens plain decoding is ended by the same, where it is.
ENDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a processor": lambda assistant: {"logits_processor": [raise_at(5)]},
    "the first processor": lambda assistant: {"logits_processor": [raise_at(1)]},
    "a criterion": lambda assistant: {"stopping_criteria": [RaisingCriterion(6)]},
    "a criterion, by Ctrl-C": lambda assistant: {"stopping_criteria": [RaisingCriterion(7, KeyboardInterrupt)]},
    "a streamer": lambda assistant: {"streamer": RaisingStreamer(6)},
    "a draft": lambda assistant: {"assistant_model": Raising(assistant, Stop)},
    "a draft, by Ctrl-C": lambda assistant: {"assistant_model": Raising(assistant, KeyboardInterrupt)},
    "a draft before it drafts": lambda assistant: {"assistant_model": Raising(assistant, Stop, 0)},
}
CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda target: DynamicCache(config=target.config.get_text_config()),
    "static": lambda target: StaticCache(config=target.config.get_text_config(), max_cache_len=64),
}


def assistants_for_an_end(kind: str, target: PreTrainedModel, truth: torch.Tensor) -> Iterator[Any]:
    """A draft that is mostly wrong, and one that is right, so that calls end inside a block."""
    if kind == "runtime":
        yield StaticRuntime(make_msd(target))
        yield StaticRuntime(Oracle(truth, VOCAB_SIZE, error_rate=0.1))
    else:
        yield make_msd(target)
        yield Oracle(truth, VOCAB_SIZE, error_rate=0.1)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_images", [(1,), (2, 0, 1)], ids=["one", "batch"])
@pytest.mark.parametrize("kind", ["eager", "runtime"])
@pytest.mark.parametrize("cache_kind", CACHES)
@pytest.mark.parametrize("end", ENDS)
def test_the_cache_and_the_generator_are_true_whatever_ends_a_call(
    end: str, cache_kind: str, kind: str, num_images: tuple[int, ...], do_sample: bool
) -> None:
    target, inputs = make_target("llava"), make_inputs("llava", num_images)
    prompt_length = inputs["input_ids"].shape[1]
    plain = generate(target, inputs, do_sample=do_sample, max_new_tokens=30).sequences
    for assistant in assistants_for_an_end(kind, target, plain[:, prompt_length:]):
        cache = CACHES[cache_kind](target)
        layers = list(cache.layers)
        call = {"assistant_model": assistant, CACHE: cache, "do_sample": do_sample} | ENDS[end](assistant)
        with pytest.raises((Stop, KeyboardInterrupt)):
            generate(target, inputs, **call)
        assert {type(layer) for layer in cache.layers} == {
            {"dynamic": DynamicLayer, "static": StaticLayer}[cache_kind]
        }
        if cache_kind == "static":
            assert cache.layers == layers
        num_columns = int(cache.get_seq_length())
        assert num_columns >= prompt_length
        assert "_speculative_state" not in vars(cache)
        # The generator stands where plain sampling stands after some complete steps, no fewer than the cache has.
        if do_sample:
            after = torch.get_rng_state()
            torch.manual_seed(0)
            rows = (len(plain), VOCAB_SIZE)
            states = [torch.get_rng_state()]
            for _ in range(NUM_TOKENS):
                torch.empty(rows).exponential_(1)
                states.append(torch.get_rng_state())
            (num_steps,) = [step for step, state in enumerate(states) if torch.equal(after, state)]
            assert num_columns <= prompt_length + max(num_steps - 1, 0)
        # Going on from there, the target says what it would have said.
        if not do_sample:
            turn = {"input_ids": plain[:, : num_columns + 1]}
            turn["attention_mask"] = nn.functional.pad(
                inputs["attention_mask"], (0, num_columns + 1 - prompt_length), value=1
            )
            rest = generate(target, turn, **{CACHE: cache}, max_new_tokens=4).sequences
            assert torch.equal(rest, plain[:, : rest.shape[1]])


def half_filled(cache: DynamicCache) -> DynamicCache:
    layer = cache.layers[1]
    layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
    return cache


def of_two(cache: DynamicCache) -> DynamicCache:
    cache.batch_repeat_interleave(2)
    return cache


@pytest.mark.parametrize(
    ("cache", "ids", "message"),
    [
        (lambda cache: half_filled(cache), slice(None), "same length, got"),
        (lambda cache: of_two(cache), slice(None), "must hold 1 sequences, got"),
        (lambda cache: cache, slice(4), "must go on from the"),
        (lambda cache: tuple(cache.layers), slice(None), "must be a `DynamicCache` or `StaticCache`, got tuple"),
    ],
    ids=["half filled", "of another batch", "longer than the prompt", "no cache"],
)
@pytest.mark.parametrize("kind", ["eager", "runtime"])
def test_a_cache_that_does_not_fit_is_refused_and_kept(
    kind: str, cache: Callable[[Any], Any], ids: slice, message: str
) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    first = generate(target, inputs)
    given = cache(first[CACHE])
    before = copy.deepcopy(given)
    assistant = make_msd(target) if kind == "eager" else StaticRuntime(make_msd(target))
    with pytest.raises(ValueError, match=message):
        generate(target, {"input_ids": first.sequences[:, ids]}, **{CACHE: given}, assistant_model=assistant)
    layers = given if isinstance(given, tuple) else given.layers
    for layer, kept in zip(layers, before if isinstance(before, tuple) else before.layers, strict=True):
        assert type(layer) is DynamicLayer
        assert torch.equal(layer.keys, kept.keys)
        assert torch.equal(layer.values, kept.values)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_same_prompt_again_on_its_own_cache_equals_plain(kind: str) -> None:
    target, inputs = make_target("llama"), make_inputs("llama")
    said = []
    for assistant in (None, make_msd(target)):
        cache = CACHES[kind](target)
        target(**inputs, **{CACHE: cache})
        said.append(generate(target, inputs, **{CACHE: cache}, assistant_model=assistant).sequences)
    assert torch.equal(*said)


@pytest.mark.parametrize(
    "wrong",
    ["folder", MSDDraftModel, VLMDrafter, [1], 3, object()],
    ids=lambda wrong: getattr(wrong, "__name__", type(wrong).__name__),
)
def test_what_is_no_assistant_is_told(wrong: Any) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    with pytest.raises(ValueError, match=r"must be a model, or an object with a method `candidate_generator`, got"):
        generate(target, inputs, assistant_model=wrong)
    with pytest.raises(ValueError, match=r"Expected an `MSDDraftModel` or an object with a method"):
        StaticRuntime(wrong)


@pytest.mark.parametrize("kind", ["eager", "runtime"])
def test_a_refused_static_cache_keeps_its_layers_and_serves_on(kind: str) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    cache = StaticCache(config=target.config.get_text_config(), max_cache_len=24)
    layers = list(cache.layers)
    assistant = make_msd(target) if kind == "eager" else StaticRuntime(make_msd(target))
    with pytest.raises(ValueError, match="max_cache_len"):
        generate(target, inputs, **{CACHE: cache}, assistant_model=assistant)
    assert cache.layers == layers
    assert cache.get_seq_length() == 0  # nothing ran
    plain = generate(target, inputs, max_new_tokens=5).sequences
    assert torch.equal(generate(target, inputs, **{CACHE: cache}, max_new_tokens=5).sequences, plain)


def test_a_draft_without_tokens_is_refused_before_anything_runs() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    draft = MSDDraftModel(MSDConfig.from_target(target.config, draft_vocab_size=20)).eval()
    cache = DynamicCache()
    with pytest.raises(ValueError, match="must be chosen"):
        generate(target, inputs, **{CACHE: cache}, assistant_model=draft)
    assert cache.get_seq_length() == 0


# -- the generator


def test_a_generator_that_others_used_meanwhile_is_left_where_they_left_it() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    drawn: list[float] = []
    states: list[torch.Tensor] = []

    def draw(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        states.append(torch.get_rng_state())
        return never(input_ids, scores)

    generate(target, inputs, assistant_model=make_msd(target), do_sample=True, stopping_criteria=[draw])
    assert torch.equal(torch.get_rng_state(), states[-1])
    drawn += torch.rand(NUM_TOKENS).tolist()
    assert len(set(drawn)) == 2 * NUM_TOKENS  # no number comes twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_number(dtype: torch.dtype) -> None:
    draws = []
    for default in (torch.float32, dtype):
        tape = NoiseTape(1, VOCAB_SIZE, torch.device("cpu"))
        torch.manual_seed(0)
        torch.set_default_dtype(default)
        try:
            tape.open()
            draws.append(tape.at(0))
        finally:
            torch.set_default_dtype(torch.float32)
    assert draws[1].dtype is torch.float32
    assert torch.equal(*draws)


def test_two_threads_that_sample_draw_different_numbers() -> None:
    target, inputs = make_target("llama"), make_inputs("llama")
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 12}
    draft, answers, drawn, stop = make_msd(target), [], [], threading.Event()
    torch.manual_seed(0)

    def sample() -> None:
        for _ in range(15):
            answers.append(tuple(target.generate(**inputs, **settings, assistant_model=draft)[0, -12:].tolist()))

    def draw() -> None:
        while not stop.wait(1e-4):
            drawn.append(float(torch.rand(1, dtype=torch.float64)))

    threads, other = [threading.Thread(target=sample) for _ in range(3)], threading.Thread(target=draw)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert len(set(answers)) == len(answers) == 45
    assert len(drawn) > 45
    assert len(set(drawn)) == len(drawn)


# -- copies


def held_modules(value: Any, seen: set[int] | None = None) -> list[nn.Module]:
    """Modules that an object holds, through attributes, dataclasses and containers."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, str | int | float | bool | type(None) | torch.Tensor | type):
        return []
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return [value]
    parts = (
        list(value.values())
        if isinstance(value, dict)
        else list(vars(value).values())
        if hasattr(value, "__dict__")
        else []
    )
    if isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    return [module for part in parts for module in held_modules(part, seen)]


@pytest.mark.parametrize("kind", ASSISTANTS)
def test_everything_can_be_copied_pickled_and_saved_after_calls(kind: str) -> None:
    target, inputs = fresh_target(), make_inputs("llava")
    assistant = ASSISTANTS[kind]("llava", target)
    drafted = generate(target, inputs, assistant_model=assistant, max_new_tokens=5)
    for value in (target, assistant, drafted[CACHE], drafted):
        torch.save(value, io.BytesIO())
        pickle.dumps(value)
        copy.deepcopy(value)
    twin, other = copy.deepcopy(target), pickle.loads(pickle.dumps(assistant))
    again = generate(twin, inputs, assistant_model=other, max_new_tokens=5)
    assert torch.equal(again.sequences, drafted.sequences)


@pytest.mark.parametrize("copied", ["as it is", "copied", "saved"])
@pytest.mark.parametrize("kind", ASSISTANTS)
def test_a_cache_carries_tensors_and_no_model(kind: str, copied: str) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    assistant = ASSISTANTS[kind]("llava", target)
    first = generate(target, inputs, assistant_model=assistant)
    turn = {"input_ids": torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)}
    plain_cache = generate(target, inputs)[CACHE]
    plain = generate(target, turn, **{CACHE: plain_cache})
    cache = first[CACHE]
    if copied == "copied":
        cache = copy.deepcopy(cache)
    elif copied == "saved":
        cache = pickle.loads(pickle.dumps(cache))
    assert held_modules(cache) == []
    carried = vars(cache)["_speculative_state"].state
    assert (carried is None) == (copied == "saved")
    second = generate(target, turn, **{CACHE: cache}, assistant_model=assistant)
    assert torch.equal(second.sequences, plain.sequences)
    if copied == "copied":
        # The copy goes on as the original does, and neither disturbs the other.
        original = generate(target, turn, **{CACHE: first[CACHE]}, assistant_model=assistant)
        assert torch.equal(original.sequences, plain.sequences)
        lengths = (output.speculative_stats.acceptance_lengths for output in (second, original))
        assert torch.equal(*lengths)


@pytest.mark.parametrize("changed", ["another draft", "a draft that moved", "a draft of more layers"])
def test_a_state_belongs_to_the_models_that_made_it(changed: str) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    draft = make_msd(target)
    first = generate(target, inputs, assistant_model=draft)
    if changed == "another draft":
        draft = MSDDraftModel(MSDConfig.from_target(target.config, num_hidden_layers=2, num_key_value_heads=1)).eval()
        draft.tree_config = TREE
    elif changed == "a draft that moved":
        draft.double()
    else:
        draft.model.layers.append(copy.deepcopy(draft.model.layers[0]))
        draft.model.layers[1].self_attn.layer_idx = 1
        draft.config.get_text_config().num_hidden_layers = 2
    turn = {"input_ids": torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)}
    plain = generate(target, turn, **{CACHE: generate(target, inputs)[CACHE]})
    assert torch.equal(
        generate(target, turn, **{CACHE: first[CACHE]}, assistant_model=draft).sequences, plain.sequences
    )


def crop(cache: StaticCache) -> None:
    """Take 20 columns back, as static layers do it that can."""
    for layer in cache.layers:
        layer.cumulative_length.sub_(20)


@pytest.mark.parametrize("change", [StaticCache.reset, crop], ids=["reset", "cropped"])
def test_a_cache_filled_anew_has_no_state_of_the_old_conversation(change: Callable[[StaticCache], Any]) -> None:
    """It has as many columns as when the state was made, and is the same object."""
    target, inputs = make_target("llama"), make_inputs("llama")
    assistant = VLMDrafter(target, tree_config=TREE)  # a draft that is always right
    cache = StaticCache(config=target.config.get_text_config(), max_cache_len=96)
    first = generate(target, inputs, **{CACHE: cache}, assistant_model=assistant).sequences
    num_columns = int(cache.get_seq_length())
    change(cache)
    others = first.clone()
    others[:, int(cache.get_seq_length()) :] = 7
    filled = generate(
        target, {"input_ids": others[:, : num_columns - 3]}, **{CACHE: cache}, max_new_tokens=4
    ).sequences
    assert int(cache.get_seq_length()) == num_columns
    turn = {"input_ids": torch.cat([filled, torch.tensor([[8, 9, 10]])], dim=1)}
    drafted = generate(target, turn, **{CACHE: cache}, assistant_model=assistant)
    fresh = generate(target, turn, assistant_model=assistant)
    assert torch.equal(drafted.sequences, fresh.sequences)
    assert drafted.speculative_stats.num_accepted == fresh.speculative_stats.num_accepted


@pytest.mark.parametrize("cache_implementation", [None, "static"])
@pytest.mark.parametrize("kind", ["msd", "vlm"])
def test_a_runtime_serves_in_and_out_of_inference_mode(kind: str, cache_implementation: str | None) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    runtime, plain = StaticRuntime(ASSISTANTS[kind]("llava", target)), generate(target, inputs).sequences
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            drafted = generate(target, inputs, assistant_model=runtime, cache_implementation=cache_implementation)
        assert torch.equal(drafted.sequences, plain)


def test_a_copied_runtime_has_compiled_nothing_and_is_free() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    runtime = StaticRuntime(make_msd(target))
    generate(target, inputs, assistant_model=runtime)
    assert runtime.captured.buffers
    with runtime.lock:
        twins = [copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))]
    for twin in twins:
        assert not twin.captured.buffers
        assert not twin.lock.locked()
        drafted = generate(target, inputs, assistant_model=twin)
        assert torch.equal(drafted.sequences, generate(target, inputs).sequences)
    num_bytes = sum(t.nbytes for buffers in runtime.captured.buffers.values() for t in buffers.values())
    assert runtime.free() == num_bytes > 0
    assert runtime.free() == 0
