"""What trainings of drafts for a claim share: rows in an order, one training, τ by kind, a table that resumes."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from training.tiny_world.build.target import encode_prompts
from training.tiny_world.build.train_draft import COMMON_SETTINGS
from training.tiny_world.measure.evaluate import PICTURES, Blinkered, acceptance_length, timed
from transformers_msd import MSDDraftModel, TreeConfig
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.trainer import MSDTrainer, MSDTrainingConfig


BATCH_SIZE = 16
# A rate that stays and falls only at the end: how long a training is does not change what it has learned before.
SETTINGS = COMMON_SETTINGS | {
    "stage": "multimodal",
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 20,
    "feature_noise": 0.0,
    "num_unroll_steps": 4,
    "save_strategy": "no",
    "logging_steps": 100,
    "use_cpu": not torch.cuda.is_available(),
}
DECAYING = 0.2  # of all steps


def train_draft(
    target: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Dataset,
    seed: int,
    work: Path,
    draft: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    draft_class: type[FeatureDraftModel] = MSDDraftModel,
) -> FeatureDraftModel:
    """
    Train a draft on rows as they come, each seen once, on a GPU where there is one; return it on the CPU.

    Args:
        target ([`~transformers.LlavaForConditionalGeneration`]):
            Its target.
        processor ([`~transformers.LlavaProcessor`]):
            The target's processor.
        rows ([`~datasets.Dataset`]):
            Rows in the order of training.
        seed (`int`):
            Seed of the starting weights.
        work (`Path`):
            Folder of the trainer, which goes on from the newest checkpoint in it where `training` saves some.
        draft, training (`dict[str, Any]`, *optional*):
            Overrides of the draft's config and of `SETTINGS`.
        draft_class (`type[FeatureDraftModel]`, *optional*, defaults to `MSDDraftModel`):
            Kind of the draft.
    """
    num_steps = len(rows) // BATCH_SIZE
    torch.manual_seed(seed)
    model = draft_class(draft_class.config_class.from_target(target.config, **(draft or {})))
    settings = SETTINGS | {
        "max_steps": num_steps,
        "lr_scheduler_kwargs": {"num_decay_steps": int(DECAYING * num_steps)},
        "seed": seed,
    }
    args = MSDTrainingConfig(output_dir=str(work), **settings | (training or {}))
    trainer = MSDTrainer(model=model, target=target, args=args, train_dataset=rows, processing_class=processor)
    trainer.train(resume_from_checkpoint=True)
    target.cpu()
    return model.cpu().eval()


@dataclass(frozen=True)
class Asked:
    """A prompt as the target reads it, and what plain `generate` says."""

    inputs: BatchFeature
    answer: torch.Tensor

    @property
    def has_picture(self) -> bool:
        return "pixel_values" in self.inputs


CALL = {"do_sample": False, "max_new_tokens": 100}


def ask(
    target: LlavaForConditionalGeneration, processor: LlavaProcessor, prompts: dict[str, list[dict]]
) -> dict[str, list[Asked]]:
    """Let plain `generate` answer prompts, greedily."""
    asked: dict[str, list[Asked]] = {}
    for kind, rows in prompts.items():
        encoded = [encode_prompts(processor, [row]) for row in rows]
        asked[kind] = [Asked(inputs, target.generate(**inputs, **CALL)) for inputs in encoded]
    return asked


def measure(
    target: LlavaForConditionalGeneration,
    draft: FeatureDraftModel,
    tree: TreeConfig,
    asked: dict[str, list[Asked]],
    pictures: Sequence[str] = PICTURES,
) -> dict[str, float]:
    """
    Answer prompts with a draft; return τ by kind, for each of the `pictures` that the draft alone is shown.

    Raises:
        RuntimeError: If an answer differs from plain decoding's.
    """
    draft.tree_config, found = tree, {}
    for kind, prompts in asked.items():
        for picture in pictures if prompts[0].has_picture else pictures[:1]:
            assistant, lengths = Blinkered(draft, picture), []
            for prompt in prompts:
                output, _ = timed(target, 0, **prompt.inputs, **CALL, assistant_model=assistant)
                if not torch.equal(output.sequences, prompt.answer):
                    raise RuntimeError("An answer differs from plain decoding's.")
                lengths.append(output.speculative_stats.acceptance_lengths[:, 0].tolist())
            name = kind if picture == PICTURES[0] else f"{kind}, {picture} shown"
            found[name] = acceptance_length(lengths)
    return found


def collect(path: Path, runs: Iterable[tuple[str, ...]], run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Do the runs that a file of results lacks, and save each when it is done."""
    results = json.loads(path.read_text()) if path.exists() else {}
    for names in runs:
        key = " | ".join(names)
        if key not in results:
            results[key] = run(*names)
            print(key, {name: value for name, value in results[key].items() if isinstance(value, float)}, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, dict[str, float]], first: str) -> str:
    """Write means and standard deviations over seeds, the last part of each name, as Markdown."""
    groups: dict[str, list[dict[str, float]]] = {}
    for key, found in results.items():
        groups.setdefault(key.rpartition(" | ")[0], []).append(found)
    columns = list(dict.fromkeys(name for found in results.values() for name in found))
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, found in groups.items():
        cells = []
        for column in columns:
            values = [figures[column] for figures in found if column in figures]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {name.replace(' | ', ', ')} | {' | '.join(cells)} |")
    return "\n".join(lines)
