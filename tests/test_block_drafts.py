"""Block drafts: as published and of our own designs, against a forward of their own, and as drafts in `generate`."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_eagle3 import make_deep_target
from test_msd_drafter import Spy, assert_same_trees
from torch.nn.functional import silu
from transformers import CompileConfig, GraniteConfig, GraniteForCausalLM, PreTrainedModel, Qwen3Config
from zoo import IMAGE_ID, TEXT, VIDEO_ID, VOCAB_SIZE, make_inputs, make_target

from transformers_msd import AutoDraftModel, BlockDraftConfig, BlockDraftModel, StaticRuntime, TokenTree, TreeConfig
from transformers_msd.compat import CACHE
from transformers_msd.costs.calibration import save_costs
from transformers_msd.drafters.block_candidates import BlockCandidateGenerator
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.models.block import configuration_block
from transformers_msd.models.exporting import export_draft
from transformers_msd.trees.growing import grow_tree
from transformers_msd.tuning import measure_costs


NUM_LAYERS, HIDDEN, NUM_HEADS, NUM_SHARED, HEAD_DIM, INTERMEDIATE = 8, 32, 4, 2, 12, 48
MASK_ID, BLOCK_SIZE = 88, 6
SIZES = {
    "architectures": ["DFlashDraftModel"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_SHARED,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "rope_theta": 2e4,
    "block_size": BLOCK_SIZE,
    "num_target_layers": NUM_LAYERS,
}
NORMS = ("q_norm", "k_norm")
NUM_KNOWN = 40
OF_SPECULATORS = {
    "transformer_layer_config": {
        key: value for key, value in SIZES.items() if key not in ("architectures", "block_size")
    }
    | {"num_target_layers": NUM_LAYERS},
    "block_size": BLOCK_SIZE,
    "mask_token_id": MASK_ID,
    "aux_hidden_state_layer_ids": [2, 4, 5],
}
# Of each layout: its config, how many layers it has, norms of these besides, and the hidden states that it reads.
LAYOUTS: dict[str, tuple[dict[str, Any], int, tuple[str, ...], list[int]]] = {
    "DFlash": (SIZES | {"dflash_config": {"mask_token_id": MASK_ID}}, 2, NORMS, [2, 4, 6]),
    "DFlash, layers named": (
        SIZES
        | {"block_size": None}
        | {"dflash_config": {"mask_token_id": MASK_ID, "target_layer_ids": [0, 3, 7], "block_size": BLOCK_SIZE}},
        1,
        NORMS,
        [1, 4, 8],
    ),
    "JetSpec": (SIZES | {"dflash_config": {"mask_token_id": MASK_ID, "causal_head": True}}, 2, NORMS, [2, 4, 6]),
    "DFlash of a Llama": (
        SIZES | {"dflash_config": {"mask_token_id": MASK_ID, "causal": True}, "rope_theta": None},
        2,
        (),
        [2, 4, 6],
    ),
    "DFlash, windows": (
        SIZES
        | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "use_sliding_window": True}
        | {"dflash_config": {"mask_token_id": MASK_ID}},
        2,
        NORMS,
        [2, 4, 6],
    ),
    "DFlash 2": (
        SIZES
        | {"architectures": ["DFlash2DraftModel"], "is_causal": False, "layer_types": ["sliding_attention"] * 2}
        | {"sliding_window": 4, "use_sliding_window": True}
        | {
            "dflash_config": {"mask_token_id": MASK_ID, "conv_kernel_size": 2, "conv_group_size": 8}
            | {"selector_rank": 5, "selector_top_k": 16, "target_layer_ids": [1, 3, 5], "input_embedding_scale": 0.5}
            | {"output_multiplier": 0.5, "final_logit_softcapping": 3}
        },
        2,
        NORMS,
        [2, 4, 6],
    ),
    "DSpark": (
        SIZES
        | {"architectures": ["Qwen3DSparkModel"], "mask_token_id": MASK_ID, "target_layer_ids": [-1, 3, 6]}
        | dict.fromkeys(
            ("rope_is_neox_style", "sample_from_anchor", "draft_vocab_size", "num_target_layers")
        )  # as null
        | {"markov_rank": 5, "markov_head_type": "vanilla", "enable_confidence_head": True},
        2,
        NORMS,
        [0, 4, 7],
    ),
    "DSpark of Liquid": (
        SIZES
        | {"architectures": ["Lfm2DSparkModel"]}
        | {"dflash_config": {"projector_type": "dspark", "mask_token_id": MASK_ID, "markov_rank": 5}},
        1,
        NORMS,
        [2, 4, 6],
    ),
    "DFlash of speculators": (
        OF_SPECULATORS
        | {"architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "draft_vocab_size": NUM_KNOWN},
        2,
        NORMS,
        [2, 4, 5],
    ),
    "DFlash 2 of speculators": (
        OF_SPECULATORS
        | {"architectures": ["DFlash2DraftModel"], "speculators_model_type": "dflash2", "draft_vocab_size": VOCAB_SIZE}
        | {"conv_kernel_size": 3, "conv_group_size": 4, "selector_rank": 5, "selector_top_k": 16},
        1,
        NORMS,
        [2, 4, 5],
    ),
    "DSpark of speculators": (
        OF_SPECULATORS
        | {"architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "draft_vocab_size": NUM_KNOWN}
        | {"markov_rank": 5, "markov_head_type": "gated"},
        2,
        NORMS,
        [2, 4, 5],
    ),
    "DSpark of speculators, all tokens": (
        OF_SPECULATORS
        | {"architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "draft_vocab_size": VOCAB_SIZE}
        | {"markov_rank": 5, "sample_from_anchor": False},
        1,
        NORMS,
        [2, 4, 5],
    ),
}
# Drafts of ours.
DESIGNS: dict[str, dict[str, Any]] = {
    "embeddings alone": {"reads_feature": False},
    "two layers, edges": {"num_hidden_layers": 2, "edge_rank": 5},
    "fewer tokens, a whole block": {"draft_vocab_size": 40, "causal": False},
    "decoupled": {"visual_rows": "decoupled", "predicts_next": False},
    "dropped": {"visual_rows": "dropped", "mask_token_id": MASK_ID},
    "a token as mask": {"mask_token_id": MASK_ID},
    "windows, convolutions": {
        "num_hidden_layers": 2,
        "causal": [True, False],
        "windows": [6, 4],
        "conv_kernel_size": 2,
        "conv_group_size": 8,
        "edge_rank": 5,
        "edge_type": "bilinear",
    },
}
SAMPLED_IF_CAPTURED = ("JetSpec", "two layers, edges", "dropped")


def random_weights(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * 0.3


def make_weights(name: str) -> dict[str, torch.Tensor]:
    _, num_layers, norms, layers = LAYOUTS[name]
    generator = torch.Generator().manual_seed(1)
    wide, shared = NUM_HEADS * HEAD_DIM, NUM_SHARED * HEAD_DIM
    published = LAYOUTS[name][0]
    settings = published | published.get("dflash_config", {})
    taps, group = settings.get("conv_kernel_size", 0), settings.get("conv_group_size", 1)
    shapes = {"fc.weight": (HIDDEN, len(layers) * HIDDEN), "hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
    for layer in range(num_layers):
        shapes |= {
            f"layers.{layer}.self_attn.q_proj.weight": (wide, HIDDEN),
            f"layers.{layer}.self_attn.k_proj.weight": (shared, HIDDEN),
            f"layers.{layer}.self_attn.v_proj.weight": (shared, HIDDEN),
            f"layers.{layer}.self_attn.o_proj.weight": (HIDDEN, wide),
            f"layers.{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"layers.{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"layers.{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"layers.{layer}.input_layernorm.weight": (HIDDEN,),
            f"layers.{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
        shapes |= {f"layers.{layer}.self_attn.{norm}.weight": (HEAD_DIM,) for norm in norms}
        if taps:
            for part in ("attention", "mlp"):
                shapes[f"layers.{layer}.{part}_conv.base_kernel"] = (2, taps, HIDDEN)
                shapes[f"layers.{layer}.{part}_conv.kernel_projection.weight"] = (2 * taps * HIDDEN // group, HIDDEN)
    num_known, rank = (published.get("draft_vocab_size") or VOCAB_SIZE), 5 if "DSpark" in name else 0
    if rank:
        shapes |= {
            "markov_head.markov_w1.weight": (VOCAB_SIZE, rank),
            "markov_head.markov_w2.weight": (num_known, rank),
            "confidence_head.proj.weight": (1, HIDDEN + rank),
        }
        if published.get("markov_head_type") == "gated":
            shapes |= {"markov_head.gate_proj.weight": (rank, HIDDEN + rank), "markov_head.gate_proj.bias": (rank,)}
    if taps:
        end = ".weight" if "speculators" not in name else ""
        shapes |= {
            f"candidate_selector.{kind}_codebook{end}": (VOCAB_SIZE, 5) for kind in ("predecessor", "successor")
        }
        shapes["candidate_selector.hidden_projection.weight"] = (5, HIDDEN)
    if rank or num_known != VOCAB_SIZE:
        shapes |= {"embed_tokens.weight": (VOCAB_SIZE, HIDDEN), "lm_head.weight": (num_known, HIDDEN)}
    drawn = {key: random_weights(generator, *shape) for key, shape in shapes.items()}
    weights = {key: value + 1 if value.ndim == 1 else value for key, value in drawn.items()}
    if rank:
        weights["markov_head.markov_w2.weight"] *= 10  # what a parent adds is as large as what a block says
    if num_known != VOCAB_SIZE:
        weights["d2t"] = known_tokens(num_known) - torch.arange(num_known)
        weights["t2d"] = torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill(0, known_tokens(num_known), True)
    return weights


def known_tokens(number: int) -> torch.Tensor:
    """Tokens of the target that a smaller head knows."""
    return (torch.arange(number) * VOCAB_SIZE / number).long()


def write(folder: Path, name: str, weights: dict[str, torch.Tensor] | None = None, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    published, num_layers, norms, _ = LAYOUTS[name]
    kind = {"model_type": "qwen3" if norms else "llama", "num_hidden_layers": num_layers}
    if "transformer_layer_config" in published:
        kind = {"transformer_layer_config": published["transformer_layer_config"] | kind}
    (folder / "config.json").write_text(json.dumps(published | kind | changed))
    save_file(make_weights(name) if weights is None else weights, folder / "model.safetensors")
    return folder


def make_draft(target: torch.nn.Module, name: str, **settings: Any) -> BlockDraftModel:
    """Make a draft of ours of random weights."""
    overrides = {"block_size": BLOCK_SIZE, "intermediate_size": INTERMEDIATE, "feature_layers": [1, -1]} | settings
    draft = BlockDraftModel(BlockDraftConfig.from_target(target.config, **overrides | DESIGNS.get(name, {}))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.copy_(random_weights(generator, *weight.shape) + (weight.ndim == 1))
        if draft.edge_to is not None:
            draft.edge_to.weight.mul_(10)  # what a parent adds is as large as what a block says
    if draft.head is not None:
        draft.choose_tokens(torch.arange(VOCAB_SIZE) % 7, target.get_output_embeddings())
    return draft


def make_any(name: str, target: torch.nn.Module, folder: Path) -> BlockDraftModel:
    if name in DESIGNS:
        return make_draft(target, name)
    return AutoDraftModel.from_pretrained(write(folder, name), target)


class Independent:
    """
    The published forward of a block, written anew.

    Args:
        draft: Lends its weights, and settings where it is one of ours.
        name: The draft.
    """

    def __init__(self, draft: BlockDraftModel, name: str) -> None:
        self.config, self.name = draft.config, name
        if name in LAYOUTS:
            published, self.num_layers, norms, _ = LAYOUTS[name]
            self.weights, own = make_weights(name), published.get("dflash_config", {})
            self.causal = [own.get("causal_head") or own.get("causal") or False] * self.num_layers
            self.windows, self.scale = [math.inf] * self.num_layers, own.get("input_embedding_scale", 1.0)
            if "layer_types" in published:
                self.windows = [
                    published["sliding_window"] if kind == "sliding_attention" else math.inf
                    for kind in published["layer_types"]
                ]
                self.causal = [published.get("is_causal", window != math.inf) for window in self.windows]
            self.group = (published | own).get("conv_group_size")
            self.multiplier, self.cap = own.get("output_multiplier", 1.0), own.get("final_logit_softcapping")
            self.shifted = "DSpark" in name and published.get("sample_from_anchor") is not False
            self.eps, self.theta = 1e-5, 1e4 if name == "DFlash of a Llama" else 2e4
            self.heads, self.has_norms = (NUM_HEADS, NUM_SHARED, HEAD_DIM), bool(norms)
        else:
            text, settings = draft.config.text_config, DESIGNS[name]
            self.weights = {key.removeprefix("model."): value for key, value in draft.state_dict().items()}
            self.num_layers, self.shifted = settings.get("num_hidden_layers", 1), settings.get("predicts_next", True)
            given, self.scale = settings.get("causal", True), 1.0
            self.causal = given if isinstance(given, list) else [given] * self.num_layers
            self.windows = settings.get("windows", [math.inf] * self.num_layers)
            self.group = settings.get("conv_group_size")
            self.multiplier, self.cap = 1.0, None
            self.eps, self.theta = text.rms_norm_eps, 1e4
            self.heads, self.has_norms = (4, 2, text.head_dim), True

        # Tokens that a head knows, and what a token adds to the scores of these.
        self.tokens, self.head, self.edges, self.edge_row = torch.arange(VOCAB_SIZE), None, None, None
        if name in LAYOUTS:
            if (num_known := (published.get("draft_vocab_size") or VOCAB_SIZE)) != VOCAB_SIZE:
                self.tokens, self.head = known_tokens(num_known), self.weights["lm_head.weight"]
            if "DSpark" in name:
                self.edges = [self.weights[f"markov_head.markov_w{number}.weight"] for number in (1, 2)]
            if "DFlash 2" in name:
                selector = {key.split(".")[1]: own for key, own in self.weights.items() if "selector" in key}
                self.edges = [selector["predecessor_codebook"], selector["successor_codebook"]]
                self.edge_row = selector["hidden_projection"]
        else:
            if draft.head is not None:
                self.tokens, self.head = draft.draft_token_ids, draft.head.weight
            if draft.edge_to is not None:
                self.edges = [draft.edge_from.weight, draft.edge_to.weight[self.tokens]]
            if draft.edge_row is not None:
                self.edge_row = draft.edge_row.weight

    def normed(self, rows: torch.Tensor, key: str) -> torch.Tensor:
        return rows * (rows.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weights[f"{key}.weight"]

    def projected(self, layer: int, rows: torch.Tensor, kind: str, places: torch.Tensor) -> torch.Tensor:
        """Heads `(num_heads, n, head_dim)`, rotated but for values."""
        num_heads, num_shared, head_dim = self.heads
        number = num_heads if kind == "q" else num_shared
        found = rows @ self.weights[f"layers.{layer}.self_attn.{kind}_proj.weight"].T
        found = found.view(len(rows), number, head_dim).transpose(0, 1)
        if kind != "v":
            if self.has_norms:
                found = self.normed(found, f"layers.{layer}.self_attn.{kind}_norm")
            angles = places[:, None] * self.theta ** (-torch.arange(0, head_dim, 2) / head_dim)
            cos, sin = angles.cos(), angles.sin()
            if "Liquid" in self.name:  # two values side by side
                first, second = found[..., ::2], found[..., 1::2]
                found = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
            else:
                first, second = found.chunk(2, dim=-1)
                found = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return found.repeat_interleave(num_heads // number, 0)

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.multiplier
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def mixed(self, layer: int, part: str, rows: torch.Tensor, side: int, chosen: torch.Tensor) -> torch.Tensor:
        """Rows of a block with those before them, each weighed by what is fixed and what is chosen, by groups."""
        base = self.weights[f"layers.{layer}.{part}_conv.base_kernel"][side]
        found = torch.zeros_like(rows)
        for row, tap in product(range(len(rows)), range(len(base))):
            if row >= tap:
                found[row] += (base[tap] + chosen[row, side, tap].repeat_interleave(self.group)) * rows[row - tap]
        return found

    def with_convolution(
        self, layer: int, part: str, rows: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        key = f"layers.{layer}.{part}_conv"
        if f"{key}.base_kernel" not in self.weights:
            return run(rows)
        taps = self.weights[f"{key}.base_kernel"].shape[1]
        chosen = (rows @ self.weights[f"{key}.kernel_projection.weight"].T).view(len(rows), 2, taps, -1)
        return self.mixed(layer, part, run(self.mixed(layer, part, rows, 0, chosen)), 1, chosen)

    def context(
        self, states: torch.Tensor, embeds: torch.Tensor, is_visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read of tokens by the target's states `(n, m)`, and their places."""
        fused, kept = states @ self.weights["fc.weight"].T, torch.ones_like(is_visual)
        how = DESIGNS.get(self.name, {}).get("visual_rows", "kept")
        if how == "decoupled":
            fused[is_visual] = embeds[is_visual] @ self.weights["visual_fc.weight"].T
        if how == "dropped":
            kept = ~is_visual
        return self.normed(fused, "hidden_norm")[kept], torch.arange(len(states))[kept]

    def __call__(
        self, known: tuple[torch.Tensor, torch.Tensor], root: torch.Tensor, mask: torch.Tensor, place: int
    ) -> torch.Tensor:
        """What a head reads of each level: from what is known, and a block of a root at a place, and of masks."""
        read, places = known
        hidden = torch.stack([root, *[mask] * (BLOCK_SIZE - 1)])
        if "join.weight" in self.weights:  # what is known before the root stands last
            hidden = torch.cat([hidden, read[-1:].expand_as(hidden)], dim=-1) @ self.weights["join.weight"].T
        own = torch.arange(place, place + BLOCK_SIZE)
        for layer in range(self.num_layers):

            def attend(rows: torch.Tensor, layer: int = layer) -> torch.Tensor:
                query = self.projected(layer, rows, "q", own)
                keys, values = (
                    torch.cat([self.projected(layer, read, kind, places), self.projected(layer, rows, kind, own)], 1)
                    for kind in "kv"
                )
                distance = own[:, None] - torch.cat([places, own])
                sees = distance.abs() < self.windows[layer]
                if self.causal[layer]:
                    sees &= distance >= 0
                scores = (query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5).masked_fill(~sees, -torch.inf)
                attended = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
                return attended @ self.weights[f"layers.{layer}.self_attn.o_proj.weight"].T

            def feed(rows: torch.Tensor, layer: int = layer) -> torch.Tensor:
                gate, up, down = (
                    self.weights[f"layers.{layer}.mlp.{kind}_proj.weight"].T for kind in ("gate", "up", "down")
                )
                return (silu(rows @ gate) * (rows @ up)) @ down

            rows = self.normed(hidden, f"layers.{layer}.input_layernorm")
            hidden = hidden + self.with_convolution(layer, "attention", rows, attend)
            rows = self.normed(hidden, f"layers.{layer}.post_attention_layernorm")
            hidden = hidden + self.with_convolution(layer, "mlp", rows, feed)
        return self.normed(hidden, "norm")[0 if self.shifted else 1 :]


