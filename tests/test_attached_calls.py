"""Calls that nobody can edit, with the shipped pair: pipelines, a trainer that samples, an evaluation harness."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, pipeline


pytest.importorskip("datasets")
from datasets import Dataset

from training.tiny_world.build.target import load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDDraftModel, attach, detach
from transformers_msd.drafters.attached import attachment_of


class Counted:
    """Counts the forwards of a target while it generates, as long as no other forwards run."""

    def __init__(self, target: PreTrainedModel) -> None:
        self.target, self.count = target, 0

    def __enter__(self) -> "Counted":
        self._handle = self.target.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _count(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            self.count += 1


@pytest.fixture(scope="module")
def draft() -> MSDDraftModel:
    return MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)


@pytest.fixture
def loaded() -> Iterator[tuple[PreTrainedModel, Any]]:
    target, processor = load_target()
    yield target, processor
    detach(target)
    assert attachment_of(target) is None


def test_a_pipeline(loaded: tuple[PreTrainedModel, Any], draft: MSDDraftModel) -> None:
    target, processor = loaded
    pipe = pipeline("image-text-to-text", model=target, processor=processor)
    pictures = [row["images"][0] for row in evaluation_prompts(40) if row["images"]][:2]
    question = {"type": "text", "text": "Describe the picture."}
    chats = [[{"role": "user", "content": [{"type": "image", "image": picture}, question]}] for picture in pictures]

    def run() -> tuple[list[str], int]:
        with Counted(target) as forwards:
            said = [pipe(text=chat, max_new_tokens=40, return_full_text=False)[0]["generated_text"] for chat in chats]
        return said, forwards.count

    plain, num_plain = run()
    attach(target, draft)
    drafted, num_drafted = run()
    detach(target)
    assert drafted == plain
    assert num_drafted < num_plain / 2
    assert run() == (plain, num_plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trainer_that_samples_learns_the_same(draft: MSDDraftModel, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    question = [{"role": "user", "content": "Describe the picture."}]
    pictures = [row["images"][0] for row in evaluation_prompts(20) if row["images"]]
    rows = Dataset.from_list([{"prompt": question, "image": picture} for picture in pictures])

    def run(has_draft: bool) -> tuple[list[str], int, PreTrainedModel]:
        target, processor = load_target()
        said: list[str] = []

        def reward(completions: list[Any], **_: Any) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            said.extend(texts)
            return [-float(len(text)) for text in texts]

        settings = trl.GRPOConfig(
            output_dir=str(tmp_path / str(has_draft)),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=32,
            learning_rate=1e-3,
            temperature=1.2,
            gradient_checkpointing=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(target, reward, args=settings, train_dataset=rows, processing_class=processor)
        if has_draft:
            attach(target, draft)
        with Counted(target) as forwards:
            trainer.train()
        return said, forwards.count, target

    said, num_plain, target = run(has_draft=False)
    said_too, num_drafted, target_too = run(has_draft=True)
    assert len(set(said)) > 1
    assert said_too == said
    assert num_drafted < num_plain * 0.7
    # Tokens are the same, and so is all that is learned from them; the second step drafts for weights that moved.
    for one, other in zip(target.parameters(), target_too.parameters(), strict=True):
        assert torch.equal(one, other)
    before = load_target()[0]
    assert not all(map(torch.equal, target.parameters(), before.parameters()))


def test_an_evaluation_harness(loaded: tuple[PreTrainedModel, Any], draft: MSDDraftModel) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    target, processor = loaded
    texts = [row for row in evaluation_prompts(40) if not row["images"]][:6]
    questions = [f"USER: {row['messages'][0]['content'][0]['text']}\nASSISTANT:" for row in texts]
    rows = [{"question": question, "answer": row["answer"]} for question, row in zip(questions, texts, strict=True)]
    task = ConfigurableTask(
        config={
            "task": "tiny",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 48, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        }
    )
    harness = HFLM(pretrained=target, tokenizer=processor.tokenizer, batch_size=3)

    def run() -> tuple[list[Any], Any, int]:
        with Counted(target) as forwards:
            found = lm_eval.evaluate(harness, {"tiny": task}, log_samples=True, bootstrap_iters=0)
        answers = [sample["resps"] for sample in found["samples"]["tiny"]]
        return answers, found["results"]["tiny"]["exact_match,none"], forwards.count

    *plain, num_plain = run()
    attach(target, draft)
    *drafted, num_drafted = run()
    assert drafted == plain
    assert num_drafted < num_plain / 2
