"""EAGLE-3 drafts are trained by the trainer of MSD: on what they read in `generate`, and by losses of their own."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig


pytest.importorskip("trl")

import zoo
from training_fixtures import (  # noqa: F401
    eagle3_recipe,
    make_trainer,
    recipe,
    tiny_dataset,
    tiny_processor,
    vlm_recipe,
    write_world,
)

from training.tiny_world.build.target import build_model, encode_prompts
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import Eagle3Config, Eagle3DraftModel, MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.compat import CACHE
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer import MSDTrainingConfig, check_parity
from transformers_msd.trainer.data import target_rows
from transformers_msd.trainer.dataset import token_counts
from transformers_msd.trainer.recipe import make_draft
from transformers_msd.trainer.run import make_parser, train


LOSSES = {"feature_loss_weight": 0.0, "token_loss_weight": 1.0, "feature_noise": 0.0, "unroll_decay": 0.8}
DESIGNS = {
    "as published": {},
    "fewer tokens, normed output": {"draft_vocab_size": 96, "norm_output": True, "fc_norm": True},
    "visual features": {"reads_placeholders": False, "norm_before_fc": True},
    "decoupled": {"decoupled": True, "norm_before_residual": True},
}


@pytest.fixture(scope="module")
def target(processor):
    torch.manual_seed(0)
    return build_model(processor, num_layers=3)


def make_eagle3(target: torch.nn.Module, **overrides) -> Eagle3DraftModel:
    torch.manual_seed(1)
    config = Eagle3Config.from_target(target.config, intermediate_size=32, **overrides)
    return Eagle3DraftModel(config)


@pytest.mark.parametrize(("num_layers", "layers"), [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2]), (32, [2, 16, 29])])
def test_layers_that_are_read_are_of_the_target(num_layers, layers):
    config = copy.deepcopy(zoo.make_target("llava").config)
    config.get_text_config().num_hidden_layers = num_layers
    assert Eagle3Config.from_target(config).feature_layers == layers


def test_the_layer_has_the_shape_of_the_targets():
    text = copy.deepcopy(zoo.make_target("qwen2_5_vl").config.get_text_config())
    text.head_dim, text.rope_parameters = 16, {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    own = Eagle3Config.from_target(text, intermediate_size=20).text_config
    assert (own.head_dim, own.num_attention_heads, own.num_key_value_heads) == (
        16,
        text.num_attention_heads,
        text.num_key_value_heads,
    )
    assert own.rope_parameters == {"rope_type": "default", "rope_theta": 5e6}
    assert (own.hidden_size, own.vocab_size, own.intermediate_size) == (text.hidden_size, text.vocab_size, 20)


# Heads that are named otherwise, told for each layer, do not fill the width, or are none.
OTHER_HEADS = {
    "falcon": {},
    "gemma4_text": {},
    "laguna": {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2},
    "seed_oss": {"hidden_size": 64, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 16},
    "mamba2": {},
}


@pytest.mark.parametrize("model_type", OTHER_HEADS)
def test_a_target_of_other_heads_has_a_draft(model_type, tmp_path):
    target_config = CONFIG_MAPPING[model_type](**OTHER_HEADS[model_type])
    config = Eagle3Config.from_target(target_config)
    with torch.device("meta"):
        draft = Eagle3DraftModel(config)
    assert draft.fc.out_features == target_config.hidden_size
    config.save_pretrained(tmp_path)
    assert Eagle3Config.from_pretrained(tmp_path).text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize("draft_vocab_size", [None, 96])
def test_the_head_starts_as_the_targets(target, dataset, processor, tmp_path, draft_vocab_size):
    draft = make_eagle3(target, draft_vocab_size=draft_vocab_size)
    with pytest.raises(ValueError, match="tokens of the draft must be chosen before it drafts"):
        target.generate(torch.tensor([[5, 6]]), assistant_model=draft, max_new_tokens=2)
    make_trainer(target, dataset, processor, tmp_path, draft=draft, stage="multimodal", **LOSSES)
    chosen, counts = draft.draft_token_ids, token_counts(dataset, processor, draft.config.get_text_config())
    assert len(chosen) == (draft_vocab_size or len(counts))
    assert counts[chosen].min() >= counts.index_fill(0, chosen, -1).max()
    torch.testing.assert_close(draft.head.weight, target.lm_head.weight[chosen])


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_unrolled_training_equals_drafting_a_chain(target, dataset, processor, tmp_path, design):
    draft = make_eagle3(target, **DESIGNS[design])
    settings = {"stage": "multimodal", "num_unroll_steps": 3, **LOSSES}
    trainer = make_trainer(target, dataset, processor, tmp_path, draft=draft, **settings)
    seen = []
    draft.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    draft.eval()
    inputs = next(iter(trainer.get_eval_dataloader()))
    loss = trainer.compute_loss(draft, dict(inputs))
    unrolled = list(seen)

    # A picture's row, and as many tokens of its answer as are unrolled, committed and then drafted.
    sample = int(inputs["input_ids"].eq(draft.config.visual_token_ids[0]).any(-1).nonzero()[0])
    supervised = (inputs["labels"][sample] != -100).nonzero()[:, 0]
    root = int(supervised[0])
    row = {name: inputs[name][sample : sample + 1, : root + 1] for name in ("input_ids", "attention_mask")}
    row["pixel_values"] = inputs["pixel_values"][: len(inputs["pixel_values"])][_pictures(inputs, draft, sample)]
    outputs = target(**row, output_hidden_states=True)
    is_visual = row["input_ids"] == draft.config.visual_token_ids[0]
    states = torch.cat([outputs.hidden_states[layer] for layer in draft.feature_layers], dim=-1)
    embeds = target.get_input_embeddings()(inputs["input_ids"][sample : sample + 1, : root + 4])
    if not draft.config.reads_placeholders:
        embeds[:, : root + 1][is_visual] = outputs.hidden_states[0][is_visual]
    mask = is_visual[:, 1:]
    outputs = draft(embeds[:, 1 : root + 1], draft.fuse(states[:, :-1]), mask, use_cache=True)
    for step in range(3):
        torch.testing.assert_close(
            outputs.last_hidden_state[0, -1], unrolled[step][sample, root - 1 + step], atol=1e-4, rtol=0
        )
        following = embeds[:, root + 1 + step : root + 2 + step]
        outputs = draft(following, outputs.last_hidden_state[:, -1:], **{CACHE: outputs[CACHE]})

    # Losses by hand.
    rows = target_rows(target, {name: inputs[name] for name in inputs if name != "row_id"}, [], None)
    chosen = rows.supervised
    theirs = target.lm_head(rows.target_features[chosen])[:, draft.draft_token_ids].softmax(-1)
    expected, counted = 0.0, chosen
    for step, weight in enumerate((1.0, 0.8, 0.64)):
        ours = draft.own_logits(unrolled[step][chosen]).log_softmax(-1)
        expected += weight / 2.44 * -(theirs * ours).sum(-1)[counted[chosen]].sum()
        counted = counted & torch.nn.functional.pad(counted[:, :-1], (1, 0))
    assert loss.item() == pytest.approx(expected.item() / int(chosen.sum()), rel=1e-4)


def _pictures(inputs: dict[str, torch.Tensor], draft: FeatureDraftModel, sample: int) -> slice:
    """Find the pictures of a row in a batch."""
    per_row = (inputs["input_ids"] == draft.config.visual_token_ids[0]).sum(-1)
    per_picture = int(per_row.sum()) // len(inputs["pixel_values"])
    start = int(per_row[:sample].sum()) // per_picture
    return slice(start, start + int(per_row[sample]) // per_picture)


def test_a_draft_learns_and_drafts(target, dataset, processor, tmp_path):
    draft = make_eagle3(target, draft_vocab_size=96)
    settings = {"stage": "multimodal", "max_steps": 6, "num_unroll_steps": 2, **LOSSES}
    trainer = make_trainer(target, dataset.select(range(12)), processor, tmp_path, draft=draft, **settings)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert all(last[f"eval_token_loss_{step}"] < first[f"eval_token_loss_{step}"] for step in (1, 2))
    assert not any("feature_loss" in name for name in last)
    trainer.save_model(str(tmp_path))
    loaded = Eagle3DraftModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, draft.state_dict()[name]) for name, value in loaded.state_dict().items())
    inputs = encode_prompts(processor, [row for row in evaluation_prompts(2) if row["group"] == "image"][:2])
    loaded.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(**inputs, assistant_model=loaded, max_new_tokens=12, do_sample=False), plain)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "from transformers_msd import Eagle3DraftModel" in card
    assert "The method is EAGLE-3" in card
    assert "- eagle3" in card


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_rows_are_those_of_decoding(architecture, decoupled):
    target = zoo.make_target(architecture)
    draft = make_eagle3(target, decoupled=decoupled).eval()
    draft.choose_tokens(torch.ones(zoo.VOCAB_SIZE), target.get_output_embeddings())
    parity = check_parity(target, draft, zoo.make_inputs(architecture, (0, 2, 1)), max_new_tokens=12)
    assert parity.holds(1e-3), parity
    assert parity.num_generated_rows > 0
    draft.config.feature_layers = [0, *draft.feature_layers[1:]]
    other = Eagle3DraftModel(draft.config).eval()
    other.choose_tokens(torch.ones(zoo.VOCAB_SIZE), target.get_output_embeddings())
    assert check_parity(target, other, zoo.make_inputs(architecture, (1,)), max_new_tokens=8).holds(1e-3)


@torch.no_grad()
def test_placeholders_are_read_in_training_as_in_decoding(target, processor):
    draft = make_eagle3(target).eval()
    draft.choose_tokens(torch.ones(draft.head.out_features), target.get_output_embeddings())
    prompt = next(row for row in evaluation_prompts(2) if row["group"] == "image")
    inputs = dict(encode_prompts(processor, [prompt]))
    fed = []
    draft.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs), with_kwargs=True)
    target.generate(**inputs, assistant_model=draft, max_new_tokens=4, do_sample=False)
    visual = draft.config.visual_token_ids
    rows = target_rows(target, inputs | {"labels": inputs["input_ids"]}, visual, None, draft.feature_layers, True)
    num_rows = rows.inputs_embeds.shape[1]
    torch.testing.assert_close(fed[0]["inputs_embeds"][:, :num_rows], rows.inputs_embeds)
    torch.testing.assert_close(fed[0]["features"][:, :num_rows], draft.fuse(rows.features), atol=1e-4, rtol=0)


def test_a_recipe_goes_on_from_a_draft_of_either_kind(tmp_path):
    write_world(tmp_path)
    target_config = AutoConfig.from_pretrained(tmp_path / "target")
    for make_recipe, kind in ((recipe, MSDDraftModel), (eagle3_recipe, Eagle3DraftModel)):
        arguments, args = make_parser().parse_dict(make_recipe(tmp_path, "first", max_steps=1, stage="text"))
        first = train(arguments, args).model
        assert type(first) is kind
        # A second stage may repeat what the first said of the draft, and say nothing else.
        settings = make_recipe(tmp_path, "second") | {"draft_model": str(tmp_path / "first")}
        for known in ({}, {"draft_config": None}):
            again = make_draft(make_parser().parse_dict(settings | known)[0], target_config)
            assert type(again) is kind
            assert all(torch.equal(value, first.state_dict()[name]) for name, value in again.state_dict().items())
        for other in ({"intermediate_size": 48}, {"num_hidden_layers": 2}, {"fc_norm": True}):
            with pytest.raises(ValueError, match="`draft_config` must be what the draft in .* has, .*, got"):
                make_draft(make_parser().parse_dict(settings | {"draft_config": other})[0], target_config)
    (tmp_path / "of_speculators").mkdir()
    (tmp_path / "of_speculators/config.json").write_text('{"speculators_model_type": "eagle3"}')
    MSDConfig.from_target(zoo.make_target("llava").config).save_pretrained(tmp_path / "msd")
    for folder, message in (
        ("target", "`draft_model` must be a draft of ours, got one of `model_type` 'llava'"),
        ("of_speculators", "`draft_model` must be a draft of ours, got one of `model_type` None"),
        ("msd", "`draft_model` must be of the kind that `draft` says, 'eagle3', got one of `model_type` 'msd_draft'"),
    ):
        settings = eagle3_recipe(tmp_path, "other") | {"draft_model": str(tmp_path / folder), "draft_config": None}
        with pytest.raises(ValueError, match=message):
            make_draft(make_parser().parse_dict(settings)[0], target_config)


@pytest.mark.parametrize(
    ("overrides", "losses", "message"),
    [
        ({}, {"feature_loss_weight": 1.0}, "does not predict the target's features, got `feature_loss_weight=1.0`"),
        ({"mrope_section": [1, 1, 2]}, {}, "A draft of one axis of positions can be trained"),
        ({"own_embeddings": True}, {}, "A draft that reads the target's embeddings can be trained"),
    ],
)
def test_what_cannot_be_trained_raises(target, dataset, processor, tmp_path, overrides, losses, message):
    config = make_eagle3(target).config
    half = config.text_config.head_dim // 2
    for name, value in overrides.items():
        setattr(config, name, [half - 2 * value[0], *value[:2]] if name == "mrope_section" else value)
    with pytest.raises(ValueError, match=message):
        make_trainer(target, dataset, processor, tmp_path, draft=Eagle3DraftModel(config), **LOSSES | losses)


def test_wrong_settings_raise(tmp_path):
    for value in (0.0, 1.2):
        with pytest.raises(ValueError, match="`unroll_decay` must be above 0 and at most 1"):
            MSDTrainingConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, unroll_decay=value)
    with pytest.raises(ValueError, match="`draft_vlm` takes the place of a draft on features"):
        make_parser().parse_dict(vlm_recipe(tmp_path, "wrong") | {"draft": "eagle3"})
    with pytest.raises(ValueError, match="`draft` must be one of"):
        make_parser().parse_dict(recipe(tmp_path, "wrong") | {"draft": "eagle4"})
    with pytest.raises(ValueError, match="A draft needs the `hidden_size` and `vocab_size` of its target"):
        Eagle3Config.from_target(CONFIG_MAPPING["blt"]())
    config = zoo.make_target("llava").config
    with pytest.raises(ValueError, match="A draft that is `decoupled` reads visual features"):
        Eagle3Config.from_target(config, decoupled=True, reads_placeholders=True)
    with pytest.raises(ValueError, match="`feature_layers` must name a hidden state at least, got none"):
        Eagle3Config.from_target(config, feature_layers=[])
    with pytest.raises(ValueError, match="fields of `Eagle3Config` or `LlamaConfig`, got .'fc_bias'"):
        Eagle3Config.from_target(config, fc_bias=True)
    with pytest.raises(ValueError, match="must be the config of a target, got Eagle3Config"):
        MSDConfig.from_target(Eagle3Config.from_target(config))