def make_scaled_target(architecture: str) -> PreTrainedModel:
    if architecture != "granite":
        return make_deep_target(architecture)
    torch.manual_seed(0)
    scales = {"embedding_multiplier": 12.0, "logits_scaling": 8.0}
    target = GraniteForCausalLM(GraniteConfig(**TEXT | {"num_hidden_layers": NUM_LAYERS}, **scales)).eval()
    target.generation_config.eos_token_id = None
    return target


# Gemma's layers read other embeddings than are stored, and Granite says other logits than its head; published drafts
# do not.
@pytest.mark.parametrize("with_picture", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *((name, "llava") for name in (*LAYOUTS, *DESIGNS)),
        *product(["DFlash", "DFlash 2"], ["gemma3"]),
        *product(["DFlash 2", "DSpark", "DSpark of speculators"], ["granite"]),
    ],
)
@torch.no_grad()
def test_proposals_are_those_of_a_forward_of_its_own(
    name: str, architecture: str, with_picture: bool, tmp_path: Path
) -> None:
    target = make_scaled_target(architecture)
    draft = make_any(name, target, tmp_path / "draft")
    if name in LAYOUTS:
        assert draft.feature_layers == tuple(LAYOUTS[name][3])
    width = 8
    paths = [*product(range(width)), *product(range(width), repeat=2)]
    draft.tree_config = TreeConfig(depth=2, topology=paths, gate=False, ngrams=False)
    kind = "llama" if architecture == "granite" else architecture
    inputs = make_inputs(kind, (1,) if with_picture else (0,), lengths=(12,))
    call = {"max_new_tokens": 48, "do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [IMAGE_ID]}
    plain = target.generate(**inputs, **call)
    drafted = target.generate(**inputs, **call, assistant_model=draft)
    assert torch.equal(drafted.sequences, plain.sequences)

    ids, stored = plain.sequences[0], target.get_input_embeddings().weight
    pictures = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
    for kind in {"mm_token_type_ids", "token_type_ids"} & pictures.keys():
        pictures[kind] = (ids == IMAGE_ID).long()[None]
    states = [state[0] for state in target(input_ids=ids[None], output_hidden_states=True, **pictures).hidden_states]
    taps = torch.cat([states[layer] for layer in draft.feature_layers], dim=-1)
    independent, is_visual = Independent(draft, name), ids == IMAGE_ID
    mask_id = draft.config.mask_token_id
    mask = independent.weights["mask_embedding"] if mask_id is None else stored[mask_id] * independent.scale
    head = target.get_output_embeddings().weight if independent.head is None else independent.head

    def children(read: torch.Tensor, parent: int) -> list[int]:
        """The best tokens of a level: among the best of all, after what the parent adds."""
        best = independent.scaled(read @ head.T).topk(4 * width)
        scores = best.values
        if independent.edges is not None:
            edges = independent.edges[0][parent]
            if independent.edge_row is not None:
                edges = edges * (independent.edge_row @ read)
            if "markov_head.gate_proj.bias" in independent.weights:
                weight, bias = (independent.weights[f"markov_head.gate_proj.{kind}"] for kind in ("weight", "bias"))
                edges = edges * (weight @ torch.cat([read, edges]) + bias).sigmoid()
            scores = scores + independent.edges[1][best.indices] @ edges
        return independent.tokens[best.indices[scores.topk(width).indices]].tolist()

    place, lengths = inputs["input_ids"].shape[1], []
    while place + 1 < len(ids):
        known = independent.context(taps[:place], states[0][:place], is_visual[:place])
        levels = independent(known, stored[ids[place]] * independent.scale, mask, place)
        following = ids[place + 1 : place + 3].tolist()
        accepted = int(following[0] in children(levels[0], int(ids[place])))
        if accepted and len(following) == 2:
            accepted += following[1] in children(levels[1], following[0])
        lengths.append(min(1 + accepted, len(ids) - 1 - place))
        place += lengths[-1]
    assert drafted.speculative_stats.acceptance_lengths[:, 0].tolist() == lengths
    assert drafted.speculative_stats.num_accepted > 0


ARCHITECTURE_OF = {
    "DFlash": "llava",
    "DFlash, windows": "qwen2_5_vl",
    "DFlash 2": "gemma3",
    "windows, convolutions": "llava",
    "DSpark of Liquid": "gemma3",
    "DSpark of speculators": "qwen2_5_vl",
    "JetSpec": "qwen2_5_vl",
    "embeddings alone": "qwen2_5_vl",
    "two layers, edges": "llava",
    "fewer tokens, a whole block": "gemma3",
    "decoupled": "qwen2_5_vl",
    "dropped": "llava",
    "a token as mask": "llava",
}


# Each is compiled, some of them for sampling; the others sampled, or greedy, are slow and not compiled.
@pytest.mark.parametrize(
    ("name", "architecture", "do_sample", "is_compiled"),
    [
        pytest.param(*case, do_sample, is_compiled, marks=() if is_compiled else pytest.mark.slow)
        for case in ARCHITECTURE_OF.items()
        for do_sample in (False, True)
        for is_compiled in (do_sample == (case[0] in SAMPLED_IF_CAPTURED),)
    ],
)
def test_batches_and_turns_equal_plain_ones(
    name: str, architecture: str, do_sample: bool, is_compiled: bool, tmp_path: Path
) -> None:
    target = make_target(architecture) if name in DESIGNS else make_deep_target(architecture)
    draft = make_any(name, target, tmp_path / "published")
    draft.tree_config = TreeConfig(num_nodes=12, depth=3, top_k=3, gate=False, ngrams=False)
    draft.save_pretrained(tmp_path / "ours")
    again = AutoDraftModel.from_pretrained(tmp_path / "ours").eval()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in draft.state_dict().items())
    call = {"max_new_tokens": 24, "do_sample": do_sample, "return_dict_in_generate": True}
    call["suppress_tokens"] = [IMAGE_ID, VIDEO_ID]
    inputs = make_inputs(architecture, (2, 0, 1))
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
    settings: dict[str, dict[str, Any]] = {"plain": {}}
    if is_compiled:  # first, as by a user who compiles from the start
        settings["captured"] = {"assistant_model": StaticRuntime(again), "compile_config": compiled}
    settings["eager"] = {"assistant_model": Spy(again)}
    outputs = []
    for assisted in settings.values():
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
        lengths = [own.speculative_stats.acceptance_lengths for own in drafted]
        assert all(torch.equal(lengths[0], own) for own in lengths)
    assert "captured" not in settings or settings["captured"]["assistant_model"].num_captures > 0
    # A turn on a kept cache drafts as one that runs all of it.
    spies = [Spy(again), settings["eager"]["assistant_model"]]
    fresh = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    for kind in ("mm_token_type_ids", "token_type_ids"):
        if kind in fresh:
            fresh[kind] = (ids == IMAGE_ID).int()
    torch.manual_seed(3)
    whole = target.generate(input_ids=ids, attention_mask=mask.long(), **fresh, **call, assistant_model=spies[0])
    assert whole.sequences.shape == second.sequences.shape
    if not do_sample:
        kept = spies[1].trees[-len(spies[0].trees) :]
        for ours, theirs in zip(kept, spies[0].trees, strict=True):
            assert_same_trees(ours, theirs)


