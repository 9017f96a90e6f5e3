"""Training and decoding feed a draft the same rows, on real conversations and on every architecture."""

import pytest
import torch


pytest.importorskip("trl")

import zoo
from torch.nn.functional import pad

from training.evidence.tiny import make_model, make_prompts
from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import HiViSConfig, HiViSDraftModel, MSDConfig, MSDDraftModel
from transformers_msd.trainer import check_parity
from transformers_msd.trainer.data import target_rows


@pytest.fixture(scope="module")
def pair():
    target, processor = load_target()
    return target, processor, MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)


@pytest.mark.parametrize("group", ["text", "image", "images", "second turn"])
def test_rows_are_equal_on_the_tiny_world(pair, group):
    target, processor, draft = pair
    prompts = [prompt for prompt in evaluation_prompts(3) if prompt["group"] == group]
    parity = check_parity(target, draft, encode_prompts(processor, prompts[:1]))
    assert parity.holds(1e-4), parity
    assert (parity.num_visual_rows > 0) == bool(prompts[0]["images"])
    assert parity.num_generated_rows > 20
    left_padded = check_parity(target, draft, encode_prompts(processor, prompts))
    assert left_padded.holds(1e-4), left_padded


def test_padding_on_the_right_changes_no_row(pair):
    target, processor, draft = pair
    inputs = dict(encode_prompts(processor, evaluation_prompts(1)[1:2]))
    inputs["labels"] = inputs["input_ids"]
    padded = inputs | {name: pad(inputs[name], (0, 3)) for name in ("input_ids", "attention_mask", "labels")}
    ids = draft.config.visual_token_ids
    alone, rows = target_rows(target, inputs, ids), target_rows(target, padded, ids)
    length = alone.features.shape[1]
    torch.testing.assert_close(rows.features[:, :length], alone.features, atol=1e-4, rtol=0)
    assert rows.row_mask.sum() == length
    assert torch.equal(rows.position_ids[:, :length], alone.position_ids)


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
@pytest.mark.parametrize("num_images", [(1,), (0, 2, 1)])
def test_rows_are_equal_on_every_architecture(architecture, num_images):
    target = zoo.make_target(architecture)
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    parity = check_parity(target, draft, zoo.make_inputs(architecture, num_images), max_new_tokens=12)
    assert parity.holds(1e-3), parity
    assert parity.num_generated_rows > 0


def test_patches_that_no_tower_encodes_are_seen_in_training():
    target = make_model("fuyu")
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    parity = check_parity(target, draft, make_prompts(target, "pictures"), max_new_tokens=4)
    assert parity.holds(1e-3), parity


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("visual_pool_size", "num_visual_rows"), [(0, 0), (1, 12), (3, 5), (4, 3)])
def test_rows_are_compared_as_the_draft_reads_them(visual_pool_size, num_visual_rows, decoupled):
    # Two pictures that touch are one run, of 8 rows.
    target, inputs = zoo.make_target("llava"), zoo.make_inputs("llava", (0, 2, 1))
    settings = {"visual_pool_size": visual_pool_size, "decoupled": decoupled}
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config, **settings)).eval()
    parity = check_parity(target, draft, inputs, max_new_tokens=12)
    assert parity.holds(1e-3), parity
    assert parity.num_visual_rows == num_visual_rows


def test_rows_that_are_pooled_otherwise_are_seen():
    target = zoo.make_target("llava")
    draft, other = (
        MSDDraftModel(MSDConfig.from_target(target.config, visual_pool_size=size)).eval() for size in (2, 4)
    )
    pools = iter((other.pool, draft.pool))  # in decoding, and then as training does
    draft.pool = lambda *args, **kwargs: next(pools)(*args, **kwargs)
    assert not check_parity(target, draft, zoo.make_inputs("llava", (1,)), max_new_tokens=8).holds()


def test_what_is_not_trained_here_is_not_compared():
    target = zoo.make_target("llava")
    draft = HiViSDraftModel(HiViSConfig.from_target(target.config)).eval()
    with pytest.raises(ValueError, match="must be one that is trained here, got HiViSDraftModel"):
        check_parity(target, draft, zoo.make_inputs("llava", (1,)))


def test_a_wrong_row_is_seen(pair):
    target, processor, draft = pair
    inputs = encode_prompts(processor, evaluation_prompts(1)[1:2])
    other = MSDDraftModel(MSDConfig.from_target(target.config, visual_token_ids=[5])).eval()
    assert not check_parity(target, other, inputs).equal_masks
