"""What is trained on: long rows, unreadable pictures, answers of the target itself, other kinds of targets."""

import copy
import logging

import pytest
import torch


pytest.importorskip("trl")

from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from training_fixtures import make_trainer, tiny_processor  # noqa: F401
from transformers import LlamaForCausalLM

from training.tiny_world.build.target import CHAT_TEMPLATE, build_model, build_processor
from training.tiny_world.world.rows import FEATURES, training_dataset
from transformers_msd.trainer import ExactMatch
from transformers_msd.trainer.callbacks import prompt_of
from transformers_msd.trainer.data import add_bos
from transformers_msd.trainer.dataset import drop_long_rows, row_length, split_rows, undecoded
from transformers_msd.trainer.generation import GenerationSettings, answer_rows, generate_data
from transformers_msd.trainer.loading import encode_prompts
from transformers_msd.trainer.metrics import AcceptanceLength
from transformers_msd.trainer.parity import has_equal_prompt


@pytest.fixture(scope="module")
def rows():
    return training_dataset(24)


@pytest.fixture(scope="module")
def target(processor):
    torch.manual_seed(0)
    return build_model(processor, num_layers=1)


def test_row_length_is_that_of_the_collated_row(target, processor, rows, tmp_path):
    trainer = make_trainer(target, rows, processor, tmp_path, stage="multimodal")
    pictures = undecoded(rows)
    for number in range(8):
        length = int(trainer.data_collator([rows[number]])["attention_mask"].sum())
        assert row_length(pictures[number], number, processor) == length


def bos_processor(in_template, in_tokenizer):
    """Build a processor whose bos token comes from its chat template, from its tokenizer, from both or from none."""
    processor = build_processor(num_rows=200)
    if not in_template:
        processor.chat_template = CHAT_TEMPLATE.removeprefix("{{- bos_token }}")
    if in_tokenizer:
        added = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)])
        processor.tokenizer.backend_tokenizer.post_processor = added
    return processor


@pytest.mark.parametrize("in_template", [False, True])
@pytest.mark.parametrize("in_tokenizer", [False, True])
@pytest.mark.parametrize("kind", ["messages", "prompt and completion", "no pictures"])
def test_rows_begin_as_their_prompts(target, rows, tmp_path, in_template, in_tokenizer, kind):
    processor = bos_processor(in_template, in_tokenizer)
    asked = [{"messages": row["messages"][:2], "images": row["images"]} for row in rows.select(range(8))]
    trained = Dataset.from_list(asked, features=FEATURES)
    if kind == "prompt and completion":
        trained = trained.map(
            lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns=["messages"]
        )
    elif kind == "no pictures":
        asked = [row for row in asked if not row["images"]]
        trained = Dataset.from_list([{"messages": row["messages"]} for row in asked])
    trainer = make_trainer(target, trained, processor, tmp_path, stage="multimodal", max_length=2048)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(asked))])
    bos_token_id = processor.tokenizer.bos_token_id
    for number, row in enumerate(asked):
        prompt = encode_prompts(processor, [prompt_of(row)])["input_ids"][0]
        assert (prompt == bos_token_id).sum() == (in_template or in_tokenizer)
        row_ids, mask, labels = (batch[name][number] for name in ("input_ids", "attention_mask", "labels"))
        assert torch.equal(row_ids[: len(prompt)], prompt)
        assert (row_ids == bos_token_id).sum() == (prompt == bos_token_id).sum()
        answer = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True).strip()
        assert answer == row["messages"][1]["content"][0]["text"]
        assert torch.equal(labels[labels != -100], row_ids[labels != -100])
        if kind == "messages":
            assert row_length(undecoded(trained)[number], number, processor) == mask.sum()
            assert has_equal_prompt(processor, row, prompt[None])


def test_rows_of_text_begin_as_a_users_call_and_are_cut(target, tmp_path):
    processor = bos_processor(in_template=False, in_tokenizer=True)
    texts = ["The circle is red.", "The red square is left of the blue circle."]
    rows = Dataset.from_list([{"text": text, "images": []} for text in texts])
    trainer = make_trainer(target, rows, processor, tmp_path, stage="multimodal", max_length=8)
    expected = processor(text=texts, padding=True, truncation=True, max_length=8, padding_side="right")
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
    assert batch["input_ids"].tolist() == expected["input_ids"]
    assert batch["attention_mask"].tolist() == expected["attention_mask"]
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)


def test_bos_stands_in_all_that_is_of_tokens():
    processor = bos_processor(in_template=False, in_tokenizer=True)
    batch = {"input_ids": [[7, 3], [8, 0]], "attention_mask": [[1, 1], [1, 0]], "labels": [[-100, 3], [8, -100]]}
    batch |= {"mm_token_type_ids": [[0, 1], [0, 0]], "pixel_values": [[0.5, 0.5]]}
    begun = add_bos({name: torch.tensor(value) for name, value in batch.items()}, processor, None)
    assert {name: value.tolist() for name, value in begun.items()} == {
        "input_ids": [[1, 7, 3], [1, 8, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, -100, 3], [-100, 8, -100]],
        "mm_token_type_ids": [[0, 0, 1], [0, 0, 0]],
        "pixel_values": [[0.5, 0.5]],
    }


