"""Block drafts are trained by the trainer of MSD: blocks begun at many tokens, as they are drafted in `generate`."""

import copy

import pytest
import torch


pytest.importorskip("trl")

import zoo
from training_fixtures import (  # noqa: F401
    block_recipe,
    make_trainer,
    tiny_dataset,
    tiny_processor,
)

from training.tiny_world.build.target import build_model, encode_prompts
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import BlockDraftConfig, BlockDraftModel, MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.trainer import check_parity
from transformers_msd.trainer.arithmetic import operations_of_step
from transformers_msd.trainer.blocks import choose_anchors
from transformers_msd.trainer.data import target_rows
from transformers_msd.trainer.run import make_parser


BLOCK_SIZE = 4
LOSSES = {"feature_loss_weight": 0.0, "token_loss_weight": 1.0, "feature_noise": 0.0, "unroll_decay": 0.8}
DESIGNS = {
    "rows that read the feature": {},
    "embeddings alone": {"reads_feature": False, "output_multiplier": 2, "final_logit_softcapping": 3.0},
    "whole blocks, in place": {"causal": False, "predicts_next": False, "reads_feature": False},
    "decoupled, edges": {"visual_rows": "decoupled", "edge_rank": 3, "edge_type": "gated"},
    "dropped, fewer tokens, edges": {"visual_rows": "dropped", "draft_vocab_size": 96, "edge_rank": 3},
    "a token as mask": {"mask_token_id": 7, "num_hidden_layers": 2},
    "windows, convolutions": {
        "num_hidden_layers": 2,
        "causal": [True, False],
        "windows": [9, 3],
        "conv_kernel_size": 2,
        "conv_group_size": 8,
        "edge_rank": 3,
        "edge_type": "bilinear",
        "embedding_scale": 0.5,
        "output_multiplier": 2,
        "final_logit_softcapping": 3.0,
        "mask_token_id": 7,
    },
}


@pytest.fixture(scope="module")
def target(processor):
    torch.manual_seed(0)
    return build_model(processor, num_layers=3)


def make_block(target: torch.nn.Module, **overrides) -> BlockDraftModel:
    torch.manual_seed(1)
    settings = {"intermediate_size": 32, "block_size": BLOCK_SIZE} | overrides
    draft = BlockDraftModel(BlockDraftConfig.from_target(target.config, **settings))
    if draft.edge_to is not None:
        torch.nn.init.normal_(draft.edge_to.weight)
    for name, weight in draft.named_parameters():
        if "_conv." in name:
            torch.nn.init.normal_(weight, std=0.5)
    return draft