@pytest.mark.parametrize("topology", [None, [[0], [1], [0, 0], [0, 1], [1, 0], [0, 1, 2]]])
def test_trees_of_known_tokens_are_those_of_all_tokens(topology: list[list[int]] | None) -> None:
    """Of tokens that come into question the same tree grows as of a whole vocabulary, however deep."""
    log_probs = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    best = log_probs.topk(9)
    config = TreeConfig(num_nodes=14, depth=4, top_k=3, topology=topology)

    def grow(levels: torch.Tensor, known: torch.Tensor | None) -> TokenTree:
        later = iter(levels.unbind(1)[1:])
        expand = lambda ids, slots, visible: next(later)[:, None].expand(-1, ids.shape[1], -1)  # noqa: E731
        return grow_tree(config, torch.tensor([1, 2]), levels[:, 0], expand, known=known)

    tree = grow(best.values, best.indices)
    assert tree.depth > 1
    assert_same_trees(tree, grow(log_probs, None))


@torch.no_grad()
def test_a_shallow_tree_needs_no_whole_block_where_rows_see_those_before_them() -> None:
    target = make_target("llava")
    for name, number in (("embeddings alone", 2), ("fewer tokens, a whole block", BLOCK_SIZE), ("decoupled", 3)):
        draft, widths = make_draft(target, name), []
        draft.tree_config = TreeConfig(num_nodes=4, depth=2, top_k=2, gate=False)
        draft.register_forward_pre_hook(
            lambda module, args, kwargs, widths=widths: widths.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )
        target.generate(**make_inputs("llava", (1,)), assistant_model=draft, max_new_tokens=6, do_sample=False)
        assert set(widths) == {number}


