"""What `generate()` gives besides its tokens, what it refuses, and what it leaves behind: nothing."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import Oracle
from test_equality import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
)
from transformers.generation import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from zoo import TEXT, VOCAB_SIZE, make_draft_model, make_inputs, make_target

from transformers_msd import MSDConfig, MSDDraftModel, SpeculativeStats, StaticRuntime, TreeConfig, VLMDrafter
from transformers_msd.call.stats import Rounds
from transformers_msd.compat import CACHE


def make_draft(target: Any) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3)
    return draft


def make_case(batch_size: int = 1, **settings: Any) -> tuple[Any, dict[str, Any], Any, Oracle]:
    """Make a target, the arguments of a call, plain decoding's output of it, and an oracle for it."""
    target = make_target("llava")
    inputs = make_inputs("llava", (1,) if batch_size == 1 else (2, 0, 1))
    call = {**inputs, "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **settings}
    torch.manual_seed(0)
    plain = target.generate(**call)
    return target, call, plain, Oracle(plain.sequences[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("layers", [True, [-1], -2, [0, 1]])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_returned_scores_logits_and_states_are_plain_ones(batch_size: int, layers: Any, do_sample: bool) -> None:
    settings = {"output_scores": True, "output_logits": True, "output_hidden_states": layers, "do_sample": do_sample}
    settings |= {"eos_token_id": [23, 45], "repetition_penalty": 1.2} if batch_size == 3 else {"top_k": 10}
    target, call, plain, oracle = make_case(batch_size, **settings)
    torch.manual_seed(0)
    ours = target.generate(**call, assistant_model=oracle)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(plain[name])
        for step, plain_step in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(step, plain_step, atol=1e-4, rtol=1e-4)
    assert len(ours.hidden_states) == len(plain.hidden_states)
    for step, plain_step in zip(ours.hidden_states, plain.hidden_states, strict=True):
        for layer, plain_layer in zip(step, plain_step, strict=True):
            assert (layer is None) == (plain_layer is None)
            if layer is not None:
                torch.testing.assert_close(layer, plain_layer, atol=1e-4, rtol=1e-4)
    assert ours.attentions is None
    transition = target.compute_transition_scores(ours.sequences, ours.scores)
    torch.testing.assert_close(transition, target.compute_transition_scores(plain.sequences, plain.scores))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_come_back_in_the_dtype_of_plain_decoding(dtype: torch.dtype) -> None:
    target, call, plain, oracle = make_case(1)
    call["input_ids"] = call["input_ids"].to(dtype)
    streamed: list[Any] = []
    streamer = SimpleNamespace(put=lambda ids: streamed[-1].append(ids.dtype), end=lambda: None)
    sequences = []
    for assistant in (None, oracle):
        streamed.append([])
        sequences.append(target.generate(**call, assistant_model=assistant, streamer=streamer).sequences)
    assert sequences[0].dtype == sequences[1].dtype
    assert torch.equal(*sequences)
    assert streamed[0] == streamed[1]


def test_without_the_dict_the_tokens_come_alone() -> None:
    target, call, plain, oracle = make_case()
    ours = target.generate(**call | {"return_dict_in_generate": False}, assistant_model=oracle)
    assert torch.equal(ours, plain.sequences)


def test_a_cache_that_was_passed_in_is_filled_like_plain_generate_fills_it() -> None:
    target, call, plain, oracle = make_case()
    cache = DynamicCache(config=target.config.get_text_config())
    ours = target.generate(**call | {"return_dict_in_generate": False}, **{CACHE: cache}, assistant_model=oracle)
    assert torch.equal(ours, plain.sequences)
    torch.testing.assert_close(cache.layers[1].keys, plain[CACHE].layers[1].keys, atol=1e-4, rtol=1e-4)


class Notes(BaseStreamer):
    """Notes every call."""

    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_streamer_gets_the_calls_that_plain_generate_makes(batch_size: int) -> None:
    target, call, _, oracle = make_case(batch_size)
    notes, plain_notes = Notes(), Notes()
    target.generate(**call, streamer=plain_notes)
    target.generate(**call, streamer=notes, assistant_model=oracle)
    assert [put.tolist() for put in notes.puts] == [put.tolist() for put in plain_notes.puts]
    assert notes.ended == plain_notes.ended == 1


def test_text_streamers_print_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    target, call, plain, oracle = make_case()
    tokenizer = make_tokenizer()
    target.generate(**call, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = capsys.readouterr().out
    target.generate(**call, streamer=TextStreamer(tokenizer, skip_prompt=True), assistant_model=oracle)
    assert capsys.readouterr().out == expected

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=target.generate, kwargs={**call, "streamer": streamer, "assistant_model": make_draft(target)}
    )
    thread.start()
    assert "".join(streamer) == expected.rstrip("\n")
    thread.join()


def test_two_sampled_calls_after_one_seed_are_both_plain() -> None:
    target, call, _, oracle = make_case(3, do_sample=True, eos_token_id=[23, 45])
    draft = make_draft(target)
    results = []
    for assistant in ({}, {"assistant_model": draft}, {"assistant_model": oracle}):
        torch.manual_seed(7)
        results.append([target.generate(**call, **assistant).sequences for _ in range(2)])
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][1])


def test_max_time_ends_within_a_round() -> None:
    target, call, plain, oracle = make_case(max_new_tokens=60)

    class Slow(StoppingCriteria):
        """Takes a while for each token, and so makes the time run out in the middle."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            time.sleep(0.01)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ours = target.generate(**call, stopping_criteria=[Slow()], max_time=0.2, assistant_model=oracle).sequences
    assert ours.shape[1] < plain.sequences.shape[1]
    assert torch.equal(ours, plain.sequences[:, : ours.shape[1]])


def test_watermark_without_a_state_is_plain() -> None:
    settings = {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash"), "do_sample": True}
    target, call, plain, oracle = make_case(**settings)
    torch.manual_seed(0)
    assert torch.equal(target.generate(**call, assistant_model=oracle).sequences, plain.sequences)


def test_statistics_of_a_call_add_up() -> None:
    target, call, plain, oracle = make_case(3, eos_token_id=[23, 45])
    stats = target.generate(**call, assistant_model=oracle).speculative_stats
    # The last of these tokens ended the call, so each row's count goes up to its own EOS or to the last step.
    news = plain.sequences[:, call["input_ids"].shape[1] :].tolist()
    ends = [next((step + 1 for step, token in enumerate(row) if token in (23, 45)), len(row)) for row in news]
    assert stats.acceptance_lengths.sum(0).tolist() == [end - 1 for end in ends]
    num_row_rounds = int((stats.acceptance_lengths > 0).sum())
    assert stats.mean_acceptance_length == pytest.approx((sum(ends) - 3) / num_row_rounds)
    assert stats.num_drafted == num_row_rounds * 2 * oracle.depth
    assert stats.acceptance_by_depth == sorted(stats.acceptance_by_depth, reverse=True)
    assert sum(stats.acceptance_by_depth) * num_row_rounds == pytest.approx(stats.num_accepted)


def test_statistics_by_hand() -> None:
    rounds = Rounds(
        starts=[[1, 1], [4, 2], [6, 4]],
        lengths=[[4, 2], [6, 4], [8, 8]],
        num_accepted=[[2, 0], [3, 1], [1, 3]],
        num_drafted=[torch.tensor([5, 5])] * 3,
    )
    # Row 0 ended with its 5th token: of its second round one token counts, its third is no round of its own.
    stats = rounds.summarize([5, 8])
    assert stats.acceptance_lengths.tolist() == [[3, 1], [1, 2], [0, 4]]
    assert stats.mean_acceptance_length == pytest.approx(11 / 5)
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (3, 25, 2 + 0 + 1 + 1 + 3)
    assert stats.acceptance_by_depth == pytest.approx([4 / 5, 2 / 5, 1 / 5])
    assert SpeculativeStats(torch.zeros(0, 1)).mean_acceptance_length == 0


def test_threads_share_a_target_and_a_draft() -> None:
    target = make_target("llava")
    draft = make_draft(target)
    calls = [make_inputs("llava", (1,), seed=seed) for seed in range(4)]
    expected = [target.generate(**call, max_new_tokens=40, do_sample=False) for call in calls]
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        for _ in range(3):
            results[index] = target.generate(**calls[index], max_new_tokens=40, do_sample=False, assistant_model=draft)
            assert torch.equal(results[index], expected[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(4))


def test_nothing_of_ours_is_left_on_the_models() -> None:
    def attributes(model: torch.nn.Module) -> list[set[str]]:
        return [set(vars(module)) | set(module._forward_hooks) for module in model.modules()]

    target, call, *_ = make_case()
    # Transformers itself leaves hooks for hidden states behind, once they were asked for.
    target.generate(**call, output_hidden_states=True)
    draft = make_draft(target)
    with torch.no_grad():
        rows = torch.zeros(1, 2, target.config.get_text_config().hidden_size)
        draft(rows, rows)
    before = attributes(target), attributes(draft)
    target.generate(**call, assistant_model=draft)
    assert (attributes(target), attributes(draft)) == before


def other_target(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TEXT | changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "greedy decoding and sampling"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "greedy decoding and sampling"),
    "guidance": ({"guidance_scale": 1.5}, "guidance"),
    "synth_id": ({"watermarking_config": SynthIDTextWatermarkingConfig(5, [1, 2, 3])}, "SynthID"),
    "quantised": ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
    "no_cache": ({"use_cache": False}, "use_cache=False"),
    "no_cache_either": ({"use_cache": 0}, "use_cache=0"),
    "adapters": ({"adapter_names": ["default"]}, "adapter_names"),
    "ensemble": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    "synced": ({"synced_gpus": True}, "synced_gpus"),
    "tokenizer": ({"assistant_tokenizer": make_tokenizer()}, "assistant_tokenizer"),
    "tokenizers": ({"assistant_tokenizer": make_tokenizer(), "tokenizer": make_tokenizer()}, "assistant_tokenizer"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "in one way.*prompt_lookup_num_tokens=3"),
    "early_exit": ({"assistant_early_exit": 1}, "in one way.*assistant_early_exit=1"),
    "mtp": ({"use_mtp": True}, "in one way.*use_mtp=True"),
    "dflash": ({"speculation_type": "dflash"}, "in one way.*speculation_type='dflash'"),
    "num_tokens": ({"num_assistant_tokens": 5}, "num_assistant_tokens=5.*tree_config"),
    "schedule": ({"num_assistant_tokens_schedule": "heuristic"}, "num_assistant_tokens_schedule='heuristic'.*tree"),
    "confidence": ({"assistant_confidence_threshold": 0.4}, "assistant_confidence_threshold=0.4.*tree_config"),
    "ngrams": ({"max_matching_ngram_size": 2}, "max_matching_ngram_size=2.*tree_config"),
    "lookbehind": ({"assistant_lookbehind": 3}, "assistant_lookbehind=3.*tree_config"),
    "target_lookbehind": ({"target_lookbehind": 3}, "target_lookbehind=3.*tree_config"),
    "settings_of_the_call": (
        {"generation_config": GenerationConfig(num_assistant_tokens=5, max_new_tokens=3)},
        "num_assistant_tokens=5.*tree_config",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_drafting_cannot_do_is_refused_before_anything_runs(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, message = REFUSED[reason]
    target, call, *_ = make_case()
    draft = make_draft(target)

    def ran(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model ran")

    monkeypatch.setattr(target.model, "forward", ran)
    monkeypatch.setattr(target.model, "get_image_features", ran)
    with pytest.raises(ValueError, match=message):
        target.generate(**call | settings, assistant_model=draft)


def test_defaults_in_a_config_of_the_call_are_no_settings() -> None:
    target, call, plain, oracle = make_case()
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    defaults = target._prepare_generation_config(None)[0]
    given = GenerationConfig(pad_token_id=0, **{name: getattr(defaults, name) for name in names})
    ours = target.generate(**call, generation_config=given, assistant_model=oracle)
    assert torch.equal(ours.sequences, plain.sequences)
    assert given.num_assistant_tokens == 20


def test_a_stateful_processor_is_refused() -> None:
    target, call, *_ = make_case()
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, target)
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidance"):
        target.generate(**call, logits_processor=[processor], assistant_model=make_draft(target))


def test_caches_that_cannot_take_rows_back_are_refused() -> None:
    target, call, *_ = make_case()
    offloaded = DynamicCache(config=target.config.get_text_config(), offloading=True)
    with pytest.raises(ValueError, match="offloading"):
        target.generate(**call, **{CACHE: offloaded}, assistant_model=make_draft(target))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_4d_masks_is_refused(implementation: str) -> None:
    target = other_target()
    target.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=implementation):
        target.generate(torch.tensor([[1, 5]]), max_new_tokens=3, assistant_model=make_draft(target))


@pytest.mark.parametrize(("changes", "message"), [({"hidden_size": 64}, "64"), ({"vocab_size": 100}, "100")])
def test_a_draft_for_another_target_is_refused(changes: dict[str, int], message: str) -> None:
    draft = make_draft(make_target("llama"))
    with pytest.raises(ValueError, match=message):
        other_target(**changes).generate(torch.tensor([[1, 5]]), max_new_tokens=3, assistant_model=draft)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_call_that_ends_with_the_prefill(batch_size: int) -> None:
    target, call, plain, _ = make_case(batch_size, max_new_tokens=1, output_hidden_states=True, output_scores=True)
    draft = make_draft(target)
    ours = target.generate(**call, assistant_model=draft)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.scores) == len(ours.hidden_states) == 1
    assert ours.speculative_stats.num_rounds == 0
    # The next turn goes on from it all the same.
    turn = {"input_ids": ours.sequences, "max_new_tokens": 12, "do_sample": False}
    turn["attention_mask"] = torch.cat([call["attention_mask"], torch.ones(batch_size, 1, dtype=torch.long)], dim=1)
    expected = target.generate(**turn, **{CACHE: plain[CACHE]})
    assert torch.equal(target.generate(**turn, **{CACHE: ours[CACHE]}, assistant_model=draft), expected)


def test_a_length_within_the_prompt_lets_one_token_come() -> None:
    target, call, _, _ = make_case(3)
    del call["max_new_tokens"]
    criteria = StoppingCriteriaList([MaxLengthCriteria(2)])
    plain = target.generate(**call, stopping_criteria=criteria)  # and warns that the prompt is longer
    ours = target.generate(**call, stopping_criteria=criteria, assistant_model=make_draft(target))
    assert torch.equal(ours.sequences, plain.sequences)


def test_layers_that_are_not_there_have_no_states() -> None:
    target, call, plain, _ = make_case(1, output_hidden_states=[99, -99, 1])
    ours = target.generate(**call, assistant_model=make_draft(target))
    for states, theirs in zip(ours.hidden_states, plain.hidden_states, strict=True):
        assert [state is None for state in states] == [state is None for state in theirs]


def test_arguments_that_are_none_are_not_there() -> None:
    target, call, plain, _ = make_case(1)
    drafter = VLMDrafter(make_draft_model("llava"))
    ids = call.pop("input_ids")
    ours = target.generate(inputs=ids, input_ids=None, **call, assistant_model=drafter)
    assert torch.equal(ours.sequences, plain.sequences)
    ours = target.generate(ids, inputs_embeds=None, prefill_chunk_size=4, **call, assistant_model=drafter)
    assert torch.equal(ours.sequences, plain.sequences)


def test_a_runtime_runs_under_autocast() -> None:
    target, call, _, _ = make_case(1)
    runtime = StaticRuntime(make_draft(target))
    with torch.autocast("cpu", torch.bfloat16):
        ours = target.generate(**call, disable_compile=True, assistant_model=runtime)
    assert ours.speculative_stats.num_rounds > 0


def test_the_smallest_tree_and_a_chain_are_plain() -> None:
    target, call, plain, _ = make_case(3, eos_token_id=[23, 45])
    draft = make_draft(target)
    for tree in (TreeConfig(2, 1, 1), TreeConfig(5, 4, 1), TreeConfig(200, 2, 1000)):
        draft.tree_config = tree
        assert torch.equal(target.generate(**call, assistant_model=draft).sequences, plain.sequences)


def test_pad_and_eos_may_be_one_token() -> None:
    target, call, plain, oracle = make_case(3, eos_token_id=45, pad_token_id=45, repetition_penalty=1.2)
    ours = target.generate(**call, assistant_model=oracle)
    assert torch.equal(ours.sequences, plain.sequences)


def test_generate_takes_its_arguments_by_place() -> None:
    target, call, plain, oracle = make_case()
    call |= {"return_dict_in_generate": False}
    ours = target.generate(call.pop("input_ids"), None, None, None, None, None, oracle, **call)
    assert torch.equal(ours, plain.sequences)
    assert oracle.trees


def test_ended_rows_cost_no_rounds() -> None:
    _, call, plain, _ = make_case(3, max_new_tokens=40)
    truth = plain.sequences[:, call["input_ids"].shape[1] :].tolist()
    eos = next(token for step, token in enumerate(truth[0]) if step > 8 and token not in truth[0][:step] + truth[1])
    target, call, plain, oracle = make_case(3, eos_token_id=eos, max_new_tokens=40)
    # The first row is slow: where it ends the others are far ahead.
    oracle.token_ids[0] = [(token + 1) % VOCAB_SIZE for token in oracle.token_ids[0]]
    oracle.error_rate = 0.0
    num_rounds = {}
    for returns_pads in (True, False):
        forwards = []
        hook = target.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        output = target.generate(**call | {"return_dict_in_generate": returns_pads}, assistant_model=oracle)
        hook.remove()
        assert torch.equal(output.sequences if returns_pads else output, plain.sequences)
        num_rounds[returns_pads] = len(forwards)
    assert num_rounds[False] < num_rounds[True]


def test_a_prompt_is_run_once_its_picture_encoded_once_and_logits_made_of_its_end_alone() -> None:
    target, call, *_ = make_case()
    draft = make_draft(target)
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
    num_pictures, num_logits, num_rows = [], [], []
    hooks = [
        target.model.vision_tower.register_forward_hook(lambda module, args, outputs: num_pictures.append(1)),
        target.lm_head.register_forward_hook(lambda module, args, outputs: num_logits.append(outputs.shape[1])),
        draft.fc.register_forward_hook(lambda module, args, outputs: num_rows.append(outputs.shape[1])),
    ]
    target.generate(**call, assistant_model=draft)
    for hook in hooks:
        hook.remove()
    prompt_length = call["input_ids"].shape[1]
    assert len(num_pictures) == 1
    # The prefill; what is drafted and verified later is shorter than the prompt.
    assert num_logits[0] == 1
    assert max(num_logits) < prompt_length
    assert num_rows[0] == prompt_length
    assert max(num_rows[1:]) < prompt_length
