"""Targets whose layers keep states in place of rows: tokens and caches are plain's, or they are refused."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from oracle import Oracle
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DynamicCache,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Lfm3Config,
    OlmoHybridConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    StoppingCriteria,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation.streamers import BaseStreamer
from zoo import TEXT, VOCAB_SIZE, make_inputs

import transformers_msd.target.stateful as stateful
from training.evidence.targets import answers
from training.evidence.tiny import make_model, make_prompts
from transformers_msd import MSDConfig, MSDDraftModel, StaticRuntime, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.target.probing import states_fact
from transformers_msd.trees.tree import TokenTree


FIELDS = TEXT | {"num_hidden_layers": 3, "tie_word_embeddings": False}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# Some of each kind: convolutions alone, also beside windows, delta rules, Mamba 2, and states and rows in one layer.
CONFIGS = {
    "lfm2": lambda: Lfm2Config(**FIELDS, layer_types=["conv", "full_attention", "conv"]),
    "lfm3": lambda: Lfm3Config(
        **FIELDS, layer_types=["conv", "sliding_attention", "full_attention"], sliding_window=6, head_dim=8
    ),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**FIELDS, **DELTA, layer_types=MIXED, head_dim=8),
    "qwen3_next": lambda: Qwen3NextConfig(
        **FIELDS,
        **DELTA,
        layer_types=MIXED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "olmo_hybrid": lambda: OlmoHybridConfig(**FIELDS, **DELTA, layer_types=MIXED),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **FIELDS, **MAMBA, layer_types=MIXED, mamba_expand=2, num_local_experts=2, shared_intermediate_size=16
    ),
    "bamba": lambda: BambaConfig(**FIELDS, **MAMBA, attn_layer_indices=[1]),
    "falcon_h1": lambda: FalconH1Config(**FIELDS, **MAMBA, mamba_d_ssm=64, num_logits_to_keep=1),
}
# Their states are not those of the same tokens one by one.
OTHER_STATES = {
    "jamba": lambda: JambaConfig(**FIELDS, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(**FIELDS, block_types=["recurrent", "attention"], lru_width=32),
}
NUM_TOKENS = 24
TREE = TreeConfig(num_nodes=10, depth=4, top_k=3, gate=False)


def make(name: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (CONFIGS | OTHER_STATES)[name]()
    vars(config).update(fields)
    target = AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


def make_draft(target: PreTrainedModel, tree: TreeConfig = TREE) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = tree
    return draft


def generate(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True, "disable_compile": True}
    return target.generate(**inputs, **settings | kwargs)


def assert_same_cache(cache: Any, plain: Any) -> None:
    for layer, plain_layer in zip(cache.layers, plain.layers, strict=True):
        assert type(layer) is type(plain_layer)
        if getattr(plain_layer, "keys", None) is not None:
            torch.testing.assert_close(layer.keys, plain_layer.keys, atol=5e-4, rtol=1e-3)
            torch.testing.assert_close(layer.values, plain_layer.values, atol=5e-4, rtol=1e-3)
        if isinstance(plain_layer, LinearAttentionCacheLayerMixin):
            for name in ("conv_states", "recurrent_states"):
                states, plain_states = getattr(layer, name), getattr(plain_layer, name)
                torch.testing.assert_close(states, plain_states, atol=5e-4, rtol=1e-3)


def oracles(truth: torch.Tensor, rates: tuple[float, ...] = (0.0, 0.3, 0.6)) -> list[Oracle]:
    return [Oracle(truth, VOCAB_SIZE, error_rate=rate) for rate in rates]


# As on the fields of one colour of a chessboard each is tried alone and in a batch, greedy and sampled in each run.
CELLS = [
    pytest.param(
        name, lengths, do_sample, marks=pytest.mark.slow if (place + len(lengths) // 2 + do_sample) % 2 else ()
    )
    for place, name in enumerate(CONFIGS)
    for lengths in ((12,), (16, 9, 13))
    for do_sample in (False, True)
]


@pytest.mark.parametrize(("name", "lengths", "do_sample"), CELLS)
def test_tokens_and_caches_are_plain_s(name: str, lengths: tuple[int, ...], do_sample: bool) -> None:
    target = make(name)
    inputs = make_inputs("llama", (0,) * len(lengths), lengths=lengths)
    plain = generate(target, inputs, do_sample=do_sample)
    truth = plain.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(truth.unique()) > 6
    draft = make_draft(target)
    right, *others = oracles(truth)
    for assistant in (right, *others, draft, StaticRuntime(draft)):
        drafted = generate(target, inputs, do_sample=do_sample, assistant_model=assistant)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert_same_cache(drafted[CACHE], plain[CACHE])
        stats = drafted.speculative_stats
        if assistant is right:
            assert stats.mean_acceptance_length > 3
        elif assistant in others:
            assert stats.num_repeated > 0
    # Told apart, or this test could not fail: an answer that is a token shorter leaves other states.
    ids = plain.sequences[:, :-2]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(truth[:, :-2])], dim=1)
    shorter = generate(target, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=1)
    with pytest.raises(AssertionError):
        assert_same_cache(shorter[CACHE], plain[CACHE])


@pytest.mark.gpu
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_caches_are_plain_s_on_cuda(name: str, do_sample: bool) -> None:
    target = make(name).to("cuda")
    inputs = {key: value.to("cuda") for key, value in make_inputs("llama", (0, 0), lengths=(16, 9)).items()}
    plain = generate(target, inputs, do_sample=do_sample)
    truth = plain.sequences[:, inputs["input_ids"].shape[1] :]
    for assistant in (*oracles(truth), make_draft(target).to("cuda")):
        drafted = generate(target, inputs, do_sample=do_sample, assistant_model=assistant)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert_same_cache(drafted[CACHE], plain[CACHE])


def test_nothing_runs_again_where_all_is_accepted() -> None:
    target = make("qwen3_5_text")
    inputs = make_inputs("llama", (0,), lengths=(12,))
    truth = generate(target, inputs).sequences[:, inputs["input_ids"].shape[1] :]
    wrong, right = Oracle(truth, VOCAB_SIZE, error_rate=1.0), Oracle(truth, VOCAB_SIZE, error_rate=0.0, num_decoys=0)
    stats = [generate(target, inputs, assistant_model=one).speculative_stats for one in (wrong, right)]
    assert stats[0].num_repeated > NUM_TOKENS
    assert stats[1].num_repeated < 5  # the last round goes beyond the end


class EndsByRow(StoppingCriteria):
    """Ends each row at a length of its own, the fastest first."""

    def __init__(self, prompt_length: int, ends: tuple[int, ...]) -> None:
        self.prompt_length, self.ends = prompt_length, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        num_tokens = input_ids.shape[1] - self.prompt_length
        return torch.tensor([num_tokens >= end for end in self.ends])


@pytest.mark.parametrize("ends", ["eos", "criterion"])
@pytest.mark.parametrize("returns_state", [False, True])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "falcon_h1"])
def test_rows_that_end_at_different_steps(name: str, returns_state: bool, ends: str) -> None:
    target = make(name)
    inputs = make_inputs("llama", (0, 0, 0), lengths=(16, 9, 13))
    prompt_length = inputs["input_ids"].shape[1]
    free = generate(target, inputs).sequences[:, prompt_length:]
    if ends == "eos":
        kwargs = {"eos_token_id": [int(free[0, 5]), int(free[1, 11])]}
    else:
        kwargs = {"stopping_criteria": [EndsByRow(prompt_length, (7, 13, 10))], "eos_token_id": 1}
    plain = generate(target, inputs, **kwargs)
    for assistant in (*oracles(free), make_draft(target)):
        if not returns_state:
            tokens = generate(target, inputs, **kwargs, assistant_model=assistant, return_dict_in_generate=False)
            assert torch.equal(tokens, plain.sequences)
            continue
        drafted = generate(target, inputs, **kwargs, assistant_model=assistant)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert_same_cache(drafted[CACHE], plain[CACHE])


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text"])
def test_many_tokens_behind_are_run_alone(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stateful, "MOST_BEHIND", most)
    target = make(name)
    inputs = make_inputs("llama", (0, 0), lengths=(16, 9))
    plain = generate(target, inputs, max_new_tokens=40)
    for oracle in oracles(plain.sequences[:, inputs["input_ids"].shape[1] :]):
        drafted = generate(target, inputs, max_new_tokens=40, assistant_model=oracle)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert_same_cache(drafted[CACHE], plain[CACHE])


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "falcon_h1"])
def test_a_second_turn_goes_on_from_the_states(name: str) -> None:
    target = make(name)
    inputs = make_inputs("llama", (0, 0), lengths=(12, 15))
    answers, caches = [], []
    for assistant in ({}, {"assistant_model": make_draft(target)}):
        held = DynamicCache(config=target.config)
        first = generate(target, inputs, **assistant, **{CACHE: held})
        ids = torch.cat([first.sequences, torch.full((2, 5), 17)], dim=1)
        seen = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
        turn = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], seen], 1)}
        second = generate(target, turn, **assistant, **{CACHE: copy.deepcopy(first[CACHE])})
        answers.append(second.sequences)
        caches.append(second[CACHE])
    assert torch.equal(*answers)
    assert_same_cache(*caches)


class Stops(BaseStreamer):
    def __init__(self, step: int) -> None:
        self.left = step

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedError

    def end(self) -> None:
        pass


@pytest.mark.parametrize("step", [2, 3, 7, 10])
def test_a_call_that_breaks_off_leaves_the_states_of_complete_rounds(step: int) -> None:
    target = make("qwen3_5_text")
    inputs = make_inputs("llama", (0,), lengths=(12,))
    prompt_length = inputs["input_ids"].shape[1]
    oracle = Oracle(generate(target, inputs).sequences[:, prompt_length:], VOCAB_SIZE)
    held = DynamicCache(config=target.config)
    with pytest.raises(InterruptedError):
        generate(target, inputs, assistant_model=oracle, streamer=Stops(step), **{CACHE: held})
    num_steps = int(held.get_seq_length()) - prompt_length + 1
    assert 1 <= num_steps < step
    assert_same_cache(held, generate(target, inputs, max_new_tokens=num_steps)[CACHE])


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_pictures(name: str) -> None:
    target = make_model(name)
    prompts = make_prompts(target, "pictures")
    drafted = answers(target, prompts, make_draft(target))
    assert all(torch.equal(*both) for both in zip(answers(target, prompts), drafted, strict=True))


class BreaksOff(StoppingCriteria):
    """Raises an error at a step."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            raise InterruptedError
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("step", [1, 4, 5, 8, 13])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "falcon_h1"])
def test_a_batch_that_breaks_off_stands_where_its_slowest_row_does(name: str, step: int) -> None:
    target = make(name)
    inputs = make_inputs("llama", (0, 0, 0), lengths=(16, 9, 13))
    prompt_length = inputs["input_ids"].shape[1]
    truth = generate(target, inputs).sequences[:, prompt_length:]
    for oracle in oracles(truth):
        held = DynamicCache(config=target.config)
        criteria = [BreaksOff(prompt_length + step)]
        with pytest.raises(InterruptedError):
            generate(target, inputs, assistant_model=oracle, stopping_criteria=criteria, **{CACHE: held})
        num_steps = int(held.get_seq_length()) - prompt_length + 1
        assert 1 <= num_steps <= step
        assert_same_cache(held, generate(target, inputs, max_new_tokens=num_steps)[CACHE])