@pytest.mark.parametrize(
    "tree", [{"min_probability": 0.02}, {"top_k": 1}, {"topology": [[0], [1], [1, 3], [1, 3, 0]]}]
)
def test_trees_of_any_shape_equal_plain(tree: dict[str, Any]) -> None:
    target = make_target("llava")
    draft = make_draft(target, "two layers, edges")
    draft.tree_config = TreeConfig(**{"num_nodes": 10, "depth": 4, "top_k": 3, "gate": False} | tree)
    inputs = make_inputs("llava", (1, 0))
    for do_sample in (False, True):
        outputs = []
        for assisted in ({}, {"assistant_model": draft}):
            torch.manual_seed(0)
            outputs.append(
                target.generate(**inputs, max_new_tokens=16, do_sample=do_sample, temperature=0.8, **assisted)
            )
        assert torch.equal(*outputs)


@pytest.mark.parametrize(("block_size", "depth"), [(1, 1), (4, 2), (8, 2)])
def test_costs_are_measured_by_trees_that_a_block_can_fill(
    block_size: int, depth: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers_msd.costs.calibration.HF_HOME", str(tmp_path))
    monkeypatch.setattr("transformers_msd.tuning.NUM_ROUNDS", 3)
    target = make_target("llama")
    draft = BlockDraftModel(BlockDraftConfig.from_target(target.config, block_size=block_size)).eval()
    depths = []
    monkeypatch.setattr(
        "transformers_msd.drafters.msd.BlockCandidateGenerator.draft",
        lambda self, committed, draft=BlockCandidateGenerator.draft: (
            depths.append(draft(self, committed)) or depths[-1]
        ),
    )
    costs = measure_costs(target, draft, prompt_length=8, tolerance=math.inf)
    assert costs.depth == depth
    assert max(tree.depth for tree in depths) == min(block_size, 6)
    save_costs([costs], [draft], target)
    inputs = make_inputs("llama", (0,), lengths=(12,))
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(**inputs, assistant_model=draft, max_new_tokens=12, do_sample=False), plain)


