"""The master claim on every mechanism that targets have, one architecture of each, with all that a call returns."""

import functools
from typing import Any

import pytest
import torch
from oracle import Oracle
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from training.evidence.tiny import FIRST_SPECIAL, make_model, make_prompts, model_types
from training.evidence.tiny_fields import VOCAB_SIZE
from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE


MECHANISMS = {
    "grouped queries": "llama",
    "norms of queries and keys": "qwen3",
    "norms behind the layers": "olmo2",
    "attention and perceptron side by side": "gpt_neox",
    "one head of keys": "falcon",
    "learned positions": "gpt2",
    "learned positions counted by the mask": "opt",
    "layers without positions": "smollm3",
    "part of a head turned": "phi3",
    "latent attention": "deepseek_v3",
    "two attentions in a layer": "longcat_flash",
    "differences of attention": "diffllama",
    "experts": "qwen3_moe",
    "scaled embeddings and logits": "granite",
    "capped logits and windows": "gemma2",
    "windows in each layer": "mistral",
    "windows and sinks": "gpt_oss",
    "windows, layers that share keys": "gemma4_text",
    "chunks": "llama4_text",
    "short convolutions": "lfm2",
    "delta rule": "qwen3_next",
    "delta rule by channel": "kimi_linear",
    "Mamba 2 beside attention": "falcon_h1",
    "states and rows in a layer": "zaya",
    "norm and perceptron before the head": "modernbert-decoder",
}
PICTURES = {
    "rows of a picture": "llava",
    "tiles": "llava_next",
    "rows of several positions": "qwen2_5_vl",
    "rows added in later layers": "qwen3_vl",
    "rows of other axes": "hunyuan_vl",
    "rows of other experts": "ernie4_5_vl_moe",
    "rows that see each other": "gemma3",
    "a prompt that sees all of itself": "paligemma",
    "a thinker that hears, too": "qwen2_5_omni_thinker",
    "rows of a resampler": "idefics2",
    "pictures as tokens": "emu3",
    "rows of several layers": "granite4_vision",
    "rows of pixels": "fuyu",
    "pictures and a delta rule": "qwen3_5",
    "pictures and convolutions": "lfm2_vl",
    "rows packed by size": "minicpmv4_6",
    "sparse attention": "minimax_m3_vl",
}
VIDEOS = {
    "a video as rows": "llava_onevision",
    "frames as rows": "video_llava",
    "a video of several positions": "qwen2_vl",
    "frames with times": "qwen3_vl",
    "frames as pictures": "glm4v",
    "frames and a delta rule": "qwen3_5",
}
SLOW = ("kimi_linear",)  # its kernels for a CPU run 64 rows for each one
CASES = [
    (mechanism, name, seen)
    for seen, cases in (("", MECHANISMS), ("pictures", PICTURES), ("videos", VIDEOS))
    for mechanism, name in cases.items()
    if name in model_types()
]
LENGTHS = {"single": (12,), "batch": (8, 12, 10)}
# As on the fields of one colour of a chessboard each case is tried alone and in a batch, greedy and sampled in each
# run; the other fields are slow.
CELLS = [
    pytest.param(
        *(name, seen, lengths, do_sample),
        id=f"{mechanism} ({name})-{size}-{do_sample}",
        marks=pytest.mark.slow if name in SLOW or (place + (size == "batch") + do_sample) % 2 else (),
    )
    for place, (mechanism, name, seen) in enumerate(CASES)
    for size, lengths in LENGTHS.items()
    for do_sample in (False, True)
]
NUM_TOKENS, DEPTH = 18, 4
TREE = TreeConfig(num_nodes=10, depth=3, top_k=3, gate=False)
CHAIN = TreeConfig(num_nodes=DEPTH + 1, depth=DEPTH, top_k=1, gate=False, ngrams=False)
SETTINGS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "max_new_tokens": NUM_TOKENS,
    "disable_compile": True,
    "top_k": 0,
}


make = functools.lru_cache(2)(make_model)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(**inputs, **SETTINGS | settings)


def assert_same(found: Any, plain: Any) -> None:
    """Compare tokens, scores, logits, hidden states and what the cache holds."""
    assert torch.equal(found.sequences, plain.sequences)
    close = {"atol": 1e-3, "rtol": 1e-3}
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(plain[name]), **close)
    for step, plain_step in zip(found.hidden_states, plain.hidden_states, strict=True):
        for states, plain_states in zip(step, plain_step, strict=True):
            torch.testing.assert_close(states, plain_states, **close)
    for layer, plain_layer in zip(found[CACHE].layers, plain[CACHE].layers, strict=True):
        assert type(layer) is type(plain_layer)
        is_recurrent = isinstance(plain_layer, LinearAttentionCacheLayerMixin)
        names = ("keys", "values", *(("conv_states", "recurrent_states") if is_recurrent else ()))
        for name in names:
            torch.testing.assert_close(getattr(layer, name, None), getattr(plain_layer, name, None), **close)


@pytest.mark.parametrize(("name", "seen", "lengths", "do_sample"), CELLS)
def test_all_that_a_call_returns_is_plain_s(name: str, seen: str, lengths: tuple[int, ...], do_sample: bool) -> None:
    model = make(name)
    prompts = make_prompts(model, seen, lengths)
    plain = generate(model, prompts, do_sample=do_sample)
    truth = plain.sequences[:, prompts["input_ids"].shape[1] :]
    assert len(truth.unique()) > 4
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(model.config)).eval()
    draft.tree_config = TREE
    oracle = Oracle(truth, VOCAB_SIZE, depth=DEPTH, error_rate=0.2)
    for assistant in (draft, oracle):
        drafted = generate(model, prompts, do_sample=do_sample, assistant_model=assistant)
        assert_same(drafted, plain)
    assert drafted.speculative_stats.mean_acceptance_length > 1.4

    layers = plain[CACHE].layers
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        # A target drafts for itself, and is right.
        own = generate(model, prompts, do_sample=do_sample, assistant_model=VLMDrafter(model, tree_config=CHAIN))
        assert_same(own, plain)
        assert (own.speculative_stats.acceptance_lengths[:-1] == DEPTH + 1).all()
    if seen:
        return
    # A second turn goes on from where the first ended, with either's cache.
    turns = []
    for cache, assistant in ((plain[CACHE], None), (drafted[CACHE], draft)):
        more = torch.randint(3, FIRST_SPECIAL, (len(lengths), 4), generator=torch.Generator().manual_seed(8))
        ids = torch.cat([plain.sequences, more], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : prompts["attention_mask"].shape[1]] = prompts["attention_mask"]
        second = {"input_ids": ids, "attention_mask": mask, CACHE: cache}
        turns.append(generate(model, second, do_sample=do_sample, assistant_model=assistant))
    assert_same(*reversed(turns))