def test_prompt_that_training_does_not_read_is_told(processor, rows):
    for processing_class in (copy.deepcopy(processor), copy.deepcopy(processor).tokenizer):
        processing_class.chat_template = "{% if add_generation_prompt %}A: {% endif %}" + CHAT_TEMPLATE
        prompt = encode_prompts(processing_class, [prompt_of(rows[0])])["input_ids"]
        assert not has_equal_prompt(processing_class, rows[0], prompt)


def test_long_rows_with_pictures_are_dropped_and_counted(rows, processor, caplog):
    pictures = undecoded(rows)
    _, visual = split_rows(rows)
    lengths = sorted(row_length(pictures[row], row, processor) for row in visual)
    middle = lengths[len(lengths) // 2]
    with caplog.at_level(logging.WARNING):
        kept = drop_long_rows(rows, processor, middle)
    num_dropped = sum(length > middle for length in lengths)
    assert f"{num_dropped} of {len(lengths)} rows with pictures are longer than" in caplog.text
    assert len(kept) == len(rows) - num_dropped
    with pytest.raises(ValueError, match=f"the shortest has {lengths[0]} tokens"):
        drop_long_rows(rows, processor, lengths[0] - 1)


def test_unreadable_picture_is_named(rows, processor):
    broken = [
        row | {"images": [{"bytes": b"not a picture", "path": None}]} for row in undecoded(rows) if row["images"]
    ]
    with pytest.raises(ValueError, match="A picture of row 0 can't be read"):
        drop_long_rows(Dataset.from_list(broken, features=FEATURES), processor, 2048)


def test_rows_without_answers_raise(target, processor, rows, tmp_path):
    asked = rows.map(lambda row: {"messages": [turn for turn in row["messages"] if turn["role"] == "user"]})
    with pytest.raises(ValueError, match="must hold turns of the assistant"):
        make_trainer(target, asked, processor, tmp_path)


def test_target_of_another_size_raises(target, processor, rows, tmp_path):
    other = build_model(processor, num_layers=1)
    other.config.text_config.vocab_size += 1
    with pytest.raises(ValueError, match="made for a target of `vocab_size` 1024"):
        make_trainer(other, rows, processor, tmp_path, draft_for=target)


def test_prompt_completion_rows_supervise_the_completion(target, processor, rows, tmp_path):
    split = rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns=["messages"]
    )
    trainer = make_trainer(target, split, processor, tmp_path, stage="multimodal", max_steps=2)
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"][0]
    answer = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True).strip()
    assert answer == split[0]["completion"][0]["content"][0]["text"]
    trainer.train()


