"""HiViS and ViSpec drafts in the layouts they are published in, against a forward of their own, and in `generate`."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_eagle3 import make_deep_target
from test_eagle3 import write as write_eagle3
from test_msd_drafter import Spy, assert_same_trees
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import CompileConfig
from zoo import IMAGE_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID, VOCAB_SIZE, make_inputs, make_target

from transformers_msd import (
    AutoDraftModel,
    HiViSConfig,
    HiViSDraftModel,
    StaticRuntime,
    TokenTree,
    TreeConfig,
    ViSpecConfig,
    ViSpecDraftModel,
)
from transformers_msd.compat import CACHE
from transformers_msd.models import files


HIDDEN, NUM_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 8, 48
# Of each draft: its target, heads of keys, the base of its positions, and how many vectors or queries it has.
DRAFTS = {
    "HiViS, LLaVA": ("llava", 4, 1e4, 4),
    "HiViS, Qwen2.5-VL": ("qwen2_5_vl", 2, 5e4, 2),
    # All heads have keys of their own, unlike the target's.
    "ViSpec, LLaVA": ("llava", 4, 1e4, 2),
    "ViSpec, Qwen2.5-VL": ("qwen2_5_vl", 4, 5e4, 3),
}
NO_PICTURES = [IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID]
NO_GRAFTS = {"gate": False, "ngrams": False}


def make_weights(name: str) -> dict[str, torch.Tensor]:
    architecture, num_shared, _, number = DRAFTS[name]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        # What a level reads of the one above stays of one size.
        return torch.randn(*shape, generator=generator) * (0.3 if shape[-1] <= INTERMEDIATE else 0.1)

    attention, shared = "layers.0.self_attn", num_shared * HEAD_DIM
    weights = {
        "embed_tokens.weight": random(VOCAB_SIZE, HIDDEN),
        "fc.bias": random(HIDDEN),
        f"{attention}.q_proj.weight": random(HIDDEN, HIDDEN),
        f"{attention}.k_proj.weight": random(shared, HIDDEN),
        f"{attention}.v_proj.weight": random(shared, HIDDEN),
        f"{attention}.o_proj.weight": random(HIDDEN, HIDDEN),
        "layers.0.mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
        "layers.0.mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
        "layers.0.mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
        "layers.0.post_attention_layernorm.weight": 1 + random(HIDDEN),
    }
    has_bias = architecture == "qwen2_5_vl"
    if has_bias:
        weights |= {
            f"{attention}.{kind}_proj.bias": random(len(weights[f"{attention}.{kind}_proj.weight"])) for kind in "qkv"
        }
    if name.startswith("HiViS"):
        return weights | {"fc.weight": random(HIDDEN, 3 * HIDDEN), "residual": random(number, HIDDEN)}
    weights |= {f"imadpt.{kind}_proj.weight": random(HIDDEN, HIDDEN) for kind in "kvo"}
    weights |= {f"imadpt.{kind}_proj.bias": random(HIDDEN) for kind in "kv"} if has_bias else {}
    weights |= {"fc.weight": random(HIDDEN, 2 * HIDDEN), "imadpt.q": random(number, NUM_HEADS, HEAD_DIM)}
    return weights | {"img_fc.weight": random(HIDDEN, 2 * HIDDEN), "img_fc.bias": random(HIDDEN)}


def write(folder: Path, name: str, weights: dict[str, torch.Tensor] | None = None, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    _, num_shared, theta, _ = DRAFTS[name]
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": num_shared,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        # It is not what the tensors say.
        "bias": False,
    }
    config |= {} if theta == 1e4 else {"rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(config | changed))
    weights = make_weights(name) if weights is None else weights
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return folder


class Independent:
    """
    The published forward over all tokens at once, written anew.

    Args:
        name: The draft.
        ids: Tokens `(n,)`.
        embeds: Their embeddings, visual features merged in, `(n, hidden)`.
        features: The target's at them, `(n, hidden)`.
    """

    def __init__(self, name: str, ids: list[int], embeds: torch.Tensor, features: torch.Tensor) -> None:
        self.name, self.ids, self.weights = name, ids, make_weights(name)
        self.is_hivis, self.is_framed = name.startswith("HiViS"), DRAFTS[name][0] == "qwen2_5_vl"
        # Of each row: the token that it ends with, what the layer reads, its position.
        self.tokens, self.rows, self.positions = [], [], []
        (self._hide if self.is_hivis else self._compress)(embeds, features)

    def _linear(self, key: str, *parts: torch.Tensor) -> torch.Tensor:
        found = torch.cat(parts, dim=-1) @ self.weights[f"{key}.weight"].T
        return found + self.weights[f"{key}.bias"] if f"{key}.bias" in self.weights else found

    def _hide(self, embeds: torch.Tensor, features: torch.Tensor) -> None:
        hidden = {token for token, token_id in enumerate(self.ids) if token_id == IMAGE_ID}
        if self.is_framed:
            starts = [token for token, token_id in enumerate(self.ids) if token_id == VISION_START_ID]
            ends = [token for token, token_id in enumerate(self.ids) if token_id == VISION_END_ID]
            hidden = {token for start, end in zip(starts, ends, strict=True) for token in range(start, end + 2)}
        kept = [token for token in range(len(self.ids)) if token not in hidden]
        for place, (token, following) in enumerate(zip(kept, kept[1:], strict=False)):
            self.tokens.append(following)
            self.rows.append(self.read(embeds[following], features[token], 0))
            self.positions.append(token if self.is_framed else place)

    def _compress(self, embeds: torch.Tensor, features: torch.Tensor) -> None:
        self.picture, seen, num_rows = torch.zeros(HIDDEN), [], DRAFTS[self.name][3] - 1
        for token in range(1, len(self.ids)):
            if self.ids[token] != IMAGE_ID:
                self.tokens.append(token)
                self.rows.append(self.read(embeds[token], features[token - 1], 0))
                self.positions.append(token - 1)
                continue
            seen.append(embeds[token])
            if self.ids[token + 1] != IMAGE_ID:
                found = self._look(torch.stack(seen))
                self.tokens += [token] * num_rows
                self.rows += list(found[:-1])
                self.positions += range(token - num_rows, token)
                self.picture, seen = found[-1], []

    def _look(self, embeds: torch.Tensor) -> torch.Tensor:
        key, value = (
            self._linear(f"imadpt.{kind}_proj", embeds).view(-1, NUM_HEADS, HEAD_DIM).transpose(0, 1) for kind in "kv"
        )
        scores = self.weights["imadpt.q"].transpose(0, 1) @ key.mT / HEAD_DIM**0.5
        return self._linear("imadpt.o_proj", (scores.softmax(-1) @ value).transpose(0, 1).flatten(1))

    def read(self, embed: torch.Tensor, feature: torch.Tensor, depth: int) -> torch.Tensor:
        if self.is_hivis:
            vectors = self.weights["residual"]
            return self._linear("fc", embed, feature, vectors[min(depth, len(vectors) - 1)])
        return self._linear("fc", embed, self._linear("img_fc", feature, self.picture))

    def hidden(self, num_rows: int, own: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()) -> torch.Tensor:
        """What the layer says of the first rows, and of embeddings and predictions of ever deeper levels."""
        deeper = [self.read(embed, feature, depth) for depth, (embed, feature) in enumerate(own, 1)]
        last = self.positions[num_rows - 1]
        positions = [*self.positions[:num_rows], *range(last + 1, last + 1 + len(own))]
        return self._layer(torch.stack([*self.rows[:num_rows], *deeper]), torch.tensor(positions))

    def _layer(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        _, num_shared, theta, _ = DRAFTS[self.name]

        def heads(kind: str, number: int) -> torch.Tensor:
            found = self._linear(f"layers.0.self_attn.{kind}_proj", rows).view(-1, number, HEAD_DIM).transpose(0, 1)
            return found.repeat_interleave(NUM_HEADS // number, 0)

        def rotated(found: torch.Tensor) -> torch.Tensor:
            angles = positions[:, None] * theta ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
            (first, second), cos, sin = found.chunk(2, dim=-1), angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        query, key, value = rotated(heads("q", NUM_HEADS)), rotated(heads("k", num_shared)), heads("v", num_shared)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1).flatten(1)
        hidden = rows + self._linear("layers.0.self_attn.o_proj", attended)
        inner = hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        inner = inner * self.weights["layers.0.post_attention_layernorm.weight"]
        gate, up = (self._linear(f"layers.0.mlp.{kind}_proj", inner) for kind in ("gate", "up"))
        return hidden + self._linear("layers.0.mlp.down_proj", silu(gate) * up)


def prompt(name: str, num_images: int) -> dict[str, torch.Tensor]:
    """Make a prompt, text between its pictures."""
    architecture = DRAFTS[name][0]
    inputs = make_inputs(architecture, (num_images,), lengths=(12,))
    if architecture == "llava" and num_images == 2:
        ids = inputs["input_ids"][0].tolist()
        inputs["input_ids"] = torch.tensor([[*ids[:6], ids[10], *ids[6:10], *ids[11:]]])
    return inputs


def load(folder: Path, name: str, **tree: Any) -> HiViSDraftModel | ViSpecDraftModel:
    draft = AutoDraftModel.from_pretrained(write(folder / "published", name), make_target(DRAFTS[name][0]))
    draft.tree_config = TreeConfig(**NO_GRAFTS | tree)
    return draft


def said(name: str, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> Independent:
    """The independent forward over what the target was told and has said, `(1, n)`."""
    target = make_target(DRAFTS[name][0])
    pictures = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in pictures:
        pictures["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    states = target(input_ids=ids, output_hidden_states=True, **pictures).hidden_states
    return Independent(name, ids[0].tolist(), states[0][0], states[-1][0])


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("name", DRAFTS)
@torch.no_grad()
def test_hidden_states_are_those_of_the_published_forward(name: str, num_images: int, tmp_path: Path) -> None:
    draft, ids = load(tmp_path, name), prompt(name, num_images)["input_ids"]
    assert type(draft) is (HiViSDraftModel if name.startswith("HiViS") else ViSpecDraftModel)
    num_tokens = ids.shape[1]
    torch.manual_seed(0)
    embeds, features, embed = (torch.randn(1, number, HIDDEN) for number in (num_tokens, num_tokens, 1))
    visual, real = ids[:, 1:] == IMAGE_ID, torch.ones(1, num_tokens - 1, dtype=torch.bool)
    rows = {"inputs_embeds": embeds[:, 1:], "features": features[:, :-1]}
    rows["position_ids"] = torch.arange(num_tokens - 1)[None]
    changed, kept, context = draft.pool(**rows, visual_mask=visual, real=real, context=None)
    rows = {key: value[:, kept[0]] for key, value in (rows | changed | {"visual_mask": visual}).items()}
    if draft.renumbers:
        rows["position_ids"] = torch.arange(int(kept.sum()))[None]
    rows["features"] = draft.fuse(rows["features"])
    outputs = draft(**rows, use_cache=True)
    independent = Independent(name, ids[0].tolist(), embeds[0], features[0])
    num_rows = len(independent.rows)
    expected = independent.hidden(num_rows)
    torch.testing.assert_close(outputs.last_hidden_state[0], expected, atol=1e-4, rtol=1e-4)
    own, position_ids = (), rows["position_ids"][:, -1:]
    for depth in range(1, 4):  # levels read what was said above them
        said_above = outputs.last_hidden_state[:, -1:]
        own = (*own, (embed[0, 0], said_above[0, 0]))
        expected = independent.hidden(num_rows, own)
        read = said_above if context is None else torch.cat([said_above, context[:, None]], dim=-1)
        outputs = draft(
            inputs_embeds=embed,
            features=draft.deepen(read, depth),
            position_ids=position_ids + depth,
            use_cache=True,
            **{CACHE: outputs[CACHE]},
        )
        torch.testing.assert_close(outputs.last_hidden_state[0], expected[-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("name", DRAFTS)
@torch.no_grad()
def test_proposals_are_those_of_the_published_forward(name: str, num_images: int, tmp_path: Path) -> None:
    target, inputs = make_target(DRAFTS[name][0]), prompt(name, num_images)
    draft = load(tmp_path, name, num_nodes=13, depth=1, top_k=12)
    call = {
        "max_new_tokens": 40,
        "do_sample": False,
        "return_dict_in_generate": True,
        "suppress_tokens": NO_PICTURES,
    }
    plain = target.generate(**inputs, **call)
    drafted = target.generate(**inputs, **call, assistant_model=draft)
    assert torch.equal(drafted.sequences, plain.sequences)
    # What the published forward proposes after each token.
    ids = plain.sequences
    independent = said(name, inputs, ids)
    logits = target.get_output_embeddings()(independent.hidden(len(independent.rows)))
    proposed = dict(zip(independent.tokens, logits.topk(12).indices, strict=True))
    place, lengths = inputs["input_ids"].shape[1], []
    while place + 1 < ids.shape[1]:
        accepted = bool((proposed[place] == ids[0, place + 1]).any())
        lengths.append(min(1 + accepted, ids.shape[1] - 1 - place))
        place += lengths[-1]
    assert drafted.speculative_stats.acceptance_lengths[:, 0].tolist() == lengths
    assert drafted.speculative_stats.num_accepted > 0


def begun_by_a_picture(name: str) -> dict[str, torch.Tensor]:
    """Make a prompt whose first token belongs to a picture."""
    inputs = make_inputs(DRAFTS[name][0], (1,), lengths=(12,))
    return {key: value if key.startswith(("pixel", "image")) else value[:, 2:] for key, value in inputs.items()}


@pytest.mark.parametrize("name", DRAFTS)
@torch.no_grad()
def test_a_picture_at_the_very_start_leaves_the_rows_of_the_published_forward(name: str, tmp_path: Path) -> None:
    target, inputs, draft = make_target(DRAFTS[name][0]), begun_by_a_picture(name), load(tmp_path, name)
    fed: list[dict[str, Any]] = []
    draft.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs), with_kwargs=True)
    call = {"do_sample": False, "suppress_tokens": NO_PICTURES}
    ids = target.generate(**inputs, **call, max_new_tokens=2, assistant_model=draft)
    assert torch.equal(ids, target.generate(**inputs, **call, max_new_tokens=2))
    independent = said(name, inputs, ids[:, : inputs["input_ids"].shape[1] + 1])
    assert fed[0]["position_ids"][0].tolist() == independent.positions
    assert fed[0]["inputs_embeds"].shape[1] == len(independent.rows)
    # Padded, beside other prompts, it has the same rows.
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), inputs["input_ids"].expand(2, -1)], dim=1)
    ids[1, :3] = 5
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    batch |= {key: torch.cat([value, value]) for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    if "mm_token_type_ids" in inputs:
        batch["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    # Each level of a random draft magnifies rounding: trees are compared in double precision.
    target, draft = deepcopy(target).double(), draft.double()
    spy = Spy(draft)
    target.generate(**batch, **call, max_new_tokens=6, assistant_model=spy)
    alone = Spy(draft)
    target.generate(**inputs, **call, max_new_tokens=6, assistant_model=alone)
    first = TokenTree(*(getattr(spy.trees[0], name)[:1] for name in ("token_ids", "parents", "scores")), 3)
    assert_same_trees(first, alone.trees[0])


@pytest.mark.parametrize("start", ["text", "picture"])
@pytest.mark.parametrize("way", ["eager", "captured"])
@pytest.mark.parametrize("name", DRAFTS)
@torch.no_grad()
def test_deeper_levels_are_those_of_the_published_forward(name: str, way: str, start: str, tmp_path: Path) -> None:
    target = make_target(DRAFTS[name][0])
    inputs = prompt(name, 2) if start == "text" else begun_by_a_picture(name)
    spy = Spy(load(tmp_path, name, num_nodes=4, depth=3, top_k=1))
    call = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": NO_PICTURES}
    assistant = spy if way == "eager" else StaticRuntime(spy)
    call |= {} if way == "eager" else {"disable_compile": True}
    ids = target.generate(**inputs, **call, assistant_model=assistant)
    assert torch.equal(ids, target.generate(**inputs, **call))
    independent, num_known = said(name, inputs, ids), 1
    head, table = target.get_output_embeddings(), target.get_input_embeddings()
    for committed, tree in zip(spy.committed, spy.trees, strict=True):
        num_known += int(committed.lengths[0])
        num_rows, own, expected = independent.tokens.index(num_known - 1) + 1, (), []
        for _ in range(3):
            hidden = independent.hidden(num_rows, own)[-1]
            expected.append(head(hidden).argmax())
            own = (*own, (table(expected[-1]), hidden))
        assert tree.token_ids[0, 1:].tolist() == [int(token_id) for token_id in expected]


def second_turn(inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    batch_size, num_new = len(sequences), sequences.shape[1] - inputs["input_ids"].shape[1] + 2
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(batch_size, num_new)], dim=1)
    return {"input_ids": torch.cat([sequences, torch.full((batch_size, 2), 7)], dim=1), "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "way", "do_sample"),
    [
        *((name, "eager", do_sample) for name in DRAFTS for do_sample in (False, True)),
        ("ViSpec, Qwen2.5-VL", "captured", True),
    ],
)
def test_batches_and_turns_equal_plain_ones(name: str, way: str, do_sample: bool, tmp_path: Path) -> None:
    target, inputs = make_target(DRAFTS[name][0]), make_inputs(DRAFTS[name][0], (2, 0, 1))
    draft = load(tmp_path, name, num_nodes=12, depth=3, top_k=3)
    draft.save_pretrained(tmp_path / "ours")
    again = AutoDraftModel.from_pretrained(tmp_path / "ours")
    assert again.config.to_dict().keys() == draft.config.to_dict().keys()
    assert again.state_dict().keys() == draft.state_dict().keys()
    for key, value in draft.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    call = {"max_new_tokens": 12, "do_sample": do_sample, "return_dict_in_generate": True}
    call |= {"compile_config": CompileConfig(backend="eager", mode=None, fullgraph=True)} if way == "captured" else {}
    assistant = again if way == "eager" else StaticRuntime(again)
    outputs = []
    for assisted in ({}, {"assistant_model": assistant}):
        torch.manual_seed(2)
        first = target.generate(**inputs, **call, **assisted)
        turn = second_turn(inputs, first.sequences)
        outputs.append((first, target.generate(**turn, **call, **assisted, **{CACHE: first[CACHE]})))
    for plain, drafted in zip(*outputs, strict=True):
        assert torch.equal(plain.sequences, drafted.sequences)
    assert sum(drafted.speculative_stats.num_accepted for drafted in outputs[1]) > 0


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("name", ["HiViS, LLaVA", "ViSpec, LLaVA"])
def test_a_turn_on_a_kept_cache_drafts_as_the_whole_conversation(
    name: str, with_picture: bool, tmp_path: Path
) -> None:
    target, inputs = deepcopy(make_target("llava")).double(), prompt(name, 1)
    draft = load(tmp_path, name, num_nodes=12, depth=3, top_k=3).double()
    call = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [IMAGE_ID]}
    first = target.generate(**inputs, **call, assistant_model=draft)
    turn, new, whole = second_turn(inputs, first.sequences), {}, {"pixel_values": inputs["pixel_values"]}
    if with_picture:
        picture = torch.full((1, 4), IMAGE_ID)
        turn["input_ids"] = torch.cat([turn["input_ids"][:, :-1], picture, turn["input_ids"][:, -1:]], dim=1)
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        new["pixel_values"] = -inputs["pixel_values"]
        whole = {"pixel_values": torch.cat([inputs["pixel_values"], new["pixel_values"]])}
    kept, afresh = Spy(draft), Spy(draft)
    second = target.generate(**turn, **new, **call, assistant_model=kept, **{CACHE: first[CACHE]})
    plain = target.generate(**turn, **whole, **call, assistant_model=afresh)
    assert torch.equal(second.sequences, plain.sequences)
    assert_same_trees(kept.trees[0], afresh.trees[0])


@pytest.mark.parametrize("name", ["HiViS, LLaVA", "ViSpec, LLaVA"])
def test_sequences_that_end_leave(name: str, tmp_path: Path) -> None:
    target, inputs = make_target("llava"), make_inputs("llava", (2, 0, 1))
    spy = Spy(load(tmp_path, name, num_nodes=12, depth=3, top_k=3))
    call = {"max_new_tokens": 12, "do_sample": False}
    first = target.generate(**inputs, **call)[0, inputs["input_ids"].shape[1] :].tolist()
    call["eos_token_id"] = first[2]
    plain, drafted = (target.generate(**inputs, **call, assistant_model=own) for own in (None, spy))
    assert torch.equal(plain, drafted)
    assert len(spy.committed[-1].lengths) < 3


def changed(name: str, **tensors: torch.Tensor | None) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    weights = {key: value for key, value in (make_weights(name) | tensors).items() if value is not None}
    return name, weights, {}


HIVIS, VISPEC = make_weights("HiViS, LLaVA"), make_weights("ViSpec, LLaVA")
BAD: dict[str, tuple[tuple[str, dict[str, torch.Tensor], dict[str, Any]], str]] = {
    "vectors of another name": (
        changed("HiViS, LLaVA", residual=None, res=torch.ones(1, HIDDEN)),
        "as `residual`, got .*'res'",
    ),
    "vectors of another width": (changed("HiViS, LLaVA", residual=torch.ones(4, 8)), r"'residual': .* got \(4, 8\)"),
    "a number for vectors": (changed("HiViS, LLaVA", residual=torch.tensor(1.0)), r"'residual': .* got \(\)"),
    "a number for keys": (
        changed("ViSpec, LLaVA", **{"layers.0.self_attn.k_proj.weight": torch.tensor(1.0)}),
        r"k_proj.weight': .* got \(\)",
    ),
    "an `fc` for two": (changed("HiViS, LLaVA", **{"fc.weight": VISPEC["fc.weight"]}), r"'fc.weight': .*\(32, 64\)"),
    "no `fc`": (changed("HiViS, LLaVA", **{"fc.weight": None}), "'fc.weight': .* got none"),
    "a lost layer": (
        changed("HiViS, LLaVA", **{"layers.0.mlp.up_proj.weight": None}),
        r"missing \['model.layers.0.mlp.up_proj.weight'\], unexpected \[\]",
    ),
    "one bias of three": (
        changed("HiViS, LLaVA", **{"layers.0.self_attn.v_proj.bias": torch.ones(HIDDEN)}),
        r"unexpected \['model.layers.0.self_attn.v_proj.bias'\]",
    ),
    "not finite": (changed("HiViS, LLaVA", residual=HIVIS["residual"] / 0), "must be finite"),
    "no queries": (changed("ViSpec, LLaVA", **{"imadpt.q": None}), "must hold its queries"),
    "queries of other heads": (
        changed("ViSpec, LLaVA", **{"imadpt.q": torch.ones(2, 2, 16)}),
        r"'adaptor.q': .*\(2, 2, 16\)",
    ),
    "a lost adaptor": (
        changed("ViSpec, LLaVA", **{"imadpt.o_proj.weight": None}),
        r"missing \['adaptor.o_proj.weight'\]",
    ),
    "one bias of two": (changed("ViSpec, LLaVA", **{"img_fc.bias": None}), r"missing \['image_fc.bias'\]"),
    "both at once": (changed("ViSpec, LLaVA", residual=HIVIS["residual"]), r"unexpected \['residual'\]"),
    "another target's": (("ViSpec, LLaVA", VISPEC, {"hidden_size": 64}), "is 64 wide .* got one of 32"),
    "heads that do not divide": (("ViSpec, LLaVA", VISPEC, {"num_attention_heads": 5}), "must make a decoder"),
    "scaled positions": (
        ("HiViS, LLaVA", HIVIS, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        "must be scaled as in default, linear",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_draft_badly_in_silence_is_refused(case: str, tmp_path: Path) -> None:
    (name, weights, config), message = BAD[case]
    with pytest.raises(ValueError, match=message):
        AutoDraftModel.from_pretrained(write(tmp_path / "draft", name, weights, **config), make_target("llava"))


@torch.no_grad()
def test_precision_and_target_are_those_asked_for(tmp_path: Path) -> None:
    for name in ("HiViS, LLaVA", "ViSpec, LLaVA"):
        folder, target = write(tmp_path / "draft", name), make_target("llava")
        with pytest.raises(ValueError, match="needs its target"):
            AutoDraftModel.from_pretrained(folder)
        half = AutoDraftModel.from_pretrained(folder, target, torch.bfloat16)
        assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
        inputs = prompt(name, 2)
        plain, drafted = (target.generate(**inputs, max_new_tokens=6, assistant_model=own) for own in (None, half))
        assert torch.equal(plain, drafted)


@pytest.mark.parametrize("name", ["HiViS, LLaVA", "ViSpec, LLaVA", "SafeAILab", "EAGLE-1"])
def test_files_are_read_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "SafeAILab":
        folder, target = write_eagle3(tmp_path / "draft", name), make_deep_target("llava")
    else:
        own = {key: value for key, value in VISPEC.items() if not key.startswith(("im", "residual"))}
        weights = own if name == "EAGLE-1" else None
        folder, target = write(tmp_path / "draft", "ViSpec, LLaVA" if weights else name, weights), make_target("llava")
    read: list[Path] = []
    monkeypatch.setattr(files, "load_file", lambda file: (read.append(file), load_file(file))[1])
    AutoDraftModel.from_pretrained(folder, target.config)
    assert read == [folder / "model.safetensors"]


def test_they_are_not_trained(tmp_path: Path) -> None:
    trainer = pytest.importorskip("transformers_msd.trainer", exc_type=ImportError)
    for name in ("HiViS, LLaVA", "ViSpec, LLaVA"):
        draft = load(tmp_path, name)
        with pytest.raises(ValueError, match=f"got {type(draft).__name__}, which is only loaded"):
            trainer.MSDTrainer(draft, make_target("llava"), args=None, train_dataset=None, processing_class=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: HiViSConfig(visual_pool_size=1), "`visual_pool_size` must be 0"),
        (lambda: HiViSConfig(num_biases=0), "`num_biases` must be at least 1"),
        (lambda: HiViSConfig(tokens_behind=-1), "'tokens_behind': -1"),
        (lambda: ViSpecConfig(decoupled=False), "`decoupled` True, got 1 and False"),
        (lambda: ViSpecConfig(num_queries=0), "`num_queries` must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


@torch.no_grad()
def test_features_must_be_those_of_their_depth(tmp_path: Path) -> None:
    draft, rows = load(tmp_path, "HiViS, LLaVA"), torch.randn(1, 2, HIDDEN)
    with pytest.raises(ValueError, match="`features` must be 64 wide"):
        draft(inputs_embeds=rows, features=rows)