def broken(name: str, **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    weights = make_weights(name) | changed
    return {key: value for key, value in weights.items() if value is not None}


BAD: dict[str, tuple[dict[str, torch.Tensor] | None, dict[str, Any], str]] = {
    "another width": (None, {"hidden_size": 48}, "must be as wide as its target"),
    "of a target of other layers": (None, {"num_target_layers": 30}, "made for one of as many layers, 32 and 8"),
    "a target of another width": (
        None,
        {"dflash_config": {"mask_token_id": 3, "target_hidden_size": 64}},
        "must be as wide as its target",
    ),
    "a mask that is no token": (None, {"dflash_config": {"mask_token_id": 96}}, "`mask_token_id` must be one of"),
    "no mask": (None, {"dflash_config": {}}, "must say mask_token_id, got nothing"),
    "no block": (None, {"block_size": 1}, "`block_size` must leave a token to draft, got 1"),
    "layers that the target lacks": (
        None,
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2, 8]}},
        "reads layers .1, 2, 8. of its target, got one of 8",
    ),
    "fewer layers than are fused": (
        None,
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2]}},
        "do not have the sizes",
    ),
    "convolutions that are not there": (
        None,
        {"dflash_config": {"mask_token_id": 3, "conv_kernel_size": 2}},
        "missing .'model.layers.0.attention_conv.base_kernel'",
    ),
    "groups of no channel": (
        None,
        {"dflash_config": {"mask_token_id": 3, "conv_kernel_size": 2, "conv_group_size": 0}},
        "got 2 and 0 of 32",
    ),
    "no heads": (None, {"num_attention_heads": 0}, "got what makes none: "),
    "a flag that is none": (None, {"is_causal": "false"}, "got what makes none: .*'false'"),
    "a window nobody said": (
        None,
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True},
        "must say how far layers of `sliding_attention` see, got `sliding_window=None`",
    ),
    "a window that is not used": (
        None,
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 64},
        "`sliding_window=64` and `use_sliding_window=None`",
    ),
    "a window by another name": (
        None,
        {"dflash_config": {"mask_token_id": 3, "use_swa": True, "swa_window_size": 64}},
        "must do without swa_window_size, use_swa",
    ),
    "embeddings of no size": (
        None,
        {"dflash_config": {"mask_token_id": 3, "input_embedding_scale": math.nan}},
        "`embedding_scale` must be a number above 0, got nan",
    ),
    "settings that are a word": (
        None,
        {"rope_scaling": "yarn"},
        "must be settings of all of its layers or null, got 'yarn'",
    ),
    "convolutions of other groups": (
        None,
        {"dflash_config": {"mask_token_id": 3, "conv_kernel_size": 2, "conv_group_size": 5}},
        "`conv_group_size` divide the width of the layers, got 2 and 5 of 32",
    ),
    "axes": (None, {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}, "must do without mrope_section"),
    "a rotation that nobody knows": (None, {"rope_scaling": {"type": "spiral"}}, "got what makes none: .*spiral"),
    "a text for a number": (None, {"block_size": "6"}, "got what makes none: .*'block_size' expected int"),
    "a list for settings": (None, {"dflash_config": [1]}, "got what makes none: "),
    "a number for a list": (
        None,
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": 3}},
        "got what makes none: ",
    ),
    "an activation that nobody knows": (None, {"hidden_act": "wave"}, "got what makes none: .*wave"),
    "a vector for a matrix": (broken("DFlash", **{"fc.weight": torch.zeros(HIDDEN)}), {}, "got what makes none: "),
    "layers of a kind that nobody knows": (None, {"layer_types": ["linear"] * 2}, "got what makes none: .*linear"),
    "kinds of other layers": (None, {"layer_types": ["full_attention"]}, "got what makes none: "),
    "a tensor too many": (
        broken("DFlash", **{"hidden_dim_adapter.proj.weight": torch.zeros(2, 2)}),
        {},
        "unexpected .'hidden_dim_adapter.proj.weight'",
    ),
    "a tensor too few": (broken("DFlash", **{"norm.weight": None}), {}, "missing .'norm.weight'"),
    "no fusion": (broken("DFlash", **{"fc.weight": None}), {}, "got none named `fc` and `hidden_norm`"),
    "no number": (broken("DFlash", **{"norm.weight": torch.full((HIDDEN,), torch.nan)}), {}, "finite"),
}


