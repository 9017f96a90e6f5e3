"""How fast the draft will be, seen while it is trained."""

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import ModelOutput
from trl.data_utils import prepare_multimodal_messages

from transformers_msd.drafters.vlm import VLMDrafter
from transformers_msd.drafters.wrapped import Ungated
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer.loading import encode_prompts
from transformers_msd.trainer.metrics import AcceptanceLength
from transformers_msd.trainer.progress import Progress
from transformers_msd.traits.tokens import is_of_pictures


if TYPE_CHECKING:
    from transformers_msd.trainer.base import DraftTrainer


logger = logging.getLogger(__name__)


def prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return the messages of a row before the assistant's last turn, pictures in their places; of questions that follow
    one another unanswered, the first alone.
    """
    messages = row["messages"] if "messages" in row else row["prompt"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    asked = _first_question(messages)
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    if "images" not in row and "image" not in row:
        return messages[:asked]
    later = [part for message in messages[asked:] for part in message["content"] or ()]
    num_later = sum(isinstance(part, dict) and part["type"] == "image" for part in later)
    return prepare_multimodal_messages(messages[:asked], images=images[: len(images) - num_later])


def _first_question(messages: list[dict[str, Any]]) -> int:
    """Count the messages up to the first question that another follows before it is answered; all without one."""
    asked = None
    for place, message in enumerate(messages):
        if message["role"] == "user" and asked is not None:
            return asked
        asked = {"user": place + 1, "assistant": None}.get(message["role"], asked)
    return len(messages)


class AcceptanceLengthCallback(TrainerCallback):
    """
    Let the decoder answer a few held-out prompts at every evaluation, and log the acceptance length τ.

    Logged are `eval_acceptance_length`, and apart from each other `eval_acceptance_length_text` and
    `eval_acceptance_length_image`; at the end of training also the speed-up over plain `generate`, `eval_speedup` and
    so on. All processes take part, as sharded models need.

    Args:
        trainer ([`DraftTrainer`]):
            Trainer of the draft; add the callback with `trainer.add_callback`.
        prompts ([`~datasets.Dataset`]):
            Rows as the trainer has them; answers are left out.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Length of the answers.
        temperature (`float`, *optional*, defaults to 0.0):
            Temperature the answers are sampled at; 0 is greedy.
    """

    def __init__(
        self, trainer: "DraftTrainer", prompts: Dataset, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> None:
        if not len(prompts):
            raise ValueError("`prompts` must hold a row at least, got none. Hold some rows out.")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a whole number, 1 at least, got {max_new_tokens!r}.")
        if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be a number, 0 at least, got {temperature!r}. 0 is greedy.")
        self.trainer = trainer
        self.prompts = [prompt_of(row) for row in prompts]
        self.max_new_tokens = max_new_tokens
        self.sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = self.measure()
        if kwargs.get("metrics") is not None:
            kwargs["metrics"].update(metrics)
        self.trainer.log(metrics)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logger.info("Measuring the speed-up on %d held-out prompts, with the draft and without.", len(self.prompts))
        self.trainer.log(self.measure(compare=True))

    @torch.no_grad()
    def measure(self, compare: bool = False) -> dict[str, float]:
        """
        Answer the prompts.

        Args:
            compare (`bool`, *optional*, defaults to `False`):
                Whether to answer them without the draft, too, and tell the speed-up.
        """
        trainer = self.trainer
        draft = trainer.assistant()
        was_training = trainer.model.training
        trainer.model.eval()
        answers: list[_Answer] = []
        device = trainer.accelerator.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices=devices), trainer.compute_loss_context_manager():
            progress = Progress("held-out answer", len(self.prompts), is_shown=trainer.is_world_process_zero())
            for number, messages in enumerate(self.prompts):
                progress.update(number)
                inputs = encode_prompts(trainer.processing_class, [messages]).to(device)
                kind = "_image" if any(map(is_of_pictures, inputs)) else "_text"
                if compare and not answers:
                    self._timed(inputs, draft)  # warm up
                plain_seconds = self._timed(inputs, None)[1] if compare else 0.0
                output, seconds = self._timed(inputs, draft)
                lengths = output.speculative_stats.acceptance_lengths[:, 0]
                answers.append(_Answer(kind, lengths[lengths > 0].tolist(), plain_seconds, seconds))
            progress.close(is_whole=False)
        trainer.model.train(was_training)
        metric = AcceptanceLength(keep_in_memory=True)
        metrics = {}
        for kind in ("", "_text", "_image"):
            part = [answer for answer in answers if kind in ("", answer.kind)]
            if any(answer.lengths for answer in part):
                tau = metric.compute(predictions=[answer.lengths for answer in part])["acceptance_length"]
                metrics[f"eval_acceptance_length{kind}"] = tau
            if compare and part:
                plain_seconds = sum(answer.plain_seconds for answer in part)
                metrics[f"eval_speedup{kind}"] = plain_seconds / sum(answer.seconds for answer in part)
        return metrics

    def _timed(
        self, inputs: dict[str, torch.Tensor], draft: FeatureDraftModel | VLMDrafter | None
    ) -> tuple[ModelOutput, float]:
        """Generate; return the output and the seconds it took."""
        torch.manual_seed(self.trainer.args.seed)
        start = time.perf_counter()
        output = self.trainer.target.generate(
            **inputs,
            **self.sampling,
            max_new_tokens=self.max_new_tokens,
            assistant_model=None if draft is None else Ungated(draft),
            return_dict_in_generate=True,
            synced_gpus=False,  # all processes answer the same prompts, in step by themselves
        )
        output.sequences.tolist()  # waits for the device
        return output, time.perf_counter() - start


@dataclass(frozen=True)
class _Answer:
    kind: str
    lengths: list[int]
    plain_seconds: float
    seconds: float
