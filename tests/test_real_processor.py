"""The real LLaVA-1.5 processor and real photos, through a LLaVA of the real config at reduced width and depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, pipeline

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.drafters.msd import MSDDrafter


DATA = Path(__file__).parents[2] / "shared" / "data"
FOLDER = DATA / "processors" / "llava-1.5-7b-hf"
PHOTOS = DATA / "images" / "flickr8k_1k"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"needs the real processor in {FOLDER}")


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    rows = [json.loads(line) for line in (PHOTOS / "messages.jsonl").read_text().splitlines()[:50]]
    names = list(dict.fromkeys(row["images"][0] for row in rows))[:3]
    return [Image.open(PHOTOS / name).convert("RGB") for name in names]


@pytest.fixture(scope="module")
def target() -> LlavaForConditionalGeneration:
    settings = json.loads((FOLDER / "config.json").read_text())
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    narrow |= {"initializer_range": 0.3}
    settings["text_config"] |= narrow | {"num_key_value_heads": 4}
    settings["vision_config"] |= narrow | {"projection_dim": 64}
    settings["torch_dtype"] = settings["text_config"]["torch_dtype"] = "float32"
    torch.manual_seed(0)
    target = LlavaForConditionalGeneration._from_config(LlavaConfig(**settings)).eval()
    target.generation_config.pad_token_id = target.config.pad_token_id
    return target


@pytest.fixture(scope="module")
def draft(target: LlavaForConditionalGeneration) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TreeConfig(num_nodes=12, depth=3, top_k=4)
    return draft


def conversation(num_images: int, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}]


def test_photos_give_the_tokens_of_plain_generate(
    target: LlavaForConditionalGeneration, draft: MSDDraftModel, processor: Any, photos: list[Image.Image]
) -> None:
    chats = [
        conversation(1, "What is in this picture?"),
        conversation(2, "How do these pictures differ? Answer in one sentence."),
        conversation(0, "Name a colour."),
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=photos, text=texts, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == target.config.image_token_id).sum(-1).tolist() == [576, 1152, 0]
    for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}):
        torch.manual_seed(0)
        plain = target.generate(**inputs, max_new_tokens=16, **settings)
        torch.manual_seed(0)
        assert torch.equal(target.generate(**inputs, max_new_tokens=16, **settings, assistant_model=draft), plain)


def test_pipeline_takes_a_draft_through_generate_kwargs(
    target: LlavaForConditionalGeneration,
    draft: MSDDraftModel,
    processor: Any,
    photos: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def counted(self: MSDDraftModel, *args: Any) -> Any:
        made.append(candidate_generator(self, *args))
        return made[-1]

    candidate_generator = MSDDrafter.candidate_generator
    monkeypatch.setattr(MSDDrafter, "candidate_generator", counted)
    pipe = pipeline("image-text-to-text", model=target, processor=processor)
    call = {"text": "USER: <image>\nWhat is this? ASSISTANT:", "images": photos[:1], "return_full_text": False}
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = pipe(**call, generate_kwargs=settings)
    assisted = pipe(**call, generate_kwargs={**settings, "assistant_model": draft})
    assert assisted == plain
    assert len(made) == 1


def test_prompts_of_a_batch_begin_as_a_users_call_lets_them(processor: Any, photos: list[Image.Image]) -> None:
    pytest.importorskip("trl")
    from trl.data_utils import prepare_multimodal_messages

    from transformers_msd.trainer.loading import encode_prompts

    prompt = prepare_multimodal_messages(conversation(1, "What is this?"), images=photos[:1])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(prompt, **options)["input_ids"]
    assert expected[0, 0] == processor.tokenizer.bos_token_id
    inputs = encode_prompts(processor, [prompt, conversation(0, "Hello")])
    assert torch.equal(inputs["input_ids"][:1], expected)
    assert inputs["attention_mask"][1].tolist() == sorted(inputs["attention_mask"][1].tolist())


def test_photos_and_texts_train_a_draft(target: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from training_fixtures import make_trainer

    from transformers_msd.trainer import check_parity
    from transformers_msd.trainer.callbacks import prompt_of
    from transformers_msd.trainer.dataset import row_length, undecoded
    from transformers_msd.trainer.loading import encode_prompts
    from transformers_msd.trainer.recipe import DraftArguments
    from transformers_msd.trainer.rows import load_rows

    processor = AutoProcessor.from_pretrained(DATA / "processors" / "llava-1.5-7b-hf-tf5-resaved")
    lines = (PHOTOS / "messages.jsonl").read_text().splitlines()[:4]
    talks = [json.loads(line) | {"images": [str(PHOTOS / json.loads(line)["images"][0])]} for line in lines]
    texts = [json.loads(line) for line in (DATA / "text" / "instruct_messages.jsonl").read_text().splitlines()[:4]]
    for name, rows in (("photos", talks), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = [str(tmp_path / "photos.jsonl"), str(tmp_path / "texts.jsonl")]
    rows = load_rows(DraftArguments(target_model="none", datasets=files), is_multimodal=True)
    trainer = make_trainer(
        target, rows, processor, tmp_path, stage="multimodal", max_steps=8, per_device_train_batch_size=2
    )
    for row in (rows[0], rows[4]):
        prompt = encode_prompts(processor, [prompt_of(row)])["input_ids"][0]
        collated = trainer.data_collator([row])
        row_ids, labels = collated["input_ids"][0], collated["labels"][0]
        assert prompt[0] == processor.tokenizer.bos_token_id
        assert torch.equal(row_ids[: len(prompt)], prompt)
        assert labels[: len(prompt)].eq(-100).all()
        answer = processor.tokenizer.decode(labels[labels != -100]).strip()
        assert answer == row["messages"][-1]["content"][0]["text"].strip()
    first = trainer.data_collator([trainer.train_dataset[0]])
    assert row_length(undecoded(rows)[0], 0, processor) == first["input_ids"].shape[1] > 576
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    inputs = encode_prompts(processor, [prompt_of(rows[0])])
    parity = check_parity(target, trainer.model.eval(), inputs, 8)
    assert parity.holds(1e-3), parity
    assert parity.num_visual_rows == 576