def test_plain_steps_are_of_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make("lfm2")
    inputs = make_inputs("llama", (0, 0), lengths=(16, 9))
    truth = generate(target, inputs, max_new_tokens=60).sequences[:, inputs["input_ids"].shape[1] :]
    oracle = Oracle(truth, VOCAB_SIZE, error_rate=0.9)
    oracle.tree_config = TreeConfig(num_nodes=5, depth=4, top_k=1)
    drafted = generate(target, inputs, max_new_tokens=60, assistant_model=oracle)
    assert torch.equal(drafted.sequences[:, inputs["input_ids"].shape[1] :], truth)
    stats = drafted.speculative_stats
    assert stats.num_plain_steps > 20
    assert stats.num_repeated < 60


def test_a_cache_that_records_its_past_is_refused() -> None:
    target = make("lfm2")
    held = DynamicCache(config=target.config)
    held.activate_past_recording()
    call = {"assistant_model": make_draft(target), CACHE: held}
    with pytest.raises(ValueError, match="record what was before"):
        generate(target, make_inputs("llama", (0,)), **call)


def test_states_of_offloaded_targets_are_tried_where_they_run() -> None:
    target = make("qwen3_5_text")
    inputs = make_inputs("llama", (0,))
    plain = generate(target, inputs)
    draft = make_draft(target)
    target = cpu_offload(target, execution_device=torch.device("cpu"))
    assert torch.equal(generate(target, inputs, assistant_model=draft).sequences, plain.sequences)


