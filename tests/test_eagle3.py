"""EAGLE-3 drafts in the layouts they are published in, against a forward of their own, and as drafts in `generate`."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_msd_drafter import Spy, assert_same_trees
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoModelForImageTextToText, CompileConfig, LlamaConfig, PreTrainedModel
from zoo import IMAGE_ID, VOCAB_SIZE, make_inputs, make_target

from training.evidence.tiny import make_model, make_prompts
from transformers_msd import (
    AutoDraftModel,
    Eagle3Config,
    Eagle3DraftModel,
    MSDConfig,
    MSDDraftModel,
    StaticRuntime,
    TreeConfig,
)
from transformers_msd.cli import main
from transformers_msd.compat import CACHE
from transformers_msd.target import target as axes_of_target
from transformers_msd.target.axes import axis_positions


NUM_LAYERS, HIDDEN, NUM_HEADS, NUM_SHARED, HEAD_DIM = 8, 32, 4, 2, 12
DRAFTED = sorted({*range(3, 80, 2), 4, 8, 30})
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_SHARED,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
}
# Of each layout: its config, how its layer is called, norms besides, and the base of its positions.
Layout = tuple[dict[str, Any], str, tuple[str, ...], float]
LAYOUTS: dict[str, Layout] = {
    "SafeAILab": (SIZES | {"architectures": ["LlamaForCausalLMEagle3"], "rope_theta": 5e5}, "midlayer", (), 5e5),
    # Its code reads no base.
    "AngelSlim": (SIZES | {"architectures": ["Eagle3LlamaForCausalLM"], "rope_theta": 5e5}, "midlayer", (), 1e4),
    "SpecForge": (
        SIZES
        | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 6]},
        },
        "midlayer",
        (),
        2e4,
    ),
    "speculators": (
        {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": SIZES | {"model_type": "llama", "rope_theta": 1e4},
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": [1, 5, 7],
        },
        "layers.0",
        (),
        1e4,
    ),
    "EAGLE-3.1, norms of each": (
        {
            "transformer_layer_config": SIZES | {"rope_theta": 1e4},
            "norm_before_residual": False,
            "norm_output": True,
        },
        "layers.0",
        ("fc_norm.0", "fc_norm.1", "fc_norm.2"),
        1e4,
    ),
    "EAGLE-3.1, one norm": (SIZES, "midlayer", ("input_norm",), 1e4),
}
MROPE = {"rope_theta": 3e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
TURNS = {"rope_theta": 3e4, "rope_scaling": {"type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}}
# For targets whose positions have three axes: how their frequencies are shared.
AXES: dict[str, list[int]] = {
    "SpecForge, Qwen2.5-VL": [0, 0, 1, 1, 2, 2],
    "AngelSlim, Qwen2.5-VL": [0, 1, 2, 0, 1, 2],
    "speculators, Qwen3-VL": [0, 1, 2, 0, 1, 2],
}
LAYOUTS |= {
    # Its code reads no base for axes.
    "SpecForge, Qwen2.5-VL": (SIZES | MROPE | {"architectures": ["LlamaForCausalLMEagle3"]}, "midlayer", (), 1e4),
    "AngelSlim, Qwen2.5-VL": (SIZES | MROPE | {"architectures": ["Eagle3LlamaForCausalLM"]}, "midlayer", (), 3e4),
    # Qwen3's layer has norms of queries and keys.
    "speculators, Qwen3-VL": (
        {
            "transformer_layer_config": SIZES | TURNS | {"model_type": "qwen3"},
            "norm_before_residual": True,
            "aux_hidden_states_layer_ids": [0, 4, 6],
        },
        "layers.0",
        ("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm"),
        3e4,
    ),
}
LAYOUTS["speculators, three layers"] = (
    {
        "transformer_layer_config": SIZES | {"rope_theta": 1e4, "num_hidden_layers": 3},
        "norm_before_residual": True,
    },
    "layers.0",
    ("layers.1.input_layernorm", "layers.2.input_layernorm"),
    1e4,
)
# Drafts of another width than the target, and one of the same, with embeddings of their own.
WIDTHS = {"SpecForge, narrower": 24, "speculators, wider": 40, "speculators, trained embeddings": HIDDEN}
LAYOUTS |= {
    "SpecForge, narrower": (
        SIZES
        | {"architectures": ["LlamaForCausalLMEagle3"], "rope_theta": 2e4}
        | {"hidden_size": WIDTHS["SpecForge, narrower"], "target_hidden_size": HIDDEN},
        "midlayer",
        (),
        2e4,
    ),
    "speculators, wider": (
        {
            "transformer_layer_config": SIZES | {"hidden_size": WIDTHS["speculators, wider"], "rope_theta": 1e4},
            "target_hidden_size": HIDDEN,
            "norm_before_residual": True,
        },
        "layers.0",
        ("fc_norm.0", "fc_norm.1", "fc_norm.2"),
        1e4,
    ),
    "speculators, trained embeddings": (
        {
            "transformer_layer_config": SIZES | {"rope_theta": 1e4},
            "norm_before_residual": False,
            "embed_requires_grad": True,
        },
        "layers.0",
        ("input_norm",),
        1e4,
    ),
}
# Projections of the attention that have biases, Qwen2's and Llama's.
BIASED = {"SafeAILab, Qwen2": "qkv", "SpecForge, Qwen2, axes": "qkv", "speculators, biases": "qkvo"}
LAYOUTS |= {
    "SafeAILab, Qwen2": (
        {name: value for name, value in SIZES.items() if name != "head_dim"} | {"rope_theta": 5e5},
        "midlayer",
        (),
        5e5,
    ),
    "SpecForge, Qwen2, axes": (SIZES | MROPE | {"architectures": ["LlamaForCausalLMEagle3"]}, "midlayer", (), 1e4),
    "speculators, biases": (LAYOUTS["speculators, wider"][0] | {"norm_before_residual": False}, "layers.0", (), 1e4),
}
WIDTHS |= {"SafeAILab, Qwen2": NUM_HEADS * HEAD_DIM, "speculators, biases": WIDTHS["speculators, wider"]}
AXES["SpecForge, Qwen2, axes"] = AXES["SpecForge, Qwen2.5-VL"]
LAYOUTS["SafeAILab, Qwen2"][0].update(hidden_size=WIDTHS["SafeAILab, Qwen2"], target_hidden_size=HIDDEN)
TAPS = {"SpecForge": (1, 4, 7), "speculators": (1, 5, 7), "speculators, Qwen3-VL": (1, 5, 7)}


def taps_of(name: str) -> tuple[int, ...]:
    return TAPS.get(name, (2, NUM_LAYERS // 2, NUM_LAYERS - 3))


def architecture_of(name: str) -> str:
    return "qwen2_5_vl" if name in AXES else "llava"


@functools.cache
def make_deep_target(architecture: str) -> PreTrainedModel:
    config = copy.deepcopy(make_target(architecture).config)
    text_config = config.text_config
    text_config.num_hidden_layers = NUM_LAYERS
    text_config.layer_types = ["full_attention"] * NUM_LAYERS
    torch.manual_seed(0)
    target = AutoModelForImageTextToText.from_config(config).eval()
    target.generation_config.eos_token_id = None
    return target


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_deep_target("llava")


def positions_of(token_ids: list[int]) -> torch.Tensor:
    """Time, height and width of tokens, `(3, n)`, pictures being squares of four."""
    found, place = [], 0
    while place < len(token_ids):
        start = max((max(axes) for axes in found), default=-1) + 1
        if token_ids[place] == IMAGE_ID:
            found += [(start, start + row, start + column) for row in range(2) for column in range(2)]
        else:
            found.append((start,) * 3)
        place = len(found)
    return torch.tensor(found).T


def layers_of(name: str) -> list[str]:
    """Names of the layers, of which all but the first have a norm of their input alone."""
    _, layer, norms, _ = LAYOUTS[name]
    return [layer, *(norm.removesuffix(".input_layernorm") for norm in norms if norm.endswith("input_layernorm"))]


def make_weights(name: str) -> dict[str, torch.Tensor]:
    _, layer, norms, _ = LAYOUTS[name]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    wide, shared, size = NUM_HEADS * HEAD_DIM, NUM_SHARED * HEAD_DIM, WIDTHS.get(name, HIDDEN)
    weights = {}
    for each in layers_of(name):
        width = 2 * size if each == layer else size
        weights |= {
            f"{each}.self_attn.q_proj.weight": random(wide, width),
            f"{each}.self_attn.k_proj.weight": random(shared, width),
            f"{each}.self_attn.v_proj.weight": random(shared, width),
            f"{each}.self_attn.o_proj.weight": random(size, wide),
            f"{each}.mlp.gate_proj.weight": random(48, size),
            f"{each}.mlp.up_proj.weight": random(48, size),
            f"{each}.mlp.down_proj.weight": random(size, 48),
            f"{each}.post_attention_layernorm.weight": 1 + random(size),
        }
    for kind in BIASED.get(name, ""):
        weights[f"{layer}.self_attn.{kind}_proj.bias"] = random(len(weights[f"{layer}.self_attn.{kind}_proj.weight"]))
    weights |= {
        "fc.weight": random(size, 3 * HIDDEN),
        "lm_head.weight": random(len(DRAFTED), size),
        "d2t": torch.tensor(DRAFTED) - torch.arange(len(DRAFTED)),
        "t2d": torch.isin(torch.arange(VOCAB_SIZE), torch.tensor(DRAFTED)),
        "embed_tokens.weight": random(VOCAB_SIZE, size),
    }
    for norm in ("hidden_norm", "input_layernorm"):
        weights[f"{layer}.{norm}.weight"] = 1 + random(size)
    for norm in ("norm", *norms):
        widths = {"input_norm": 3 * HIDDEN, "q_norm": HEAD_DIM, "k_norm": HEAD_DIM}
        width = HIDDEN if norm.startswith("fc_norm") else widths.get(norm.split(".")[-1], size)
        weights[f"{norm}.weight"] = 1 + random(width)
    return weights


def write(folder: Path, name: str, weights: dict[str, torch.Tensor] | None = None, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    weights = make_weights(name) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(LAYOUTS[name][0] | changed))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return folder


def independent(
    name: str,
    weights: dict[str, torch.Tensor],
    embeds: torch.Tensor,
    taps: torch.Tensor,
    own: tuple = (),
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The published forward over all rows at once, written anew: `embeds` `(n, size)` and `taps` `(n, 3 * hidden)`, and
    then rows `own` that read features `(1, size)` of the draft, all at `positions` `(3, n)`, or 0, 1, 2 and so on.
    Returns what the next row reads, and the logits.
    """
    published, layer, norms, theta = LAYOUTS[name]

    def normed(rows: torch.Tensor, key: str) -> torch.Tensor:
        return rows * (rows.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{key}.weight"]

    def rotated(rows: torch.Tensor) -> torch.Tensor:
        places = torch.arange(rows.shape[1]).expand(3, -1) if positions is None else positions
        places = places[AXES.get(name, [0] * (HEAD_DIM // 2))].T
        angles = places * theta ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        first, second = rows.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def layer_of(each: str, residual: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
        def projected_by(kind: str, rows: torch.Tensor) -> torch.Tensor:
            bias = weights.get(f"{each}.self_attn.{kind}_proj.bias", torch.zeros(()))
            return rows @ weights[f"{each}.self_attn.{kind}_proj.weight"].T + bias

        def heads(kind: str, num: int) -> torch.Tensor:
            projected = projected_by(kind, joined)
            found, norm = projected.view(len(joined), num, HEAD_DIM).transpose(0, 1), f"{each}.self_attn.{kind}_norm"
            return (normed(found, norm) if norm in norms else found).repeat_interleave(NUM_HEADS // num, 0)

        query, key = rotated(heads("q", NUM_HEADS)), rotated(heads("k", NUM_SHARED))
        attended = scaled_dot_product_attention(query, key, heads("v", NUM_SHARED), is_causal=True)
        hidden = residual + projected_by("o", attended.transpose(0, 1).flatten(1))
        inner = normed(hidden, f"{each}.post_attention_layernorm")
        gate, up, down = (weights[f"{each}.mlp.{kind}_proj.weight"].T for kind in ("gate", "up", "down"))
        return hidden + (silu(inner @ gate) * (inner @ up)) @ down

    if "input_norm" in norms:
        taps = normed(taps, "input_norm")
    elif "fc_norm.0" in norms:
        parts = taps.chunk(3, dim=-1)
        taps = torch.cat([normed(part, norm) for part, norm in zip(parts, norms, strict=True)], dim=-1)
    features = torch.cat([taps @ weights["fc.weight"].T, *(feature for _, feature in own)])
    embeds = torch.cat([embeds, *(embed for embed, _ in own)])
    read = normed(features, f"{layer}.hidden_norm")
    residual = read if published.get("norm_before_residual") else features
    joined = torch.cat([normed(embeds, f"{layer}.input_layernorm"), read], dim=-1)
    hidden = layer_of(layer, residual, joined)
    for each in layers_of(name)[1:]:
        hidden = layer_of(each, hidden, normed(hidden, f"{each}.input_layernorm"))
    last = normed(hidden, "norm")
    return (last if published.get("norm_output") else hidden), last @ weights["lm_head.weight"].T


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_hidden_states_are_those_of_the_published_forward(name: str, tmp_path: Path) -> None:
    weights, target = make_weights(name), make_deep_target(architecture_of(name))
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", name), target)
    assert type(draft) is Eagle3DraftModel
    assert draft.feature_layers == taps_of(name)
    size = WIDTHS.get(name, HIDDEN)
    embeds, taps, embed = torch.randn(9, size), torch.randn(9, 3 * HIDDEN), torch.randn(1, size)
    expected, logits = independent(name, weights, embeds, taps)
    outputs = draft(inputs_embeds=embeds[None], features=draft.fuse(taps[None]), use_cache=True)
    torch.testing.assert_close(outputs.last_hidden_state[0], expected, atol=1e-4, rtol=1e-4)
    # A level deeper it reads what it said itself.
    expected, logits = independent(name, weights, embeds, taps, ((embed, expected[-1:]),))
    cache = {CACHE: outputs[CACHE]}
    outputs = draft(inputs_embeds=embed[None], features=outputs.last_hidden_state[:, -1:], use_cache=True, **cache)
    torch.testing.assert_close(outputs.last_hidden_state[0], expected[-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_picture", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_proposals_are_those_of_the_published_forward(name: str, with_picture: bool, tmp_path: Path) -> None:
    weights, target = make_weights(name), make_deep_target(architecture_of(name))
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", name), target)
    draft.tree_config = TreeConfig(num_nodes=17, depth=1, top_k=16, gate=False, ngrams=False)
    inputs = make_inputs(architecture_of(name), (1,) if with_picture else (0,), lengths=(12,))
    call = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [IMAGE_ID]}
    plain = target.generate(**inputs, **call)
    drafted = target.generate(**inputs, **call, assistant_model=draft)
    assert torch.equal(drafted.sequences, plain.sequences)
    # What the published forward proposes after each token, of the target's hidden states at those before it.
    ids = plain.sequences[0]
    pictures = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in pictures:
        pictures["mm_token_type_ids"] = (ids == IMAGE_ID).long()[None]
    states = target(input_ids=ids[None], output_hidden_states=True, **pictures).hidden_states
    taps = torch.cat([states[layer][0] for layer in taps_of(name)], dim=-1)
    table = weights["embed_tokens.weight"] if name in WIDTHS else target.get_input_embeddings().weight
    embeds = table[ids]  # of placeholders where pictures are
    positions = positions_of(ids.tolist())[:, :-1] if name in AXES else None
    _, logits = independent(name, weights, embeds[1:], taps[:-1], positions=positions)
    proposed = torch.tensor(DRAFTED)[logits.topk(16).indices]  # after token r + 1
    place, lengths = inputs["input_ids"].shape[1], []
    while place + 1 < len(ids):
        accepted = bool((proposed[place - 1] == ids[place + 1]).any())
        lengths.append(min(1 + accepted, len(ids) - 1 - place))
        place += lengths[-1]
    assert drafted.speculative_stats.acceptance_lengths[:, 0].tolist() == lengths
    assert drafted.speculative_stats.num_accepted > 0


# Each is compiled, half of them for sampling; the others sampled, or greedy, are slow and not compiled.
@pytest.mark.parametrize(
    ("name", "do_sample", "is_compiled"),
    [
        pytest.param(name, do_sample, is_compiled, marks=() if is_compiled else pytest.mark.slow)
        for place, name in enumerate(
            ("SafeAILab", "speculators, Qwen3-VL", "SpecForge, Qwen2.5-VL", "SpecForge, narrower")
        )
        for do_sample in (False, True)
        for is_compiled in (do_sample == place % 2,)
    ],
)
def test_batches_and_turns_equal_plain_ones(name: str, do_sample: bool, is_compiled: bool, tmp_path: Path) -> None:
    target = make_deep_target(architecture_of(name))
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "published", name), target)
    draft.tree_config = TreeConfig(num_nodes=12, depth=3, top_k=3, gate=False)
    draft.save_pretrained(tmp_path / "ours")
    again = AutoDraftModel.from_pretrained(tmp_path / "ours").eval()
    for key, value in draft.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    call = {"max_new_tokens": 24, "do_sample": do_sample, "return_dict_in_generate": True}
    whole = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled = {"compile_config": whole, "assistant_model": StaticRuntime(again)}
    inputs = make_inputs(architecture_of(name), (2, 0, 1))
    outputs = []
    for assisted in ({}, *([compiled] if is_compiled else []), {"assistant_model": again}):
        torch.manual_seed(2)
        first = target.generate(**inputs, **call, **assisted)
        ids = torch.cat([first.sequences, torch.full((3, 2), 7)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, ids.shape[1] - inputs["input_ids"].shape[1])], 1)
        second = target.generate(
            input_ids=ids, attention_mask=mask.long(), **call, **assisted, **{CACHE: first[CACHE]}
        )
        outputs.append((first, second))
    for plain, *drafted in zip(*outputs, strict=True):
        assert all(torch.equal(plain.sequences, own.sequences) for own in drafted)
        eager, *captured = (own.speculative_stats.acceptance_lengths for own in drafted)
        assert all(torch.equal(eager, own) for own in captured)
        assert drafted[0].speculative_stats.num_accepted > 0
    assert (compiled["assistant_model"].num_captures > 0) == is_compiled


@pytest.mark.parametrize("new_tokens", [(1,), (1, 1), (6,)])  # of turns before: one is drafted for by nobody
@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("name", ["SpecForge, Qwen2.5-VL", "SafeAILab"])
def test_a_turn_on_a_kept_cache_drafts_as_the_whole_conversation(
    name: str, with_picture: bool, new_tokens: tuple[int, ...], tmp_path: Path
) -> None:
    architecture = architecture_of(name)
    target = copy.deepcopy(make_deep_target(architecture)).double()
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", name), target, dtype=torch.float64)
    draft.tree_config = TreeConfig(num_nodes=12, depth=3, top_k=3, gate=False, ngrams=False)
    call = {"do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [IMAGE_ID]}
    # Transformers takes a picture in one of the turns: the last, or the first.
    prompts = [make_inputs(architecture, (number,), lengths=(9,)) for number in (not with_picture, with_picture)]
    ids, cache, pictures = prompts[0]["input_ids"], {}, {}
    turns = [(prompts[0], number) for number in new_tokens] + [(prompts[1], 6)]
    for turn, (prompt, num_new) in enumerate(turns):
        is_last, given = turn == len(new_tokens), prompt["input_ids"] if turn else ids[:, :0]
        given = given if is_last or turn == 0 else torch.full((1, 2), 7)
        ids = torch.cat([ids, given], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if architecture == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
        own = {key: prompt[key] for key in ("pixel_values", "image_grid_thw") if key in prompt}
        own = own if is_last or turn == 0 else {}
        pictures |= own
        kept = Spy(draft)
        output = target.generate(**inputs, **own, **call, max_new_tokens=num_new, assistant_model=kept, **cache)
        ids, cache = output.sequences, {CACHE: output[CACHE]}
    afresh = Spy(draft)
    plain = target.generate(**inputs, **pictures, **call, max_new_tokens=6, assistant_model=afresh)
    assert torch.equal(output.sequences, plain.sequences)
    assert_same_trees(kept.trees[0], afresh.trees[0])


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_positions_on_axes_are_looked_up_once_a_round_and_go_on_alike(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, depth = "SpecForge, Qwen2.5-VL", 4
    target = make_deep_target(architecture_of(name))
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", name), target)
    draft.tree_config = TreeConfig(num_nodes=12, depth=depth, top_k=2, gate=False, ngrams=False)
    inputs = make_inputs(architecture_of(name), (1,))
    length = 1 + int((inputs["input_ids"][0] == IMAGE_ID).nonzero()[-1])  # the prompt ends with its picture
    inputs = {
        key: value[:, :length] if value.shape[0] == 1 < value.ndim and key != "image_grid_thw" else value
        for key, value in inputs.items()
    }
    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        axes_of_target, "axis_positions", lambda *given: (found.append(axis_positions(*given)), found[-1])[1]
    )
    read: list[torch.Tensor] = []
    draft.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    call = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    runtime = {"assistant_model": draft if way == "eager" else StaticRuntime(draft)}
    runtime |= {} if way == "eager" else {"disable_compile": True}
    drafted = target.generate(**inputs, **call, **runtime)
    assert torch.equal(drafted.sequences, target.generate(**inputs, **call).sequences)
    # Once more for the prompt, and for what a next turn goes on from.
    assert len(found) <= 2 * len(drafted.speculative_stats.acceptance_lengths) + 2
    # Behind the last token of the picture, which stands at row and column 1 of it, and on from there.
    levels = [positions[..., 0] for positions in read if positions.shape[-1] == 2][: depth - 1]
    last = positions_of(inputs["input_ids"][0].tolist())[:, -1:]
    assert [level.tolist() for level in levels] == [(last + 1 + level).tolist() for level in range(depth - 1)]


def test_what_the_user_sees_is_what_was_asked_for(target: PreTrainedModel, tmp_path: Path) -> None:
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", "SafeAILab"), target)
    inputs = make_inputs("llava", (1,))
    call = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": [1]}
    plain, drafted = (target.generate(**inputs, **call, **own) for own in ({}, {"assistant_model": draft}))
    for own, theirs in zip(drafted.hidden_states, plain.hidden_states, strict=True):
        assert [state is None for state in own] == [state is None for state in theirs]


def broken(weights: dict[str, torch.Tensor], **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {key: value for key, value in (weights | changed).items() if value is not None}


WHOLE = make_weights("SafeAILab")
BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no map": (broken(WHOLE, d2t=None), {}, "must say by `d2t`"),
    "a map that is a look-up": (broken(WHOLE, d2t=torch.tensor(DRAFTED)), {}, "must hold offsets"),
    "maps that differ": (broken(WHOLE, t2d=~WHOLE["t2d"]), {}, "must hold offsets"),
    "no head": (broken(WHOLE, **{"lm_head.weight": None}), {}, "got no `lm_head.weight`"),
    "lost embeddings of its own": (
        broken(WHOLE, **{"embed_tokens.weight": None}),
        {"embed_requires_grad": True},
        "must hold its embeddings",
    ),
    "another width without embeddings": (
        broken(make_weights("SpecForge, narrower"), **{"embed_tokens.weight": None}),
        LAYOUTS["SpecForge, narrower"][0],
        "must hold its embeddings",
    ),
    "a lost norm": (broken(WHOLE, **{"norm.weight": None}), {}, "missing \\['norm.weight'\\]"),
    "one tensor more": (broken(WHOLE, more=torch.ones(2)), {}, "unexpected \\['more'\\]"),
    "another width": (broken(WHOLE, **{"fc.weight": torch.ones(HIDDEN, HIDDEN)}), {}, "fc.weight"),
    "not finite": (broken(WHOLE, **{"fc.weight": WHOLE["fc.weight"] / 0}), {}, "must be finite"),
    "integers": (broken(WHOLE, **{"fc.weight": WHOLE["fc.weight"].int()}), {}, "must be of floating point.*int32"),
    "8 bits": (
        broken(WHOLE, **{"fc.weight": WHOLE["fc.weight"].to(torch.float8_e4m3fn)}),
        {},
        "16 bits or more, got torch.float8_e4m3fn",
    ),
    "a kind that is no word": (WHOLE, {"model_type": ["llama"]}, "`model_type` in .* must be a string"),
    "a target of another width": (WHOLE, {"target_hidden_size": 64}, "reads a target of 64"),
    "layers that are not there": (
        WHOLE,
        {"eagle_aux_hidden_state_layer_ids": [2, 16, 29]},
        "got one of 8 layers",
    ),
    "heads of less than nothing": (WHOLE, {"head_dim": -8}, "makes none"),
    "maps of another kind": (broken(WHOLE, t2d=WHOLE["t2d"].float().to(torch.float8_e5m2)), {}, "makes none"),
    "a window": (WHOLE, {"layer_types": ["sliding_attention"], "sliding_window": 64}, "see a window of 64"),
    "settings that are a word": (
        WHOLE,
        {"rope_scaling": "yarn"},
        "must be settings of all of its layers or null, got 'yarn'",
    ),
    "axes of another head": (
        WHOLE,
        {"rope_scaling": {"type": "default", "mrope_section": [4, 4, 4]}},
        "must divide the 6 frequencies",
    ),
}


SPECULATORS = make_weights("speculators")
OF_SPECULATORS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "norms that nothing is said of": (SPECULATORS, {"norm_before_residual": None}, "must say `norm_before_residual`"),
    "norms in a word": (SPECULATORS, {"norm_before_residual": "false"}, "must be true or false, got 'false'"),
    "an output in a number": (SPECULATORS, {"norm_output": 1}, "`norm_output` in .* must be true or false, got 1"),
    "a lost layer": (
        SPECULATORS,
        {"transformer_layer_config": LAYOUTS["speculators"][0]["transformer_layer_config"] | {"num_hidden_layers": 3}},
        "of 3 layers, got those of 1",
    ),
}


@pytest.mark.parametrize("name", OF_SPECULATORS)
def test_speculators_is_taken_at_its_word(name: str, target: PreTrainedModel, tmp_path: Path) -> None:
    weights, changed, message = OF_SPECULATORS[name]
    with pytest.raises(ValueError, match=message):
        AutoDraftModel.from_pretrained(write(tmp_path / "draft", "speculators", weights, **changed), target)


@pytest.mark.parametrize("name", BAD)
def test_what_would_draft_badly_in_silence_is_refused(name: str, target: PreTrainedModel, tmp_path: Path) -> None:
    weights, changed, message = BAD[name]
    folder = write(tmp_path / "draft", "SafeAILab", weights, **changed)
    with pytest.raises(ValueError, match=message):
        AutoDraftModel.from_pretrained(folder, target)


def test_speculators_must_say_what_is_added(target: PreTrainedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "draft", "speculators")
    config = json.loads((folder / "config.json").read_text())
    del config["norm_before_residual"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must say `norm_before_residual`"):
        AutoDraftModel.from_pretrained(folder, target)


def test_embeddings_of_its_own_need_ids(target: PreTrainedModel, tmp_path: Path) -> None:
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", "SpecForge, narrower"), target)
    ids = make_inputs("llava", (0,))["input_ids"]
    call = {"inputs_embeds": target.get_input_embeddings()(ids), "max_new_tokens": 6, "do_sample": False}
    with pytest.raises(ValueError, match="needs `input_ids`, got `inputs_embeds` alone"):
        target.generate(**call, assistant_model=draft)
    plain = target.generate(**call)
    assert torch.equal(target.generate(input_ids=ids, **call, assistant_model=draft)[:, ids.shape[1] :], plain)


def test_a_draft_of_another_width_must_own_embeddings() -> None:
    text_config = LlamaConfig(**SIZES)
    with pytest.raises(ValueError, match="must have `own_embeddings`"):
        Eagle3Config(text_config=text_config, target_hidden_size=2 * HIDDEN)
    with pytest.raises(ValueError, match="reads no visual features"):
        Eagle3Config(text_config=text_config, own_embeddings=True, reads_placeholders=False)
    config = Eagle3Config(text_config=text_config, own_embeddings=True, target_hidden_size=2 * HIDDEN)
    with pytest.raises(ValueError, match="a target of `hidden_size` 64, got LlavaConfig with 32"):
        Eagle3DraftModel(config).check_target(make_deep_target("llava").config)


def test_drafts_of_ours_need_no_target(target: PreTrainedModel, tmp_path: Path) -> None:
    MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained(tmp_path / "msd")
    assert type(AutoDraftModel.from_pretrained(tmp_path / "msd")) is MSDDraftModel
    folder = write(tmp_path / "eagle3", "SafeAILab")
    with pytest.raises(ValueError, match="needs its target"):
        AutoDraftModel.from_pretrained(folder)
    config = copy.deepcopy(target.config)
    config.dtype = config.text_config.dtype = torch.float16  # is not looked at: the draft keeps its own
    draft = AutoDraftModel.from_pretrained(folder, config)
    assert draft.config.visual_token_ids == [IMAGE_ID]
    assert draft.dtype == torch.float32
    with pytest.raises(ValueError, match="must be the config of a target"):
        AutoDraftModel.from_pretrained(folder, "a/target")
    assert AutoDraftModel.from_pretrained(folder, target, torch.bfloat16).dtype == torch.bfloat16


def test_command_converts_and_cuts_no_head(target: PreTrainedModel, tmp_path: Path) -> None:
    target.save_pretrained(tmp_path / "target")
    write(tmp_path / "published", "SafeAILab")
    words = f"convert {tmp_path}/published --target_model {tmp_path}/target --output {tmp_path}/draft"
    main(words.split())
    assert type(AutoDraftModel.from_pretrained(tmp_path / "draft")) is Eagle3DraftModel
    with pytest.raises(SystemExit, match="a head of its own"):
        main([*words.split(), "--draft_vocab_size", "8", "--counts_from", "a/b"])


@torch.no_grad()
def test_casting_leaves_positions_precise(target: PreTrainedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "draft", "SafeAILab")
    whole, half = (AutoDraftModel.from_pretrained(folder, target, dtype) for dtype in (None, torch.bfloat16))
    assert half.fc.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    assert half.config.name_or_path == str(folder)


def test_layers_to_read_can_be_named(target: PreTrainedModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "draft", "SafeAILab")
    draft = AutoDraftModel.from_pretrained(folder, target, feature_layers=[2, 4, 6])
    assert draft.feature_layers == (2, 4, 6)
    draft.save_pretrained(tmp_path / "ours")
    assert AutoDraftModel.from_pretrained(tmp_path / "ours", target.config).feature_layers == (2, 4, 6)
    with pytest.raises(ValueError, match="as many as 3"):
        AutoDraftModel.from_pretrained(folder, target, feature_layers=[2])
    with pytest.raises(ValueError, match="got one of 8 layers"):
        AutoDraftModel.from_pretrained(folder, target, feature_layers=[2, 4, 60])
    for odd in (3, "246", [2, 4, "6"], [2, 4, None]):
        with pytest.raises(ValueError, match="as many as 3, got"):
            AutoDraftModel.from_pretrained(folder, target, feature_layers=odd)


def test_the_targets_factor_of_logits_is_not_the_drafts(target: PreTrainedModel, tmp_path: Path) -> None:
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", "SafeAILab"), target)
    features = torch.randn(1, 2, HIDDEN)
    logits = draft.logits(features, None)  # nothing of the target is asked
    assert torch.equal(logits[..., DRAFTED], draft.head(draft.norm(features)))


def test_hidden_states_are_read_before_pictures_are_added_to_them_in_later_layers():
    target = make_model("qwen3_vl")
    assert target.config.vision_config.deepstack_visual_indexes == [0, 1]
    inputs = make_prompts(target, "pictures", (12,))
    read, said = [], []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])
        said.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in target.get_decoder().layers]
    config = Eagle3Config.from_target(target.config, feature_layers=[0, 1], intermediate_size=16)
    draft = Eagle3DraftModel(config).eval()
    draft.choose_tokens(torch.ones(VOCAB_SIZE), target.get_output_embeddings())
    fed = []
    draft.fc.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    output = target.generate(**inputs, assistant_model=draft, max_new_tokens=6, do_sample=False)
    for hook in hooks:
        hook.remove()
    num_rows = fed[0].shape[1]
    torch.testing.assert_close(fed[0], torch.cat([read[0], said[0]], dim=-1)[:, :num_rows])
    assert (read[1] - said[0]).abs().max() > 0.1
    assert torch.equal(output, target.generate(**inputs, max_new_tokens=6, do_sample=False))
