"""
Must a draft see, and which design sees best? Drafts of several designs in the glyph world.

    python -m training.glyph_world.train_target --output TARGET
    python -m training.evidence.looking --target TARGET

Every design is trained from three seeds on the same rows, for two budgets. τ is measured, greedy, in trees of 6 and
of 10 levels, on held-out prompts of text and of pictures, on these also with the draft alone shown another picture and
none. A run that is broken off goes on where it stopped. `--world tiny` does the same in the tiny world, whose target
is shipped.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from training.evidence.runs import BATCH_SIZE, ask, collect, measure, table, train_draft
from training.evidence.two_stages import tiny_dataset, tiny_prompts
from training.glyph_world.world import ordered_dataset, prompts_by_kind
from training.tiny_world.build.target import CHECKPOINT, load_target
from training.tiny_world.measure.evaluate import PICTURES
from transformers_msd import AutoDraftModel, BlockDraftModel, Eagle3DraftModel, MSDDraftModel, TreeConfig
from transformers_msd.models.base import FeatureDraftModel


DOCS = Path(__file__).parents[2] / "docs"
# Those that read several layers of the target learn from its tokens alone.
ON_TOKENS = {"feature_loss_weight": 0.0, "unroll_decay": 0.8}
IN_ONE_FORWARD = ON_TOKENS | {"num_unroll_steps": 1}
BLOCK = {"block_size": 10, "reads_feature": False}
# The draft's class, its config and its training.
Design = tuple[type[FeatureDraftModel], dict[str, Any], dict[str, Any]]
DESIGNS: dict[str, Design] = {
    "decoupled (MSD)": (MSDDraftModel, {}, {}),
    "fused (EAGLE)": (MSDDraftModel, {"decoupled": False}, {}),
    "visual rows averaged by 4": (MSDDraftModel, {"visual_pool_size": 4}, {}),
    "visual rows left out (HiViS)": (MSDDraftModel, {"visual_pool_size": 0}, {}),
    "three layers, placeholders (EAGLE-3)": (Eagle3DraftModel, {}, ON_TOKENS),
    "three layers, decoupled": (Eagle3DraftModel, {"decoupled": True}, ON_TOKENS),
    **{
        f"a block{name}": (BlockDraftModel, BLOCK | config, IN_ONE_FORWARD)
        for name, config in {
            "": {},
            ", 2 layers": {"num_hidden_layers": 2},
            ", 4 layers": {"num_hidden_layers": 4},
            ", edges": {"edge_rank": 32},
            ", 2 layers, edges": {"num_hidden_layers": 2, "edge_rank": 32},
            ", both ways": {"causal": False},
            ", rows that read the feature": {"reads_feature": True},
            ", 2 layers, edges, rows that read the feature": {
                "num_hidden_layers": 2,
                "edge_rank": 32,
                "reads_feature": True,
            },
            ", 2 layers, as DFlash 2": {
                "num_hidden_layers": 2,
                "edge_rank": 32,
                "edge_type": "bilinear",
                "conv_kernel_size": 2,
            },
            ", decoupled": {"visual_rows": "decoupled"},
            ", visual rows left out": {"visual_rows": "dropped"},
        }.items()
    },
}
SHALLOW, DEEP = TreeConfig(24, 6, 4, gate=False, ngrams=False), TreeConfig(40, 10, 4, gate=False, ngrams=False)
BUDGETS = ("600", "1800")
SEEDS = ("0", "1", "2")
NUM_PROMPTS = 20  # of a kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="of the glyph world")
    parser.add_argument("--world", choices=("glyphs", "tiny"), default="glyphs")
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--steps", nargs="+", default=BUDGETS, help="of 16 rows, half of them with pictures")
    parser.add_argument("--seeds", nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, help="where drafts are kept")
    parser.add_argument("--output", type=Path, help="docs/looking.json or docs/looking_tiny.json by default")
    arguments = parser.parse_args()
    is_tiny = arguments.world == "tiny"
    if (arguments.target is None) != is_tiny:
        parser.error("`--target` is that of the glyph world, which is trained first, and of no other")
    work = arguments.work or Path(f"/tmp/looking_{arguments.world}")
    logging.disable_progress_bar()
    target, processor = load_target(arguments.target or CHECKPOINT)
    make_rows = tiny_dataset if is_tiny else ordered_dataset
    asked = ask(target, processor, tiny_prompts() if is_tiny else prompts_by_kind(NUM_PROMPTS))

    def run(design: str, steps: str, seed: str) -> dict[str, float]:
        folder = work / f"{design} {steps} {seed}".replace(" ", "-")
        if (folder / "config.json").exists():
            draft = AutoDraftModel.from_pretrained(folder, dtype=torch.float32)
        else:
            rows = make_rows([0.5] * (int(steps) * BATCH_SIZE), seed=11)
            draft_class, config, training = DESIGNS[design]
            draft = train_draft(target, processor, rows, int(seed), work, config, training, draft_class)
            draft.save_pretrained(folder)
        found = measure(target, draft, SHALLOW, asked)
        deep = measure(target, draft, DEEP, asked, PICTURES[:1])
        return found | {f"{kind}, {DEEP.depth} levels": tau for kind, tau in deep.items()}

    runs = [
        (design, steps, seed) for steps in arguments.steps for seed in arguments.seeds for design in arguments.designs
    ]
    output = arguments.output or DOCS / ("looking_tiny.json" if is_tiny else "looking.json")
    print(table(collect(output, runs, run), "draft, steps"))


if __name__ == "__main__":
    main()