@pytest.mark.parametrize("spoil", ["training", "autocast"])
def test_what_a_moment_told_of_states_is_not_kept(spoil: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS["qwen3_5_text"]()
    config.attention_dropout = 0.5
    target = AutoModelForCausalLM.from_config(config).train(spoil == "training")
    inputs = make_inputs("llama", (0,))
    refused = pytest.raises(ValueError, match="drops at random") if target.training else nullcontext()
    with refused, torch.autocast("cpu", torch.bfloat16, enabled=spoil == "autocast"):
        target.generate(**inputs, max_new_tokens=4, assistant_model=make_draft(target))
    target.eval()
    drafted = generate(target, inputs, assistant_model=make_draft(target))
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [0.02, 0.3])
@pytest.mark.parametrize("name", OTHER_STATES)
def test_states_that_tokens_at_once_leave_otherwise_are_refused(name: str, init: float, dtype: torch.dtype) -> None:
    target = make(name, initializer_range=init).to(dtype)
    draft = make_draft(target).to(dtype)
    with pytest.raises(ValueError, match="2 tokens at once leave otherwise|outside of its cache"):
        generate(target, make_inputs("llama", (0,)), assistant_model=draft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_that_are_the_same_are_told_so(name: str, dtype: torch.dtype) -> None:
    for init in (0.02, 0.3):
        assert states_fact(make(name, initializer_range=init).to(dtype)) is None


def test_a_static_cache_of_states_is_refused() -> None:
    target = make("lfm2")
    call = {"assistant_model": make_draft(target), "cache_implementation": "static"}
    with pytest.raises(ValueError, match="static ones of recurrent layers"):
        generate(target, make_inputs("llama", (0,)), **call)


def test_a_target_with_states_cannot_draft_trees() -> None:
    target = make("lfm2")
    with pytest.raises(ValueError, match="can't stand at the nodes of a tree"):
        generate(target, make_inputs("llama", (0,)), assistant_model=VLMDrafter(target))


def test_drafts_are_told_to_draft_chains_and_keep_their_settings() -> None:
    target, draft = make("lfm2"), None
    draft = make_draft(target)
    stats = generate(target, make_inputs("llama", (0,)), assistant_model=draft).speculative_stats
    assert draft.tree_config == TREE
    assert stats.num_drafted == 4 * len(stats.acceptance_lengths)


@pytest.mark.parametrize(
    "wrap", [lambda draft: draft, StaticRuntime, Ungated, lambda draft: StaticRuntime(Ungated(draft))]
)
def test_drafts_inside_others_draft_chains_too(wrap: Callable[[Any], Any]) -> None:
    target = make("lfm2")
    draft = make_draft(target)
    assistant, num_rows = wrap(draft), []
    draft.register_forward_pre_hook(
        lambda model, args, kwargs: num_rows.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generate(target, make_inputs("llama", (0,)), assistant_model=assistant)
    # A round begins with the rows of what stands; each level of a tree of ours would have three.
    assert 3 not in num_rows
    assert draft.tree_config == TREE
    assert assistant is draft or assistant.tree_config.top_k == TREE.top_k


def test_the_likeliest_path_of_a_tree_is_its_chain() -> None:
    tree = TokenTree(
        token_ids=torch.tensor([[5, 6, 7, 8, 9, 3]]),
        # Two children of the root, the second with two in a row, and a filler that no node leads to, surest of all.
        parents=torch.tensor([[-1, 0, 0, 2, 3, -1]]),
        scores=torch.tensor([[1.0, 0.5, 0.4, 0.3, 0.2, 1.0]]).log(),
        depth=3,
    )
    chain = tree.chain()
    assert chain.token_ids[0].tolist() == [5, 7, 8, 9]
    assert chain.parents[0].tolist() == [-1, 0, 1, 2]
    assert chain.chain().parents.equal(chain.parents)
