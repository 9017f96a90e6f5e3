"""
What of the method pays in the tiny world: `python -m training.tiny_world.measure.ablation`.

Every arm changes one thing about the first and sees as many rows; each is trained from three seeds. Measured is the
acceptance length, greedy, on held-out prompts of text, on such with pictures, and on these with the draft shown
another picture and none. `--part I N` trains every N-th run from the I-th only: N processes share the work, and the
command without it makes the table.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import load_from_disk
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import COMMON_SETTINGS, TREE
from training.tiny_world.measure.evaluate import Blinkered, timed
from training.tiny_world.world.rows import balanced_rows, evaluation_prompts
from transformers_msd import MSDConfig, MSDDraftModel
from transformers_msd.trainer import AcceptanceLength, MSDTrainer, MSDTrainingConfig
from transformers_msd.trainer.generation import GenerationSettings, generate_data


SEEDS = (0, 1, 2)
NUM_ROWS = 1500  # of text, and with pictures
NUM_PROMPTS = 20  # of text, and with one picture
BATCH_SIZE = 12


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        rows (`str`, *optional*, defaults to `"all"`):
            `"all"`, or `"pictures"` for rows with pictures alone.
        generated (`bool`, *optional*, defaults to `False`):
            Whether the answers are the target's own.
        draft (`dict[str, Any]`, *optional*):
            Overrides of the draft's config.
        training (`dict[str, Any]`, *optional*):
            Overrides of the training settings.
    """

    rows: str = "all"
    generated: bool = False
    draft: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "MSD: decoupled, text then images, 3 unrolled steps": Arm(),
    "visual tokens fused like text (EAGLE)": Arm(draft={"decoupled": False}),
    "images only": Arm(rows="pictures", training={"stage": "multimodal"}),
    "text only": Arm(training={"stage": "text"}),
    "mixed from the start": Arm(training={"stage": "multimodal"}),
    "1 unrolled step": Arm(training={"num_unroll_steps": 1}),
    "the target's own answers": Arm(generated=True),
}


def prepare(work: Path, target: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Write the rows, and the same with the target's answers, unless they are there."""
    if not (work / "rows").exists():
        balanced_rows(NUM_ROWS).save_to_disk(work / "rows")
    if not (work / "generated").exists():
        settings = GenerationSettings(batch_size=64, max_new_tokens=160, rows_per_chunk=512)
        generate_data(target, processor, load_from_disk(work / "rows"), work / "generated", settings)


def measure(
    target: LlavaForConditionalGeneration, processor: LlavaProcessor, draft: MSDDraftModel
) -> dict[str, float]:
    """Return acceptance lengths by what was asked and what the draft saw."""
    prompts = [prompt for prompt in evaluation_prompts() if prompt["group"] in ("text", "image")]
    metric, results = AcceptanceLength(keep_in_memory=True), {}
    for name, group, picture in (
        ("text", "text", "its own"),
        ("image", "image", "its own"),
        ("another picture", "image", "another"),
        ("no picture", "image", "none"),
    ):
        assistant, lengths = Blinkered(draft, picture), []
        for prompt in [prompt for prompt in prompts if prompt["group"] == group][:NUM_PROMPTS]:
            inputs = encode_prompts(processor, [prompt])
            output, _ = timed(target, 0, **inputs, do_sample=False, max_new_tokens=100, assistant_model=assistant)
            lengths.append(output.speculative_stats.acceptance_lengths[:, 0].tolist())
        results[name] = metric.compute(predictions=lengths)["acceptance_length"]
    return results


def run(
    arm: Arm, seed: int, num_steps: int, work: Path, target: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> dict[str, float]:
    """Train one arm from one seed, and measure."""
    rows = load_from_disk(work / ("generated" if arm.generated else "rows"))
    if arm.rows == "pictures":
        rows = rows.select(range(NUM_ROWS, len(rows)))
    settings = {
        "stage": "ramp",
        "num_unroll_steps": 3,
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "feature_noise": 0.0,
        "save_strategy": "no",
        "logging_steps": 20,
        "seed": seed,
    }
    torch.manual_seed(seed)
    draft = MSDDraftModel(MSDConfig.from_target(target.config, tree_config=TREE, **arm.draft))
    args = MSDTrainingConfig(output_dir=str(work / "run"), **COMMON_SETTINGS | settings | arm.training)
    MSDTrainer(model=draft, target=target, args=args, train_dataset=rows, processing_class=processor).train()
    return measure(target, processor, draft.eval())


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write means and spreads over the seeds as Markdown."""
    columns = ("text", "image", "another picture", "no picture")
    lines = ["| trained | text | image | shown another picture | shown none |", "|---|---|---|---|---|"]
    for name, by_seed in results.items():
        cells = []
        for column in columns:
            values = [result[column] for result in by_seed.values()]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_world/ablation"), help="data and results")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--output", type=Path, help="where results are saved as JSON")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    arguments.work.mkdir(parents=True, exist_ok=True)
    target, processor = load_target()
    prepare(arguments.work, target, processor)
    runs = [(name, seed) for seed in SEEDS for name in ARMS]
    first, num_parts = arguments.part
    for number, (name, seed) in list(enumerate(runs))[first::num_parts]:
        path = arguments.work / f"result-{number:02}.json"
        if not path.exists():
            result = run(ARMS[name], seed, arguments.steps, arguments.work, target, processor)
            path.write_text(json.dumps(result))
            print(name, seed, result, flush=True)
    paths = [arguments.work / f"result-{number:02}.json" for number in range(len(runs))]
    if not all(path.exists() for path in paths):
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for (name, seed), path in zip(runs, paths, strict=True):
        results.setdefault(name, {})[str(seed)] = json.loads(path.read_text())
    print(table(results))
    if arguments.output:
        settings = {"steps": arguments.steps, "batch_size": BATCH_SIZE, "torch": torch.__version__}
        arms = {name: asdict(arm) for name, arm in ARMS.items()}
        arguments.output.write_text(json.dumps({"settings": settings, "arms": arms, "tau": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
