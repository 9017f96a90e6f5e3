"""Training pairs rows as decoding does, and lowers the loss of the draft alone."""

import copy
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch


pytest.importorskip("trl")

from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from training_fixtures import make_trainer, tiny_dataset, tiny_processor  # noqa: F401
from transformers import AutoConfig, AutoModel, TrainerCallback

from training.tiny_world.build.target import build_model
from transformers_msd.compat import CACHE
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.trainer import AcceptanceLengthCallback, MSDTrainingConfig
from transformers_msd.trainer.curriculum import RampSampler, visual_probability
from transformers_msd.trainer.data import pair_rows, target_rows, unroll_attention_mask
from transformers_msd.trainer.dataset import token_counts
from transformers_msd.trainer.losses import (
    chunked_token_losses,
    feature_loss,
    probability_loss,
    token_loss,
    top_k_loss,
)
from transformers_msd.trainer.parallel import prepare_target
from transformers_msd.trainer.run import make_parser


@pytest.fixture(scope="module")
def target(processor):
    torch.manual_seed(0)
    return build_model(processor, num_layers=1)


def test_feature_loss_is_smooth_l1():
    predicted = torch.tensor([[0.0, 0.5, 3.0], [1.0, 1.0, 1.0]])
    assert feature_loss(predicted, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])).tolist() == pytest.approx(
        [(0 + 0.125 + 2.5) / 3, 0]
    )


def test_token_loss_is_the_entropy_where_the_draft_is_right():
    logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(token_loss(logits, logits.softmax(-1)), entropy)
    assert (token_loss(logits.flip(0), logits.softmax(-1)) >= entropy).all()


def test_losses_on_tokens_by_hand():
    # Probabilities 0.5, 0.25, 0.25 of the target against 0.25, 0.5, 0.25 of the draft.
    target, draft = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[1.0, 2.0, 1.0]]).log()
    quarter, half = math.log(4), math.log(2)  # surprise at a probability of 1/4 and of 1/2
    assert token_loss(draft, target).item() == pytest.approx(0.5 * quarter + 0.25 * half + 0.25 * quarter)
    assert top_k_loss(draft, target, top_k=1).item() == pytest.approx(0.5 * quarter)
    assert top_k_loss(draft, target, top_k=10).item() == pytest.approx(token_loss(draft, target).item())
    assert probability_loss(draft, target).item() == pytest.approx(0.25 + 0.25)


def test_chunks_and_steps_together_change_no_loss_and_no_gradient():
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 9).requires_grad_(False)
    steps, target = torch.randn(2, 7, 4, requires_grad=True), torch.randn(7, 4)
    # Chunks of 3 rows of 2 steps are of one row.
    for chunk_size in (3, 6, 100):
        [losses], agrees = chunked_token_losses(list(steps), target, head, chunk_size, [token_loss])
        expected = token_loss(head(steps), head(target).softmax(-1))
        torch.testing.assert_close(losses, expected)
        assert torch.equal(agrees, head(steps).argmax(-1) == head(target).argmax(-1))
        gradient, expected = (torch.autograd.grad(loss.sum(), steps)[0] for loss in (losses, expected))
        torch.testing.assert_close(gradient, expected)


def test_losses_on_fewer_tokens_compare_what_the_draft_can_say():
    torch.manual_seed(0)
    head, draft_head = torch.nn.Linear(4, 9), torch.nn.Linear(4, 3)
    predicted, target, token_ids = torch.randn(7, 4), torch.randn(7, 4), torch.tensor([1, 4, 8])
    [losses], agrees = chunked_token_losses([predicted], target, head, 3, [token_loss], draft_head, token_ids)
    logits, target_logits = draft_head(predicted), head(target)
    torch.testing.assert_close(losses[0], token_loss(logits, target_logits[:, token_ids].softmax(-1)))
    assert torch.equal(agrees[0], token_ids[logits.argmax(-1)] == target_logits.argmax(-1))


def test_the_targets_logits_are_computed_once_for_all_steps():
    counted = []

    def head(rows):
        counted.append(len(rows))
        return rows @ torch.eye(4)

    steps = [torch.randn(6, 4, requires_grad=True) for _ in range(3)]
    chunked_token_losses(steps, torch.randn(6, 4), head, 100, [token_loss], torch.nn.Linear(4, 4))
    assert counted == [6]


