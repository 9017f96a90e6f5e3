"""The tiny world: rows made from seeds, and the shipped target that reads its pictures."""

import numpy as np
import pytest
import torch

from training.tiny_world.build.accuracy import accuracy, swap_pictures
from training.tiny_world.build.induction import plant_induction
from training.tiny_world.build.target import (
    CHECKPOINT,
    answer_prompts,
    build_model,
    build_processor,
    encode_prompts,
    load_target,
)
from training.tiny_world.build.train_target import deepen, encode_row
from training.tiny_world.build.vision_warm_up import pixel_values
from training.tiny_world.world.rows import (
    GROUPS,
    attribute_questions,
    evaluation_prompts,
    training_dataset,
    training_rows,
)


@pytest.fixture(scope="module")
def processor():
    return build_processor(num_rows=500)


@pytest.fixture(scope="module")
def target():
    return load_target(CHECKPOINT, dtype=torch.float32)


def content(row: dict) -> str:
    """Return all of a row, pixels included, as text."""
    return repr((row["messages"], [np.asarray(image).tobytes() for image in row["images"]]))


def first_turn(row: dict) -> str:
    return content({"messages": row["messages"][:1] if not row["images"] else [], "images": row["images"]})


def test_a_seed_fixes_every_text_and_pixel():
    rows = [content(row) for row in training_rows(50, seed=3)]
    assert rows == [content(row) for row in training_rows(50, seed=3)]
    assert rows != [content(row) for row in training_rows(50, seed=4)]
    assert [content(row) for row in evaluation_prompts()] == [content(row) for row in evaluation_prompts()]


def test_evaluation_rows_share_no_picture_and_no_first_request_with_training_rows():
    trained = {first_turn(row) for row in training_rows(800)}
    held_out = [*evaluation_prompts(), *attribute_questions(100)]
    assert not any(first_turn(row) in trained for row in held_out)


def test_evaluation_prompts_come_in_four_groups_and_end_with_the_user():
    prompts = evaluation_prompts()
    assert [prompt["group"] for prompt in prompts] == [group for group in GROUPS for _ in range(25)]
    assert all(prompt["messages"][-1]["role"] == "user" for prompt in prompts)
    assert {group: {len(p["images"]) for p in prompts if p["group"] == group} for group in GROUPS} == {
        "text": {0},
        "image": {1},
        "images": {2},
        "second turn": {0, 1},
    }


def test_training_dataset_holds_the_rows():
    dataset = training_dataset(20, seed=5)
    for stored, row in zip(dataset, training_rows(20, seed=5), strict=True):
        assert stored["messages"][0]["content"][-1]["text"] == row["messages"][0]["content"][-1]["text"]
        assert [np.asarray(image).tobytes() for image in stored["images"]] == [
            np.asarray(image).tobytes() for image in row["images"]
        ]


def test_training_encodes_rows_as_the_processor_does(processor):
    for row in training_rows(20):
        encoded = encode_row(processor, row)
        text = processor.apply_chat_template(row["messages"])
        inputs = processor(text=text, images=row["images"] or None, return_tensors="pt")
        assert encoded["input_ids"].tolist() == inputs["input_ids"][0].tolist()
        if row["images"]:
            torch.testing.assert_close(pixel_values(row["images"]), inputs["pixel_values"], atol=1e-5, rtol=0)


def test_labels_are_the_answers_and_their_ends(processor):
    for row in training_rows(20):
        labels = encode_row(processor, row)["labels"]
        answers = [message["content"][0]["text"] for message in row["messages"] if message["role"] == "assistant"]
        assert processor.decode(labels[labels != -100]) == "".join(f" {answer}</s>" for answer in answers)


def test_deepening_keeps_the_outputs(processor):
    torch.manual_seed(0)
    shallow, deep = build_model(processor, num_layers=2).eval(), build_model(processor, num_layers=4)
    inputs = encode_prompts(processor, evaluation_prompts(1))
    deepen(shallow, deep).eval()
    torch.testing.assert_close(deep(**inputs).logits, shallow(**inputs).logits)


def test_the_planted_circuit_copies_before_any_training(processor):
    torch.manual_seed(0)
    model = build_model(processor, num_layers=2).eval()
    words = torch.randint(10, 900, (4, 12))
    input_ids = torch.cat([words, words], dim=1)

    def share_copied() -> float:
        with torch.no_grad():
            proposed = model(input_ids=input_ids).logits[:, 12:-1].argmax(-1)
        return float((proposed == words[:, 1:]).float().mean())

    assert share_copied() < 0.1
    plant_induction(model)
    assert share_copied() > 0.8


def test_target_reads_the_picture(target):
    questions = attribute_questions(40)
    assert accuracy(*target, questions)["all"] >= 0.8
    assert accuracy(*target, swap_pictures(questions))["all"] <= 0.6


def test_target_answers_at_length(target):
    model, processor = target
    prompts = evaluation_prompts(1)
    answers = answer_prompts(model, processor, prompts)
    lengths = [len(processor.tokenizer(answer)["input_ids"]) for answer in answers]
    assert min(lengths) >= 10
    assert sum(lengths) >= 30 * len(lengths)


def test_target_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 20 * 2**20