# Of the other layouts.
OTHERS: dict[str, tuple[str, dict[str, torch.Tensor] | None, dict[str, Any], str]] = {
    "a head that reads more": (
        "DSpark",
        None,
        {"markov_head_type": "rnn"},
        "must do without markov_head_type=rnn",
    ),
    "edges that are not there": (
        "DSpark",
        broken("DSpark", **{"markov_head.markov_w1.weight": None, "markov_head.markov_w2.weight": None}),
        {},
        "missing .'edge_from.weight', 'edge_to.weight'",
    ),
    "a last layer that is not normed": (
        "DSpark",
        None,
        {"target_layer_ids": [0, 3, 7]},
        "must do without the last layer before the target's norm",
    ),
    "a block that counts its anchor": ("DSpark", None, {"dspark_bonus_anchor": True}, "without dspark_bonus_anchor"),
    "layers that nobody named": (
        "DFlash of speculators",
        None,
        {"aux_hidden_state_layer_ids": None},
        "must say aux_hidden_state_layer_ids, got nothing",
    ),
    "behind the last norm": (
        "DFlash of speculators",
        None,
        {"aux_hidden_state_layer_ids": [2, 4, 8]},
        "reads layers .2, 4, 8. of its target, got one of 8",
    ),
    "no map": ("DFlash of speculators", broken("DFlash of speculators", d2t=None), {}, "must say by `d2t`"),
    "queries of another size": (
        "DSpark of Liquid",
        broken("DSpark of Liquid", **{"layers.0.self_attn.q_proj.weight": torch.zeros(47, HIDDEN)}),
        {},
        "do not have the sizes",
    ),
    "two kinds of edges": (
        "DFlash 2",
        broken("DFlash 2", **{f"markov_head.markov_w{number}.weight": torch.ones(VOCAB_SIZE, 5) for number in (1, 2)}),
        {},
        "must have one place each, got several for .'edge_from.weight', 'edge_to.weight'",
    ),
    "a map of columns": (
        "DFlash of speculators",
        broken("DFlash of speculators", d2t=torch.zeros(NUM_KNOWN, 1, dtype=torch.long)),
        {},
        "got numbers of shape .40, 1.",
    ),
    "a map as a look-up": (
        "DFlash of speculators",
        broken("DFlash of speculators", d2t=known_tokens(NUM_KNOWN)),
        {},
        "must hold offsets that lead to ascending tokens",
    ),
    "no head": (
        "DSpark of speculators",
        broken("DSpark of speculators", **{"lm_head.weight": None}),
        {},
        "must hold a head of its own",
    ),
    "a head of other tokens": ("DFlash of speculators", None, {"draft_vocab_size": 39}, "do not have the sizes"),
    "a head of which nothing is said": (
        "DFlash of speculators",
        None,
        {"draft_vocab_size": VOCAB_SIZE},
        "unexpected .'head.weight'",
    ),
    "a recurrent head": (
        "DSpark of speculators",
        broken("DSpark of speculators", **{"markov_head.joint_proj.weight": torch.zeros(15, 42)}),
        {"markov_head_type": "rnn"},
        "must do without markov_head_type=rnn",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *OTHERS])
def test_what_would_draft_badly_in_silence_is_refused(name: str, tmp_path: Path) -> None:
    layout, weights, changed, message = ("DFlash", *BAD[name]) if name in BAD else OTHERS[name]
    with pytest.raises(ValueError, match=message):
        AutoDraftModel.from_pretrained(
            write(tmp_path / "draft", layout, weights, **changed), make_deep_target("llava")
        )


ENGINES: dict[str, dict[str, Any]] = {
    "DFlash": {"predicts_next": False},
    "a row says the next": {},
    "edges": {"edge_rank": 5, "num_hidden_layers": 2},
    "gated edges, fewer tokens": {
        "edge_rank": 5,
        "edge_type": "gated",
        "draft_vocab_size": 40,
        "predicts_next": False,
    },
    "windows": {"num_hidden_layers": 2, "windows": [None, 64], "causal": [False, True], "predicts_next": False},
    "DFlash 2": {
        "windows": [64],
        "predicts_next": False,
        "conv_kernel_size": 2,
        "conv_group_size": 8,
        "edge_rank": 5,
        "edge_type": "bilinear",
    },
    "other layers, another base": {
        "feature_layers": [0, -3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
    },
}


def make_for_engines(name: str, target: torch.nn.Module, folder: Path) -> tuple[BlockDraftModel, Path]:
    """Make a draft that engines can run, and write it for them; return it and where it was written."""
    settings = {"causal": False, "reads_feature": False, "mask_token_id": MASK_ID, "feature_layers": [1, 4, 6]}
    draft = make_draft(target, "", **settings | ENGINES[name])
    if draft.head is not None and draft.edge_to is not None:
        unknown = [token for token in range(VOCAB_SIZE) if token not in draft.draft_token_ids]
        draft.edge_to.weight.data[unknown] = 0.0  # as training leaves them
    target.save_pretrained(folder / "target")
    export_draft(draft, "speculators", str(folder / "target"), folder / "out")
    return draft, folder / "out"


@pytest.mark.parametrize("name", ENGINES)
def test_what_engines_get_is_what_was_there(name: str, tmp_path: Path) -> None:
    target = make_deep_target("llava")
    draft, folder = make_for_engines(name, target, tmp_path)
    again = AutoDraftModel.from_pretrained(folder, target)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in draft.state_dict().items())
    published = json.loads((folder / "config.json").read_text())
    kind = {"DFlash": "dflash", "windows": "dflash", "DFlash 2": "dflash2"}.get(name, "dspark")
    assert published["speculators_model_type"] == published["speculators_config"]["algorithm"] == kind
    assert published["sample_from_anchor"] == draft.config.predicts_next
    (proposal,) = published["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == draft.most_levels
    draft.tree_config = again.tree_config = TreeConfig(num_nodes=10, depth=3, top_k=3, gate=False, ngrams=False)
    spies = [Spy(own) for own in (draft, again)]
    for spy in spies:
        target.generate(**make_inputs("llava", (1,)), assistant_model=spy, max_new_tokens=12, do_sample=False)
    for ours, theirs in zip(*(spy.trees for spy in spies), strict=True):
        assert_same_trees(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "num_known", "settings"),
    [
        *product(["dflash", "dspark"], [NUM_KNOWN, VOCAB_SIZE], [{}]),
        ("dspark", NUM_KNOWN, {"markov_head_type": "gated"}),
        ("dflash", NUM_KNOWN, {"sliding_window_non_causal": False}),
        ("dflash", NUM_KNOWN, {"sliding_window_non_causal": True}),
        ("dflash2", VOCAB_SIZE, {}),
        ("dflash2", VOCAB_SIZE, {"sliding_window_non_causal": True}),
    ],
)
def test_drafts_that_speculators_saved_are_read_as_by_itself(
    kind: str, num_known: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    speculators = pytest.importorskip("speculators")
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash2 import DFlash2SpeculatorConfig
    from speculators.models.dspark import DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    target = make_deep_target("llava")
    layers = OF_SPECULATORS["transformer_layer_config"] | {"model_type": "qwen3", "num_hidden_layers": 2}
    if "sliding_window_non_causal" in settings:
        layers |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}
        layers |= {"use_sliding_window": True}
    kinds = {"dflash": DFlashSpeculatorConfig, "dflash2": DFlash2SpeculatorConfig, "dspark": DSparkSpeculatorConfig}
    config = kinds[kind](
        transformer_layer_config=layers | {"vocab_size": VOCAB_SIZE, "attn_implementation": "eager"},
        draft_vocab_size=num_known,
        block_size=BLOCK_SIZE,
        mask_token_id=MASK_ID,
        aux_hidden_state_layer_ids=[2, 4, 5],
        **settings | ({"conv_group_size": 8, "selector_rank": 5} if kind == "dflash2" else {}),
        speculators_config=speculators.SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=BLOCK_SIZE - 1)],
            default_proposal_method="greedy",
            verifier=speculators.VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    theirs = speculators.SpeculatorModel.registered_model_class_from_config(config)(config).eval()
    generator = torch.Generator().manual_seed(2)
    for weight in theirs.parameters():
        weight.copy_(random_weights(generator, *weight.shape) + (weight.ndim == 1))
    for own in (theirs.lm_head, theirs.embed_tokens):
        of_target = target.get_output_embeddings() if own is theirs.lm_head else target.get_input_embeddings()
        if own.weight.shape == of_target.weight.shape:
            own.weight.copy_(of_target.weight)
    if num_known != VOCAB_SIZE:
        known = known_tokens(num_known)
        theirs.d2t.copy_(known - torch.arange(num_known))
        theirs.t2d.copy_(torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill(0, known, True))
    theirs.save_pretrained(tmp_path / "draft")
    ours = AutoDraftModel.from_pretrained(tmp_path / "draft", target)
    assert ours.config.predicts_next == (kind == "dspark")

    assert_same_as_of_speculators(theirs, ours, target)