def test_text_target_trains(processor, tmp_path):
    torch.manual_seed(0)
    text_target = LlamaForCausalLM(build_model(processor, num_layers=1).config.text_config)
    talks = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(8)
    ]
    tokenizer = processor.tokenizer
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
    )
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        trainer = make_trainer(text_target, Dataset.from_list(talks), tokenizer, tmp_path, stage="text", max_steps=12)
        trainer.train()
    finally:
        tokenizer.chat_template = before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_adapted_target_gives_its_own_features(processor, rows, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = build_model(processor, num_layers=1)
    first = make_trainer(plain, rows, processor, tmp_path, stage="multimodal").evaluate()["eval_loss"]
    adapted = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trainer = make_trainer(adapted, rows, processor, tmp_path, stage="multimodal", max_steps=2)
    assert trainer.evaluate()["eval_loss"] != first
    trainer.train()
    assert all(weight.grad is None for weight in adapted.parameters())


@pytest.mark.filterwarnings("ignore")
def test_quantised_target_trains(processor, rows, tmp_path):
    torch.manual_seed(0)
    quantised = build_model(processor, num_layers=1)
    first = make_trainer(quantised, rows, processor, tmp_path, stage="multimodal").evaluate()["eval_loss"]
    # All but the head, as usual; a linear layer of these has no weight that could be multiplied with.
    language_model = quantised.model.language_model
    quantised.model.language_model = torch.ao.quantization.quantize_dynamic(language_model, {torch.nn.Linear})
    assert not isinstance(quantised.model.language_model.layers[0].mlp.down_proj, torch.nn.Linear)
    trainer = make_trainer(quantised, rows, processor, tmp_path, stage="multimodal", max_steps=8)
    assert trainer.evaluate()["eval_loss"] != first
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


MEMORY_SAVERS = [
    ({"activation_checkpointing": True}, torch.float32),
    ({"bf16": True}, torch.float32),
    ({"bf16": True}, torch.bfloat16),
    ({}, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("settings", "dtype", "is_vlm"),
    [
        pytest.param(*case, is_vlm, marks=pytest.mark.slow if (place + is_vlm) % 2 else ())
        for place, case in enumerate(MEMORY_SAVERS)
        for is_vlm in (False, True)
    ],
)
def test_memory_savers_train(processor, rows, tmp_path, settings, dtype, is_vlm):
    torch.manual_seed(1)
    target = build_model(processor, num_layers=1).to(dtype)
    target.lm_head.weight.data.mul_(10)  # sure of itself: there is something to learn
    draft = build_model(processor, num_layers=1) if is_vlm else None
    settings = {"stage": "multimodal", "max_steps": 8, **settings}
    trainer = make_trainer(target, rows, processor, tmp_path, draft=draft, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_target_answers_every_turn_itself(target, processor, rows):
    settings = GenerationSettings(batch_size=4, max_new_tokens=5)
    answered = answer_rows(target, processor, rows, settings)
    assert len(answered) == len(rows)
    for before, after in zip(rows, answered, strict=True):
        assert [turn["role"] for turn in before["messages"]] == [turn["role"] for turn in after["messages"]]
        asked = [turn for turn in before["messages"] if turn["role"] == "user"]
        assert asked == [turn for turn in after["messages"] if turn["role"] == "user"]
        assert len(before["images"]) == len(after["images"])
    alone = answer_rows(target, processor, rows.select([3]), settings)
    assert alone[0]["messages"] == answered[3]["messages"]


def test_language_model_answers_a_batch_as_it_answers_each_row(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}{% endfor %}"
    tokenizer.padding_side = "right"
    torch.manual_seed(0)
    target = LlamaForCausalLM(build_model(processor, num_layers=1).config.text_config).eval()
    questions = ("What is round?", "Is a red circle left of the blue square?")
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": question}]} for question in questions])
    settings = GenerationSettings(batch_size=2, max_new_tokens=5)
    together = answer_rows(target, tokenizer, rows, settings)["messages"]
    alone = [answer_rows(target, tokenizer, rows.select([row]), settings)["messages"][0] for row in range(2)]
    assert together == alone
    assert all(turns[1]["content"] for turns in together)


def test_interrupted_generation_goes_on(target, processor, rows, tmp_path, monkeypatch):
    settings = GenerationSettings(batch_size=4, max_new_tokens=3, temperature=1.0, rows_per_chunk=8)
    whole = generate_data(target, processor, rows, tmp_path / "whole", settings)
    calls = []

    def answer_twice(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_rows(*arguments)

    monkeypatch.setattr("transformers_msd.trainer.generation.answer_rows", answer_twice)
    with pytest.raises(KeyboardInterrupt):
        generate_data(target, processor, rows, tmp_path / "again", settings)
    with pytest.raises(ValueError, match="holds chunks of another run"):
        generate_data(target, processor, rows, tmp_path / "again", GenerationSettings(max_new_tokens=4))
    resumed = generate_data(target, processor, rows, tmp_path / "again", settings)
    assert len(calls) == 4
    assert resumed["messages"] == whole["messages"]
    with pytest.raises(ValueError, match="exists already"):
        generate_data(target, processor, rows, tmp_path / "again", settings)


def test_metrics():
    assert AcceptanceLength().compute(predictions=[[4, 2], [3]]) == {
        "acceptance_length": 3.0,
        "num_tokens": 9,
        "num_rounds": 3,
    }
    with pytest.raises(ValueError, match="must hold a round at least"):
        AcceptanceLength().compute(predictions=[[]])
    matched = ExactMatch().compute(predictions=["a b ", "c"], references=["a b", "d"])
    assert matched == {"exact_match": 0.5}


def test_small_model_is_distilled_from_the_target(target, processor, rows, tmp_path):
    def trainer_of(student, **changed):
        settings = {"stage": "multimodal", "max_steps": 12, **changed}
        return make_trainer(target, rows, processor, tmp_path, draft=student, **settings)

    torch.manual_seed(1)
    student = build_model(processor, num_layers=1)
    trainer = trainer_of(student)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    # What the target says of itself is the least that can be reached.
    itself = trainer_of(copy.deepcopy(target).requires_grad_(True)).evaluate()
    assert itself["eval_loss"] < trainer.evaluate()["eval_loss"]
    assert itself["eval_agreement"] == 1
    with pytest.raises(ValueError, match="are of MSD's features, .* got {'num_unroll_steps': 3}"):
        trainer_of(student, num_unroll_steps=3)
    with pytest.raises(ValueError, match="learns from losses on tokens alone"):
        trainer_of(student, token_loss_weight=0.0)
    student.config.text_config.vocab_size += 1
    with pytest.raises(ValueError, match="must have the target's vocabulary"):
        trainer_of(student)
