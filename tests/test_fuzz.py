"""Calls drawn at random, each against plain `generate`: tokens, scores, logits, cache and generator."""

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Oracle
from test_equality import BOTH, ENDS, SAMPLED
from transformers import DynamicCache, PreTrainedModel, StaticCache
from zoo import ARCHITECTURES, READ_EMBEDS, VOCAB_SIZE, make_draft_model, make_inputs, make_target

from transformers_msd import (
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    NgramDrafter,
    StaticRuntime,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.compat import CACHE


NUM_CALLS, NUM_SEEDS = 100, 20
# Their answers depend on what a call before them said.
LEFT_OUT = ("return_sequences", "stop_string")


def draw_tree(chance: random.Random) -> TreeConfig:
    return TreeConfig(
        num_nodes=chance.choice((2, 5, 9, 16, 31)),
        depth=chance.randint(1, 7),
        top_k=chance.randint(1, 5),
        min_probability=chance.choice((0.0, 0.0, 0.05)),
        gate=chance.random() < 0.3,
        ngrams=chance.random() < 0.7,
    )


def draw_assistant(chance: random.Random, architecture: str, target: PreTrainedModel, truth: torch.Tensor) -> Any:
    tree, kind = draw_tree(chance), chance.choice(("msd", "vlm", "self", "ensemble", "oracle", "runtime", "n-grams"))
    if kind in ("msd", "runtime"):
        settings = {"num_hidden_layers": chance.choice((1, 2)), "visual_pool_size": chance.choice((0, 1, 3))}
        torch.manual_seed(chance.randint(0, 9))
        draft = MSDDraftModel(MSDConfig.from_target(target.config, **settings)).eval()
        draft.tree_config = tree
        return StaticRuntime(draft) if kind == "runtime" else draft
    if kind == "n-grams":
        drafter = NgramDrafter(replace(tree, ngrams=True))
        return StaticRuntime(drafter) if chance.random() < 0.3 else drafter
    if kind == "vlm":
        return VLMDrafter(make_draft_model(architecture), tree_config=tree)
    if kind == "self":
        return VLMDrafter(target, tree_config=tree)
    if kind == "ensemble" and architecture in READ_EMBEDS:
        weights = chance.choice(("grid", "kld", "tvd", (1, 0), (0.3, 0.7)))
        return EnsembleDrafter(make_draft_model(architecture), weights=weights, tree_config=tree)
    return Oracle(truth, VOCAB_SIZE, depth=chance.randint(1, 6), error_rate=chance.choice((0.0, 0.2, 0.6)))


def draw_settings(chance: random.Random, truth: torch.Tensor, prompt_length: int) -> dict[str, Any]:
    """Some options of plain decoding at once, that get along."""
    settings: dict[str, Any] = {"do_sample": chance.random() < 0.5, "max_new_tokens": chance.randint(1, 24)}
    for _ in range(chance.randint(0, 2)):
        settings |= BOTH[chance.choice(list(BOTH))]
    if settings["do_sample"]:
        settings |= SAMPLED[chance.choice([name for name in SAMPLED if name not in LEFT_OUT])]
    if chance.random() < 0.4:
        settings |= ENDS[chance.choice([name for name in ENDS if name not in LEFT_OUT])](truth, prompt_length)
    return settings


def assert_same(ours: Any, plain: Any, what: str) -> None:
    assert torch.equal(ours.sequences, plain.sequences), what
    for step, plain_step in zip(ours["logits"], plain["logits"], strict=True):
        torch.testing.assert_close(step, plain_step, atol=1e-3, rtol=1e-3, msg=what)
    for step, plain_step in zip(ours["scores"], plain["scores"], strict=True):
        # Of two tokens with logits equal to the last digit, a cut such as top-p may keep the one or the other.
        kept, plain_kept = step > -1e30, plain_step > -1e30
        assert torch.equal(kept.sum(-1), plain_kept.sum(-1)), what
        assert (kept ^ plain_kept).sum() <= 2, what
        both = kept & plain_kept
        torch.testing.assert_close(step[both], plain_step[both], atol=1e-3, rtol=1e-3, msg=what)
    for layer, plain_layer in zip(ours[CACHE].layers, plain[CACHE].layers, strict=True):
        assert int(layer.get_seq_length()) == int(plain_layer.get_seq_length()), what
        torch.testing.assert_close(layer.keys, plain_layer.keys, atol=1e-3, rtol=1e-3, msg=what)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_calls_drawn_at_random_equal_plain(seed: int) -> None:
    """Each call has a second turn on the cache that the first returned."""
    chance = random.Random(seed)
    for number in range(NUM_CALLS // 2):
        architecture = chance.choice(ARCHITECTURES)
        target = make_target(architecture)
        inputs = make_inputs(architecture, chance.choice(((1,), (0,), (2,), (2, 0, 1), (1, 1))))
        prompt_length = inputs["input_ids"].shape[1]
        torch.manual_seed(0)
        truth = target.generate(**inputs, max_new_tokens=40, do_sample=False)[:, prompt_length:]
        settings = draw_settings(chance, truth, prompt_length)
        assistant = draw_assistant(chance, architecture, target, truth)
        kind, call_seed = chance.choice(("none", "dynamic", "static")), chance.randint(0, 10**6)
        what = f"seed {seed}, call {number}: {architecture}, {settings}, {type(assistant).__name__}, {kind}"
        caches = {
            "none": lambda: {},
            "dynamic": lambda: {CACHE: DynamicCache()},
            "static": lambda: {CACHE: StaticCache(config=target.config.get_text_config(), max_cache_len=160)},  # noqa: B023
        }
        outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        both, states = [], []
        for drafts in (None, assistant):
            torch.manual_seed(call_seed)
            own = {"disable_compile": True, "assistant_model": drafts, **caches[kind](), **copy.copy(outputs)}
            both.append(target.generate(**inputs, **settings, **own))
            states.append(torch.get_rng_state())
        assert_same(*reversed(both), what)
        assert torch.equal(*states), what
        # A second turn goes on from either cache.
        ids = torch.cat([both[0].sequences, torch.full_like(both[0].sequences[:, :2], 7)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, prompt_length:])], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        turn |= {name: value for name, value in inputs.items() if name == "image_grid_thw"}
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            turn["mm_token_type_ids"] = torch.cat(
                [types, torch.zeros_like(ids[:, prompt_length:], dtype=types.dtype)], 1
            )
        if isinstance(assistant, Oracle) or int(both[0][CACHE].get_seq_length()) >= ids.shape[1]:
            continue
        again = []
        for drafts, output in zip((None, assistant), both, strict=True):
            torch.manual_seed(call_seed)
            own = {"disable_compile": True, "assistant_model": drafts, CACHE: output[CACHE], **outputs}
            again.append(target.generate(**turn, do_sample=settings["do_sample"], max_new_tokens=9, **own))
        assert_same(*reversed(again), f"second turn of {what}")