@pytest.mark.parametrize("prefix_weights", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_blocks_of_training_are_those_of_drafting(target, dataset, processor, tmp_path, design, prefix_weights):
    draft = make_block(target, **DESIGNS[design])
    losses = LOSSES | ({"prefix_weights": True, "unroll_decay": 1.0} if prefix_weights else {})
    losses |= {"stage": "multimodal", "num_blocks": 200}
    trainer = make_trainer(target, dataset, processor, tmp_path, draft=draft, **losses)
    seen = []
    draft.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    draft.eval()
    inputs = next(iter(trainer.get_eval_dataloader()))
    loss = trainer.compute_loss(draft, dict(inputs))
    ids, visual, num_levels = inputs["input_ids"], draft.config.visual_token_ids, draft.config.num_levels
    whole = {name: inputs[name] for name in inputs if name != "row_id"}
    rows = target_rows(target, whole, visual, None, draft.feature_layers)
    anchors, is_begun = choose_anchors(rows.supervised, 200, [0] * len(ids))
    assert is_begun.sum() == rows.supervised.sum()
    trained = draft.levels(seen[0].unflatten(1, (anchors.shape[1], BLOCK_SIZE)), num_levels)

    # In `generate` a block begins with the first token of the answer: all of it is asked for there.
    sample = int(ids.eq(visual[0]).any(-1).nonzero()[0])
    root = int(rows.supervised[sample].nonzero()[0]) + 1
    prompt = {name: inputs[name][sample : sample + 1, :root] for name in ("input_ids", "attention_mask")}
    per_picture = int(ids.eq(visual[0]).sum()) // len(inputs["pixel_values"])
    start = int(ids[:sample].eq(visual[0]).sum()) // per_picture
    num_pictures = int(prompt["input_ids"].eq(visual[0]).sum()) // per_picture
    prompt["pixel_values"] = inputs["pixel_values"][start : start + num_pictures]
    draft.tree_config = TreeConfig(num_nodes=4, depth=num_levels, top_k=1, gate=False, ngrams=False)
    first = ids[sample, root].item()
    target.generate(
        **prompt,
        assistant_model=draft,
        max_new_tokens=2,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, prefix: [first],
    )
    torch.testing.assert_close(draft.levels(seen[1][0], num_levels), trained[sample, 0], atol=1e-4, rtol=1e-4)

    # Losses by hand.
    expected, weights = 0.0, [0.8**level for level in range(num_levels)]
    for row, places in enumerate(anchors):
        for block, place in enumerate(places[is_begun[row]].tolist()):
            stands = 1.0
            for level in range(num_levels):
                following = place + level
                if following >= rows.supervised.shape[1] or not rows.supervised[row, following]:
                    break
                theirs = target.lm_head(rows.target_features[row, following])
                own = trained[row, block, level]
                ours = target.lm_head(own) if draft.head is None else draft.head(own)
                if draft.logit_scales is not None:
                    ours = (ours * 2 / 3).tanh() * 3
                if draft.edge_to is not None:
                    edges = draft.edge_to(draft.edges_from(ids[row, following + 1], own))
                    ours = ours + (edges if draft.head is None else edges[draft.draft_token_ids])
                theirs = (theirs if draft.head is None else theirs[draft.draft_token_ids]).softmax(-1)
                weight = stands if prefix_weights else weights[level] / sum(weights)
                expected += weight * -(theirs * ours.log_softmax(-1)).sum()
                stands *= float(torch.minimum(theirs, ours.softmax(-1)).sum())
    assert loss.item() == pytest.approx(float(expected) / int(rows.supervised.sum()), rel=1e-4)


def test_blocks_begun_at_some_tokens_stand_for_all(target, dataset, processor, tmp_path):
    supervised = torch.zeros(3, 40, dtype=torch.bool)
    supervised[0, 5:30] = True
    supervised[1, 7:10] = True
    drawn = [choose_anchors(supervised, 4, [seed, seed, seed]) for seed in range(40)]
    for anchors, is_begun in drawn:
        assert is_begun.sum(-1).tolist() == [4, 3, 0]
        assert anchors[1, :3].tolist() == [7, 8, 9]
        own = anchors[0].tolist()
        assert own == sorted(set(own))
        assert supervised[0, own].all()
    assert len({tuple(anchors[0].tolist()) for anchors, _ in drawn}) > 30
    again = choose_anchors(supervised[:1], 4, [7])[0]
    assert torch.equal(again[0], drawn[7][0][0])  # whatever stands beside it

    def mean_loss(num_blocks: int, num_draws: int) -> float:
        draft = make_block(target)
        settings = LOSSES | {"num_blocks": num_blocks, "stage": "text", "per_device_train_batch_size": 6}
        trainer = make_trainer(target, dataset, processor, tmp_path, draft=draft, **settings)
        inputs = next(iter(trainer.get_train_dataloader()))
        draft.train()
        found = []
        for epoch in range(num_draws):
            trainer.state.epoch = float(epoch)
            found.append(trainer.compute_loss(draft, dict(inputs)).item())
        return sum(found) / len(found)

    with torch.no_grad():
        assert mean_loss(3, 40) == pytest.approx(mean_loss(1000, 1), rel=0.02)


def test_a_draft_learns_and_drafts(target, dataset, processor, tmp_path):
    draft = make_block(target, edge_rank=4, draft_vocab_size=96, visual_rows="decoupled")
    settings = {"stage": "multimodal", "max_steps": 6, "num_blocks": 8, **LOSSES}
    trainer = make_trainer(target, dataset.select(range(12)), processor, tmp_path, draft=draft, **settings)
    before = copy.deepcopy(draft.state_dict())
    first = trainer.evaluate()
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]  # begun at the same tokens
    trainer.train()
    last = trainer.evaluate()
    for level in range(1, BLOCK_SIZE + 1):
        assert last[f"eval_token_loss_{level}"] < first[f"eval_token_loss_{level}"]
    learned = {name for name, value in draft.state_dict().items() if not torch.equal(value, before[name])}
    assert learned == set(before) - {"draft_token_ids"}
    trainer.save_model(str(tmp_path))
    loaded = BlockDraftModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, draft.state_dict()[name]) for name, value in loaded.state_dict().items())
    inputs = encode_prompts(processor, [row for row in evaluation_prompts(2) if row["group"] == "image"][:2])
    loaded.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(**inputs, assistant_model=loaded, max_new_tokens=12, do_sample=False), plain)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "from transformers_msd import BlockDraftModel" in card
    assert "drafted in one forward (DFlash" in card
    assert "- block-draft" in card


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_are_those_of_decoding(architecture):
    target = zoo.make_target(architecture)
    draft = make_block(target, visual_rows="decoupled").eval()
    parity = check_parity(target, draft, zoo.make_inputs(architecture, (0, 2, 1)), max_new_tokens=12)
    assert parity.holds(1e-3), parity
    assert parity.num_generated_rows > 0


def test_work_grows_with_blocks(target, tmp_path):
    config = make_block(target).config
    args = make_parser().parse_dict(block_recipe(tmp_path, "out"))[1]

    def operations(num_blocks: int, num_supervised: float) -> tuple[float, float]:
        args.num_blocks = num_blocks
        return operations_of_step(target.config, config, args, 4, 100, num_supervised)

    few, many, all_of_them, more = operations(4, 20), operations(8, 20), operations(20, 20), operations(30, 20)
    assert few[1] < many[1] < all_of_them[1] == more[1]
    assert few[0] < many[0] < all_of_them[0] == more[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_loss_weight": 1.0}, "does not predict the target's features, got `feature_loss_weight=1.0`"),
        ({"num_unroll_steps": 2}, "says all levels in one forward, .* got `num_unroll_steps=2`"),
        ({"activation_checkpointing": True}, "says all levels in one forward, .*`activation_checkpointing=True`"),
        ({"gradient_checkpointing": True}, "says all levels in one forward, .*`activation_checkpointing=True`"),
        ({"prefix_weights": True}, "`prefix_weights` takes the place of `unroll_decay`, got both .0.8."),
        ({"num_blocks": 0}, "`num_blocks` must be at least 1"),
    ],
)
def test_what_cannot_be_trained_raises(target, dataset, processor, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(target, dataset, processor, tmp_path, draft=make_block(target), **LOSSES | settings)


def test_blocks_alone_have_prefixes(target, dataset, processor, tmp_path):
    draft = MSDDraftModel(MSDConfig.from_target(target.config))
    with pytest.raises(
        ValueError, match="`prefix_weights` weighs the levels of a `BlockDraftModel`, got MSDDraftModel"
    ):
        make_trainer(target, dataset, processor, tmp_path, draft=draft, prefix_weights=True)