@pytest.mark.parametrize("name", ENGINES)
def test_speculators_own_reader_sees_the_same_block(name: str, tmp_path: Path) -> None:
    speculators = pytest.importorskip("speculators")
    target = make_deep_target("llava")
    draft, folder = make_for_engines(name, target, tmp_path)
    config = speculators.SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = speculators.SpeculatorModel.from_pretrained(folder, config=config).eval()
    assert theirs.target_layer_ids == [layer % (NUM_LAYERS + 1) for layer in draft.feature_layers]
    assert_same_as_of_speculators(theirs, draft, target)


@torch.no_grad()
def assert_same_as_of_speculators(theirs: Any, ours: BlockDraftModel, target: torch.nn.Module) -> None:
    """Compare what two drafts say of a block, one of them speculators' own model."""
    place, states = 9, random_weights(torch.Generator().manual_seed(3), 1, 9, theirs.fc.in_features)
    ids = torch.full((1, BLOCK_SIZE), MASK_ID).index_fill(1, torch.tensor([0]), 7)
    rows, read = theirs.embed_tokens(ids), theirs.hidden_norm(theirs.fc(states))
    # They mask a whole row of tokens, the block's first among them.
    read = torch.nn.functional.pad(read, (0, 0, 0, 1))
    rotation = theirs.rotary_emb(rows, torch.cat([torch.arange(place + 1), place + torch.arange(BLOCK_SIZE)])[None])
    masks = [
        theirs._create_attention_mask(torch.zeros(1, place + 1).long(), place + 1, torch.tensor([place]), "cpu", *seen)
        for seen in ((), (theirs.sliding_window, theirs.sliding_window_non_causal))
    ]
    table = target.get_input_embeddings().weight
    block = ours.block(table[7][None], ours.fuse(states[:, -1]), ours.most_levels, table[MASK_ID])
    for index, layer in enumerate(theirs.layers):
        mask = masks[index in theirs.sliding_window_indices]
        rows = layer(hidden_states=rows, target_hidden=read, attention_mask=mask, position_embeddings=rotation)
    lowest = torch.finfo(torch.float32).min
    found = ours(
        block,
        [
            torch.zeros(1, 1, BLOCK_SIZE, place + BLOCK_SIZE).masked_fill_(
                torch.cat([torch.zeros(BLOCK_SIZE, place, dtype=torch.bool), ~visible], dim=1), lowest
            )
            for visible in ours.visible(BLOCK_SIZE, torch.device("cpu"))
        ],
        torch.arange(place, place + BLOCK_SIZE)[None],
        ours.fuse(states),
        torch.arange(place)[None],
    ).last_hidden_state
    own = ours.own_logits(found) if ours.head is not None else found @ target.get_output_embeddings().weight.T
    torch.testing.assert_close(own, theirs.lm_head(theirs.norm(rows)), atol=1e-4, rtol=1e-4)
    markov = getattr(theirs, "markov_head", None)
    selector = getattr(theirs, "candidate_selector", None)
    assert (markov is None and selector is None) == (ours.edge_to is None)
    if selector is not None:
        every, level = torch.arange(VOCAB_SIZE)[None], ours.levels(found, 2)[:, 1]
        own = ours.edge_to(ours.edges_from(torch.tensor([7]), level))
        torch.testing.assert_close(own, selector.transition_scores(level, torch.tensor([7]), every))
    if markov is not None:
        bias = markov.block_bias(prev_token_ids=torch.tensor([[7]]), hidden_states=found[:, :1])[0]
        tokens = ours.draft_token_ids if ours.head is not None else torch.arange(VOCAB_SIZE)
        own = ours.edge_to(ours.edges_from(torch.tensor([7]), found[:, 0]))[:, tokens]
        torch.testing.assert_close(own, bias)


def test_new_convolutions_leave_rows_as_they_are() -> None:
    config = make_target("llava").config
    mixing, plain = (
        BlockDraftModel(BlockDraftConfig.from_target(config, num_hidden_layers=2, conv_kernel_size=size)).eval()
        for size in (3, 0)
    )
    plain.load_state_dict(mixing.state_dict(), strict=False)
    rows, mask = torch.randn(2, 4, 32), [torch.zeros(2, 1, 4, 4)]
    found = (own(rows, mask, torch.arange(4).expand(2, -1)).last_hidden_state for own in (mixing, plain))
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_what_a_part_of_a_config_leaves_null_is_said_by_another(tmp_path: Path) -> None:
    own = {"mask_token_id": MASK_ID, "is_causal": None, "block_size": None, "sliding_window": None}
    folder = write(tmp_path / "draft", "DFlash, windows", is_causal=False, dflash_config=own)
    config = AutoDraftModel.from_pretrained(folder, make_deep_target("llava")).config
    assert (config.layer_sights, config.block_size) == ([(False, 5), (False, None)], BLOCK_SIZE)


@pytest.mark.parametrize("is_first", [False, True])
def test_dflash_2_leaves_where_engines_run_it(is_first: bool, tmp_path: Path) -> None:
    target = make_deep_target("llava")
    target.save_pretrained(tmp_path / "target")
    settings = {"causal": False, "reads_feature": False, "mask_token_id": MASK_ID, "feature_layers": [1, 4, 6]}
    if not is_first:  # convolutions of DFlash 2
        settings |= {"conv_kernel_size": 2, "edge_rank": 5, "edge_type": "bilinear"}
    draft = make_draft(target, "", **settings, conv_group_size=8)
    if is_first:  # which has none of that size
        export_draft(draft, "speculators", str(tmp_path / "target"), tmp_path / "out")
        return
    with pytest.raises(ValueError, match="lose rows that say the next token, of DFlash 2"):
        export_draft(draft, "speculators", str(tmp_path / "target"), tmp_path / "out")


def test_drafts_that_read_what_is_stored_leave_for_engines(tmp_path: Path) -> None:
    target = make_deep_target("gemma3")
    target.save_pretrained(tmp_path / "target")
    draft = AutoDraftModel.from_pretrained(write(tmp_path / "draft", "DSpark of speculators"), target)
    export_draft(draft, "speculators", str(tmp_path / "target"), tmp_path / "out")
    draft.embedding_scale = draft.config.embedding_scale = None
    with pytest.raises(ValueError, match="the scales of the target's embeddings and logits"):
        export_draft(draft, "speculators", str(tmp_path / "target"), tmp_path / "out")


def saved_with(tree: dict[str, Any], folder: Path) -> BlockDraftModel:
    draft = make_draft(make_target("llava"), "embeddings alone")
    draft.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"tree_config": tree}))
    return draft


