"""Static caches and compiled drafting: the same tokens, shapes that do not change, and nothing left behind."""

import shutil
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import CompileConfig
from zoo import ARCHITECTURES, make_draft_model, make_inputs, make_target

from transformers_msd import (
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    StaticRuntime,
    TextOnly,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.compat import CACHE


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
SHAPED = TreeConfig(topology=[[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0]], gate=False)
PRUNED = TreeConfig(num_nodes=8, depth=3, top_k=3, min_probability=0.02, gate=False)


class Counting:
    """A backend of `torch.compile` that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __deepcopy__(self, memo: dict) -> "Counting":
        return self

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        self.num_graphs += 1
        return graph.forward


def make_msd(target: torch.nn.Module, tree: TreeConfig = TREE) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = tree
    return draft


def make_drafter(name: str, target: torch.nn.Module, architecture: str) -> Any:
    if name == "msd":
        return make_msd(target)
    if name in ("msd_pruned", "msd_shaped"):
        return make_msd(target, PRUNED if name == "msd_pruned" else SHAPED)
    if name == "vlm":
        return VLMDrafter(make_draft_model(architecture), tree_config=PRUNED)
    return EnsembleDrafter(make_draft_model(architecture), tree_config=TREE)


def generate(target: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return target.generate(**inputs, **{"max_new_tokens": 20, "return_dict_in_generate": True} | kwargs)


def compiled_by(backend: Any) -> CompileConfig:
    return CompileConfig(backend=backend, mode=None, fullgraph=True)


CASES = [
    *((architecture, "msd") for architecture in ARCHITECTURES),
    *(("llava", drafter) for drafter in ("msd_pruned", "msd_shaped", "vlm", "ensemble")),
    ("qwen2_vl", "vlm"),
]
# As on the fields of one colour of a chessboard each is tried alone and in a batch, greedy and sampled in each run.
CELLS = [
    pytest.param(
        *(*case, num_images, do_sample),
        id="-".join((*case, "one" if num_images == (1,) else "batch", str(do_sample))),
        marks=pytest.mark.slow if (place + len(num_images) // 2 + do_sample) % 2 else (),
    )
    for place, case in enumerate(CASES)
    for num_images in ((1,), (2, 0, 1))
    for do_sample in (False, True)
]


@pytest.mark.parametrize(("architecture", "drafter", "num_images", "do_sample"), CELLS)
def test_tokens_on_fixed_shapes_equal_plain_generate(
    architecture: str, drafter: str, num_images: tuple[int, ...], do_sample: bool
) -> None:
    target = make_target(architecture)
    inputs = make_inputs(architecture, num_images)
    assistant = make_drafter(drafter, target, architecture)
    runtime = StaticRuntime(assistant)
    plain = generate(target, inputs, do_sample=do_sample)
    eager = generate(target, inputs, do_sample=do_sample, assistant_model=assistant)
    for call in (
        {"assistant_model": assistant, "cache_implementation": "static"},
        {"assistant_model": runtime, "disable_compile": True},
        {"assistant_model": runtime, "disable_compile": True, "cache_implementation": "static"},
    ):
        drafted = generate(target, inputs, do_sample=do_sample, **call)
        assert torch.equal(drafted.sequences, plain.sequences)
        # The same trees, too: fixed shapes only add fillers.
        ours, theirs = drafted.speculative_stats, eager.speculative_stats
        assert torch.equal(ours.acceptance_lengths, theirs.acceptance_lengths)
    assert runtime.num_captures == 0


@pytest.mark.parametrize(
    ("architecture", "drafter", "num_images"), [("llava", "msd", (2, 0, 1)), ("qwen2_vl", "vlm", (1,))]
)
def test_compiled_tokens_equal_plain_generate(architecture: str, drafter: str, num_images: tuple[int, ...]) -> None:
    target = make_target(architecture)
    inputs = make_inputs(architecture, num_images)
    runtime = StaticRuntime(make_drafter(drafter, target, architecture))
    backend = Counting()
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    for kwargs in ({"do_sample": False}, sampled, sampled | {"temperature": 0.7}):
        plain = generate(target, inputs, **kwargs)
        for cache in (None, "static"):
            call = kwargs | {"cache_implementation": cache, "compile_config": compiled_by(backend)}
            drafted = generate(target, inputs, assistant_model=runtime, **call)
            assert torch.equal(drafted.sequences, plain.sequences)
            assert type(drafted[CACHE]) is (DynamicCache if cache is None else StaticCache)
    assert backend.num_graphs == runtime.num_captures > 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_tokens_compiled_by_inductor_equal_plain_generate() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava")
    runtime = StaticRuntime(make_msd(target, TreeConfig(num_nodes=4, depth=2, top_k=2, gate=False)))
    call = {"compile_config": compiled_by("inductor"), "cache_implementation": "static", "assistant_model": runtime}
    assert torch.equal(generate(target, inputs, **call).sequences, generate(target, inputs).sequences)
    assert runtime.num_captures > 1


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llava", "qwen2_vl"])
def test_tokens_of_cuda_graphs_equal_plain_generate(architecture: str) -> None:
    target = make_target(architecture, "sdpa", "cuda")
    inputs = {name: values.cuda() for name, values in make_inputs(architecture, (2, 0, 1)).items()}
    msd = make_msd(target).cuda()
    for assistant in (msd, VLMDrafter(make_draft_model(architecture, "cuda"), tree_config=PRUNED)):
        runtime = StaticRuntime(assistant)
        for kwargs in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}):
            plain = generate(target, inputs, **kwargs)
            for cache in (None, "static"):
                call = kwargs | {"assistant_model": runtime, "cache_implementation": cache}
                for _ in range(3):  # warmed up, recorded, replayed
                    assert torch.equal(generate(target, inputs, **call).sequences, plain.sequences)


def test_prompts_of_all_lengths_in_two_threads_compile_once() -> None:
    target = make_target("llava")
    backend = Counting()
    runtime = StaticRuntime(make_msd(target))
    call = {"assistant_model": runtime, "cache_implementation": "static", "compile_config": compiled_by(backend)}
    generate(target, make_inputs("llava"), **call)
    num_captures, num_graphs = runtime.num_captures, backend.num_graphs
    wrong: list[int] = []

    def answer(numbers: range) -> None:
        for number in numbers:
            inputs = make_inputs("llava", seed=number, lengths=(12 + number,))
            settings = {"max_new_tokens": 3 + number % 7, "do_sample": False}
            drafted = target.generate(**inputs, **settings, **call)
            if not torch.equal(drafted, target.generate(**inputs, **settings)):
                wrong.append(number)

    answer(range(50))
    threads = [threading.Thread(target=answer, args=(range(first, 50, 5),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (runtime.num_captures, backend.num_graphs) == (num_captures, num_graphs)


def test_a_cache_that_runs_full_doubles() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava", lengths=(505,))
    runtime = StaticRuntime(make_msd(target))
    backend = Counting()
    call = {"cache_implementation": "static", "compile_config": compiled_by(backend), "max_new_tokens": 12}
    plain = generate(target, inputs, max_new_tokens=12)
    drafted = generate(target, inputs, assistant_model=runtime, **call)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert backend.num_graphs == runtime.num_captures


def test_a_runtime_in_use_drafts_eagerly() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava")
    runtime = StaticRuntime(make_msd(target))
    assert runtime.lock.acquire(blocking=False)
    for cache in (None, "static"):
        drafted = generate(target, inputs, assistant_model=runtime, cache_implementation=cache)
        assert torch.equal(drafted.sequences, generate(target, inputs).sequences)
    assert runtime.num_captures == 0
    runtime.lock.release()
    generate(target, inputs, assistant_model=runtime, compile_config=compiled_by("eager"))
    assert runtime.num_captures > 0
    runtime.free()
    assert runtime.num_captures == 0


def test_what_an_earlier_call_left_behind_is_not_read() -> None:
    target = make_target("llava")
    runtime = StaticRuntime(make_msd(target))
    call = {"cache_implementation": "static", "disable_compile": True, "assistant_model": runtime}
    generate(target, make_inputs("llava"), **call)
    for buffers in runtime.captured.buffers.values():
        for buffer in buffers.values():
            buffer.fill_(float("nan") if buffer.is_floating_point() else -1)
    inputs = make_inputs("llava", seed=3)
    eager = generate(target, inputs, assistant_model=runtime.assistant)
    drafted = generate(target, inputs, **call)
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)
    assert torch.equal(drafted.speculative_stats.acceptance_lengths, eager.speculative_stats.acceptance_lengths)


def test_a_returned_static_cache_is_the_callers() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava", (1, 2))
    runtime = StaticRuntime(make_msd(target))
    call = {"cache_implementation": "static", "disable_compile": True}
    plain = generate(target, inputs, **call)[CACHE]
    cache = generate(target, inputs, assistant_model=runtime, **call)[CACHE]
    kept = [layer.keys.clone() for layer in cache.layers]
    generate(target, make_inputs("llava", (1, 2), seed=3), assistant_model=runtime, **call)
    for layer, keys, plain_layer in zip(cache.layers, kept, plain.layers, strict=True):
        assert type(layer) is StaticLayer
        assert torch.equal(layer.keys, keys)
        assert layer.get_seq_length() == plain_layer.get_seq_length()
        torch.testing.assert_close(layer.keys, plain_layer.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("drafter", ["msd", "vlm"])
def test_a_second_turn_goes_on_from_a_static_cache(drafter: str) -> None:
    target = make_target("llava")
    inputs = make_inputs("llava")
    runtime = StaticRuntime(make_drafter(drafter, target, "llava"))

    def converse(**call: Any) -> list[Any]:
        cache = StaticCache(config=target.config.get_text_config(), max_cache_len=128)
        first = generate(target, inputs, **{CACHE: cache}, **call)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        second = generate(target, {"input_ids": ids}, **{CACHE: first[CACHE]}, **call)
        return [first, second]

    plain = converse()
    drafted = converse(assistant_model=runtime, disable_compile=True)
    dynamic = generate(target, inputs, assistant_model=runtime.assistant)
    for ours, theirs in zip(drafted, plain, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(dynamic.sequences, plain[0].sequences)


def test_a_static_cache_without_room_is_refused() -> None:
    target = make_target("llava")
    cache = StaticCache(config=target.config.get_text_config(), max_cache_len=24)
    with pytest.raises(ValueError, match="max_cache_len"):
        generate(target, make_inputs("llava"), **{CACHE: cache}, assistant_model=make_msd(target))


def test_an_error_leaves_the_callers_cache_as_it_was_made() -> None:
    target = make_target("llava")
    cache = StaticCache(config=target.config.get_text_config(), max_cache_len=128)

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("enough")

    runtime = StaticRuntime(make_msd(target))
    with pytest.raises(RuntimeError, match="enough"):
        generate(target, make_inputs("llava"), **{CACHE: cache}, assistant_model=runtime, stopping_criteria=[fail])
    assert {type(layer) for layer in cache.layers} == {StaticLayer}
    assert not runtime.lock.locked()


def test_compilation_follows_the_call() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava")
    backend = Counting()
    config = compiled_by(backend)
    config._compile_all_devices = True
    generation_config = GenerationConfig(max_new_tokens=8, cache_implementation="static", compile_config=config)
    tokens = target.generate(**inputs, generation_config=generation_config, assistant_model=make_msd(target))
    assert torch.equal(tokens, target.generate(**inputs, max_new_tokens=8))
    num_graphs = backend.num_graphs
    assert num_graphs > 1
    # The second call finds what the first compiled.
    target.generate(**inputs, generation_config=generation_config, assistant_model=make_msd(target))
    assert backend.num_graphs == num_graphs


def test_views_of_several_models_are_captured() -> None:
    target = make_target("llava")
    inputs = make_inputs("llava", (1, 1))
    drafter = EnsembleDrafter([make_draft_model("llava")] * 2, ("multimodal", TextOnly()), tree_config=TREE)
    runtime = StaticRuntime(drafter)
    drafted = generate(target, inputs, assistant_model=runtime, compile_config=compiled_by("eager"))
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)
    eager = generate(target, inputs, assistant_model=drafter)
    assert torch.equal(drafted.speculative_stats.acceptance_lengths, eager.speculative_stats.acceptance_lengths)