def test_probability_of_pictures_is_the_published_table():
    # Epochs 1 to 40 of the published training: text in the first half, then 0.05, 0.10, ..., 0.95, 1.
    expected = [0.0] * 20 + [step / 20 for step in range(1, 21)]
    assert [visual_probability(epoch / 40) for epoch in range(1, 41)] == pytest.approx(expected)


def test_ramp_goes_from_text_to_pictures_and_repeats_with_its_seed():
    def draws(epoch):
        sampler = RampSampler(list(range(100)), list(range(100, 250)), num_draws=400, seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    epochs = [draws(epoch) for epoch in range(4)]
    shares = [sum(row >= 100 for row in rows) / len(rows) for rows in epochs]
    assert [len(rows) for rows in epochs] == [100] * 4
    assert shares[:2] == [0, 0]
    assert shares[2] == pytest.approx(0.25, abs=0.1)
    assert shares[3] == pytest.approx(0.75, abs=0.1)
    assert draws(3) == epochs[3]
    assert draws(0) != epochs[1]


def test_rows_pair_tokens_with_the_feature_before_and_learn_the_assistant():
    input_ids = torch.tensor([[1, 9, 9, 2, 3, 4, 5, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([[-100, -100, -100, -100, 3, 4, 5, -100], [-100] * 4 + [3, 4, 5, 6]])
    embeds = torch.arange(16.0).view(2, 8, 1)
    rows = pair_rows(input_ids, labels, input_ids != 0, embeds, -embeds, visual_token_ids=[9])
    assert rows.inputs_embeds[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert rows.features[0, :, 0].tolist() == [0, -1, -2, -3, -4, -5, -6]
    assert rows.target_features[0, :, 0].tolist() == [-1, -2, -3, -4, -5, -6, -7]
    assert rows.visual_mask.int().tolist() == [[1, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert rows.row_mask.int().tolist() == [[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert rows.supervised.int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 5], [0, 0, 0, 1, 2, 3, 4]]


def test_unrolled_rows_see_the_target_up_to_their_root_and_then_their_chain():
    mask = unroll_attention_mask(torch.ones(1, 4, dtype=torch.bool), step=2, dtype=torch.float32)
    assert (mask[0, 0] == 0).int().tolist() == [
        # true features | step 1     | step 2
        [0, 0, 0, 0] + [0, 0, 0, 0] + [1, 0, 0, 0],
        [0, 0, 0, 0] + [1, 0, 0, 0] + [0, 1, 0, 0],
        [1, 0, 0, 0] + [0, 1, 0, 0] + [0, 0, 1, 0],
        [1, 1, 0, 0] + [0, 0, 1, 0] + [0, 0, 0, 1],
    ]


@pytest.mark.parametrize("visual_pool_size", [0, 1, 4])
@torch.no_grad()
def test_unrolled_training_equals_drafting_a_chain_with_a_cache(
    target, dataset, processor, tmp_path, visual_pool_size
):
    trainer = make_trainer(target, dataset, processor, tmp_path, stage="multimodal", num_unroll_steps=3)
    trainer.model.config.visual_pool_size = visual_pool_size
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    trainer.model.eval()
    inputs = next(iter(trainer.get_eval_dataloader()))
    trainer.compute_loss(trainer.model, dict(inputs))
    unrolled = list(seen)

    inputs.pop("row_id")
    rows = target_rows(target, inputs, trainer.model.config.visual_token_ids).pool(trainer.model)
    sample, root = 1, int(rows.supervised[1].nonzero()[0])
    part = (slice(sample, sample + 1), slice(0, root + 1))
    positions = rows.position_ids[sample : sample + 1]
    outputs = trainer.model(
        rows.inputs_embeds[part],
        rows.features[part],
        rows.visual_mask[part],
        position_ids=positions[:, : root + 1],
        use_cache=True,
    )
    for step in range(3):
        torch.testing.assert_close(
            outputs.last_hidden_state[0, -1], unrolled[step][sample, root + step], atol=1e-4, rtol=0
        )
        next_embeds = rows.inputs_embeds[sample : sample + 1, root + step + 1 : root + step + 2]
        cache = outputs[CACHE]
        outputs = trainer.model(
            next_embeds,
            outputs.last_hidden_state[:, -1:],
            position_ids=positions[:, root + step + 1 : root + step + 2],
            **{CACHE: cache},
        )


@pytest.mark.parametrize("num_unroll_steps", [1, 3])
def test_training_lowers_the_loss_and_leaves_the_target_alone(target, dataset, processor, tmp_path, num_unroll_steps):
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    settings = {"stage": "multimodal", "max_steps": 16, "num_unroll_steps": num_unroll_steps}
    trainer = make_trainer(target, dataset, processor, tmp_path, **settings)
    name = f"eval_feature_loss_{num_unroll_steps}"
    first = trainer.evaluate()[name]
    trainer.train()
    assert trainer.evaluate()[name] < 0.9 * first
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    assert all(weight.grad is None for weight in target.parameters())


def test_draft_learns_a_head_of_the_tokens_that_its_target_says_most(target, dataset, processor, tmp_path):
    draft = MSDDraftModel(MSDConfig.from_target(target.config, intermediate_size=32, draft_vocab_size=96))
    with pytest.raises(ValueError, match="must be chosen before it drafts"):
        target.generate(torch.tensor([[5, 6]]), assistant_model=draft, max_new_tokens=2)
    settings = {"stage": "multimodal", "max_steps": 8, "token_loss_weight": 1.0}
    trainer = make_trainer(target, dataset, processor, tmp_path, draft=draft, **settings)
    chosen = draft.draft_token_ids
    counts = token_counts(dataset, processor, draft.config.get_text_config())
    assert processor.tokenizer.eos_token_id in chosen
    assert counts[chosen].min() >= counts.index_fill(0, chosen, 0).max() > 0
    torch.testing.assert_close(draft.head.weight, target.lm_head.weight[chosen])
    first = trainer.evaluate()["eval_token_loss_1"]
    trainer.train()
    assert trainer.evaluate()["eval_token_loss_1"] < first
    assert not torch.equal(draft.head.weight, target.lm_head.weight[chosen])
    trainer.save_model(str(tmp_path))
    loaded = MSDDraftModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.draft_token_ids, chosen)
    assert torch.equal(loaded.head.weight, draft.head.weight)


def test_rows_without_an_answer_count_no_token(processor, target):
    ask = [{"role": "user", "content": [{"type": "text", "text": "What is red?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "The circle is red."}]}]
    rows = Dataset.from_list([{"messages": ask}, {"messages": ask + answer}])
    counts = token_counts(rows, processor, target.config.text_config)
    expected = processor.tokenizer("The circle is red.", add_special_tokens=False)["input_ids"]
    counts[target.config.text_config.eos_token_id] = 0
    assert counts.sum() == len(expected)
    assert all(counts[expected] > 0)


def test_trained_draft_is_saved_and_loads(target, dataset, processor, tmp_path):
    AutoConfig.register(MSDConfig.model_type, MSDConfig, exist_ok=True)
    AutoModel.register(MSDConfig, MSDDraftModel, exist_ok=True)
    trainer = make_trainer(target, dataset, processor, tmp_path, stage="text", save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.fc.weight, trainer.model.fc.weight)


@pytest.mark.parametrize(("stage", "pictures"), [("text", [False]), ("multimodal", [False, True])])
def test_stage_picks_the_rows(target, dataset, processor, tmp_path, stage, pictures):
    trainer = make_trainer(target, dataset, processor, tmp_path, stage=stage)
    assert sorted({bool(row["images"]) for row in trainer.train_dataset}) == pictures


def test_ramp_turns_to_pictures_over_the_run(target, dataset, processor, tmp_path):
    trainer = make_trainer(target, dataset, processor, tmp_path, stage="ramp", max_steps=-1, num_train_epochs=8)
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append([bool(row["images"]) for row in rows]) or collate(rows)
    trainer.train()
    shares = [sum(batch) / len(batch) for batch in batches]
    half = len(shares) // 2
    assert sum(shares[: half - 1]) == 0
    assert sum(shares[half:]) > 0
    assert shares[-1] == 1


def test_ramp_without_pictures_raises(target, dataset, processor, tmp_path):
    with pytest.raises(ValueError, match="needs rows without pictures"):
        make_trainer(target, dataset.filter(lambda row: not row["images"]), processor, tmp_path, stage="ramp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "images"}, "`stage` must be one of"),
        ({"num_unroll_steps": 0}, "`num_unroll_steps` must be at least 1, got 0"),
        ({"num_unroll_steps": 2, "activation_checkpointing": True}, "drops the cache"),
        ({"num_unroll_steps": 2, "gradient_checkpointing": True}, "drops the cache"),
    ],
)
def test_wrong_settings_raise(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MSDTrainingConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


NAMES = ("activation_checkpointing", "gradient_checkpointing")
SAVING = [
    ({}, False),
    *(({name: value}, bool(value)) for name in NAMES for value in (True, False, None)),
    (dict.fromkeys(NAMES, True), True),
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("settings", "is_on"), SAVING)
def test_both_names_turn_the_recomputation_of_activations_on(target, dataset, processor, tmp_path, settings, is_on):
    trainer = make_trainer(target, dataset, processor, tmp_path, stage="text", save_strategy="no", **settings)
    assert [getattr(trainer.args, name) for name in NAMES] == [is_on, is_on]
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()) == is_on


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("said", ["NAME", "NAME true", "NAME false"])
@pytest.mark.parametrize("name", NAMES)
def test_commands_say_either_name(tmp_path, name, said):
    line = f"--target_model a/b --datasets a/b --use_cpu true --bf16 false --output_dir {tmp_path}".split()
    _, args = make_parser().parse_args_and_config([*line, *f"--{said.replace('NAME', name)}".split()])
    assert args.activation_checkpointing == (said != "NAME false")


def test_what_is_logged_at_the_end_is_still_reported(target, dataset, processor, tmp_path, monkeypatch):
    class Reporter(TrainerCallback):
        reported: ClassVar[dict] = {}
        is_open = True

        def on_log(self, args, state, control, logs, **kwargs):
            assert self.is_open
            self.reported.update(logs)

        def on_train_end(self, args, state, control, **kwargs):
            self.is_open = False

    monkeypatch.setattr("transformers_msd.trainer.base.get_reporting_integration_callbacks", lambda names: [Reporter])
    trainer = make_trainer(target, dataset, processor, tmp_path, stage="text", save_strategy="no")
    trainer.add_callback(Reporter)
    trainer.add_callback(AcceptanceLengthCallback(trainer, dataset.select([0]), max_new_tokens=2))
    trainer.train()
    assert {"loss", "eval_acceptance_length", "eval_speedup"} <= set(Reporter.reported)


def test_losses_that_are_not_finite_end_training_and_nothing_is_saved(target, dataset, processor, tmp_path):
    trainer = make_trainer(target, dataset, processor, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss.*not finite at step 1|not finite at step 1, and are not saved"):
        trainer.train()
    assert not list(tmp_path.glob("**/model.safetensors"))
    with pytest.raises(ValueError, match="are not saved"):
        trainer.save_model()
    assert not list(tmp_path.glob("**/model.safetensors"))


def test_rows_without_anything_to_learn_are_counted_and_end_training(target, dataset, processor, tmp_path):
    rows = [row for row in dataset.to_list() if not row["images"]][:8]
    long = copy.deepcopy(rows)
    for row in long:
        row["messages"][0]["content"] = [{"type": "text", "text": "red " * 200}]
    settings = {"stage": "text", "max_steps": 2, "max_length": 64}
    nothing = Dataset.from_list(long, features=dataset.features)
    trainer = make_trainer(target, nothing, processor, tmp_path, **settings)
    with pytest.raises(ValueError, match="No row up to step 1 holds a token to learn from.*max_length=64"):
        trainer.train()
    some = Dataset.from_list(rows[:4] + long[:4], features=dataset.features)
    trainer = make_trainer(target, some, processor, tmp_path, **settings, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.state.log_history[0]["rows_without_supervision"] == 0.5


def test_target_that_zero_3_sharded_raises():
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    target = torch.nn.Linear(2, 2)
    target.weight.data = torch.empty(0)  # as `deepspeed.zero.Init` leaves it
    with pytest.raises(ValueError, match="The target must come whole"):
        prepare_target(target, accelerator)


def test_target_that_was_moved_between_trainers_is_moved_back(target, monkeypatch):
    accelerator, target = Accelerator(cpu=True), copy.deepcopy(target)
    assert prepare_target(target, accelerator).device.type == "cpu"
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    assert prepare_target(target, accelerator).device.type == "meta"