def set_on_draft(tree: dict[str, Any], folder: Path) -> Any:
    draft = make_draft(make_target("llava"), "embeddings alone")
    draft.tree_config = tree
    return draft


TOO_DEEP = f"`TreeConfig.depth` must be at most {BLOCK_SIZE}, .*. Lower it."
WAYS_IN: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "a config": lambda tree, folder: BlockDraftModel(
        BlockDraftConfig(text_config=Qwen3Config(**TEXT), block_size=BLOCK_SIZE, tree_config=tree)
    ),
    "a target": lambda tree, folder: BlockDraftModel(
        BlockDraftConfig.from_target(make_target("llava").config, block_size=BLOCK_SIZE, tree_config=tree)
    ),
    "a folder": lambda tree, folder: saved_with(tree, folder) and BlockDraftModel.from_pretrained(folder),
    "any folder": lambda tree, folder: saved_with(tree, folder) and AutoDraftModel.from_pretrained(folder),
    "a draft": set_on_draft,
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_trees_deeper_than_a_block_are_told_and_others_taken(way: str, tmp_path: Path) -> None:
    for tree in ({"depth": BLOCK_SIZE + 1}, {"topology": [[0] * level for level in range(1, 9)], "depth": 9}):
        is_saved = way in ("a folder", "any folder")  # what was saved so before is drafted with nevertheless
        with nullcontext() if is_saved else pytest.raises(ValueError, match=TOO_DEEP):
            assert WAYS_IN[way](tree, tmp_path).tree_config.depth == BLOCK_SIZE
    for tree, depth in (
        ({"depth": BLOCK_SIZE}, BLOCK_SIZE),
        ({"depth": 2, "num_nodes": 8}, 2),
        ({"topology": [[0], [1]], "depth": 9}, 1),
    ):
        assert WAYS_IN[way](tree, tmp_path).tree_config.depth == depth
    for tree in ({}, {"num_nodes": 8}, *([None] if way != "a draft" else [])):
        assert WAYS_IN[way](tree, tmp_path).tree_config.depth == BLOCK_SIZE


def test_trees_that_were_saved_too_deep_are_cut_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(configuration_block.logger, "warning", told.append)
    saved_with({"num_nodes": 9, "depth": BLOCK_SIZE + 2}, tmp_path)
    draft = BlockDraftModel.from_pretrained(tmp_path)
    assert (draft.tree_config.num_nodes, draft.tree_config.depth) == (9, BLOCK_SIZE)
    assert len(told) == 1
    assert f"got a saved one of depth {BLOCK_SIZE + 2}. It is cut to {BLOCK_SIZE}" in told[0]
    for given, depth in (({"depth": 2}, 2), ({"num_nodes": 5}, BLOCK_SIZE), (None, BLOCK_SIZE)):
        draft = BlockDraftModel.from_pretrained(tmp_path, tree_config=given)
        assert (draft.config.tree_config, draft.tree_config.depth) == (given, depth)
    assert BlockDraftModel.from_pretrained(tmp_path, block_size=BLOCK_SIZE + 2).tree_config.depth == BLOCK_SIZE + 2
    with pytest.raises(ValueError, match=TOO_DEEP):
        BlockDraftModel.from_pretrained(tmp_path, tree_config={"depth": BLOCK_SIZE + 1})
    assert len(told) == 1
    draft = BlockDraftModel.from_pretrained(tmp_path, block_size=2, text_config={"rms_norm_eps": 0.5})
    assert (draft.tree_config.depth, draft.config.text_config.rms_norm_eps) == (2, 0.5)
    assert draft.config.text_config.hidden_size == TEXT["hidden_size"]
    draft.tree_config = {"num_nodes": 8}
    assert (draft.tree_config.num_nodes, draft.tree_config.depth) == (8, 2)
    draft.config.tree_config = {"dpth": 2}
    with pytest.raises(ValueError, match="`tree_config` must be a `TreeConfig`, or some of its fields"):
        draft.tree_config  # noqa: B018


def test_wrong_settings_raise(tmp_path: Path) -> None:
    target = make_target("llava")
    for wrong, message in (
        ({"block_size": 1, "predicts_next": False}, "`block_size` must leave a token to draft"),
        ({"edge_rank": -1}, "`edge_rank` must not be negative"),
        ({"visual_rows": "none"}, "`visual_rows` must be one of"),
        ({"feature_layers": []}, "`feature_layers` must name a hidden state"),
        ({"mask_token_id": 96}, "`mask_token_id` must be one of the target's 96 tokens"),
        ({"blocks": 2}, "fields of `BlockDraftConfig` or `Qwen3Config`, got .'blocks'"),
        ({"intermediate_size": 0}, "must make a decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockDraftConfig.from_target(target.config, **wrong)
    for wrong, message in (
        ({"causal": [True, False]}, "`causal` must tell of each of 1 layers"),
        ({"windows": [4, None]}, "`windows` must tell of each of 1 layers"),
        ({"windows": [0]}, "`windows` must be at least 1"),
        ({"windows": [4], "visual_rows": "dropped"}, "of which visual rows that are dropped leave none"),
        ({"final_logit_softcapping": 3.0}, "`final_logit_softcapping` holds what `output_multiplier` has made"),
        ({"edge_type": "gated"}, "`edge_type` must be one of .* with `edge_rank=0`"),
        ({"edge_rank": 3, "edge_type": "rnn"}, "`edge_type` must be one of .* got 'rnn'"),
        ({"conv_kernel_size": 2, "conv_group_size": 5}, "divide the width of the layers, got 2 and 5 of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockDraftConfig.from_target(target.config, **wrong)
    draft = make_draft(target, "embeddings alone")
    assert draft.tree_config.depth == BLOCK_SIZE
    deeper = MSDDrafter(draft, TreeConfig(depth=BLOCK_SIZE + 1))
    with pytest.raises(ValueError, match=f"`TreeConfig.depth` must be at most {BLOCK_SIZE}, .* got {BLOCK_SIZE + 1}"):
        target.generate(**make_inputs("llava"), assistant_model=deeper, max_new_tokens=4)
    draft.tree_config = TreeConfig(topology=[[0], [VOCAB_SIZE]])
    with pytest.raises(ValueError, match=f"must name ranks below {VOCAB_SIZE}, .* got {VOCAB_SIZE}"):
        target.generate(**make_inputs("llava"), assistant_model=draft, max_new_tokens=4)
    draft.config.feature_layers = [2, 9]
    with pytest.raises(ValueError, match="reads hidden states .2, 9. of its target, got one of 2 layers"):
        draft.check_target(target)
    target.save_pretrained(tmp_path / "target")
    draft.config.feature_layers = [1, -1]
    of_its_own = "rows that read the feature .*, rows that see those before them alone .*, a mask of its own"
    for layout, lost in (("speculators", f"lose {of_its_own}"), ("sglang", "of EAGLE-3 or MSD, got a block")):
        draft.config.reads_feature = True
        with pytest.raises(ValueError, match=lost):
            export_draft(draft, layout, str(tmp_path / "target"), tmp_path / "out")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="`inputs_embeds` must have shape"):
        draft(torch.zeros(1, 2, 5), [torch.zeros(1, 1, 2, 2)], torch.zeros(1, 2, dtype=torch.long))
