"""
Must a draft see, and which design sees best? Drafts of several designs in the glyph world.

    python -m training.glyph_world.train_target --output TARGET
    python -m training.evidence.looking --target TARGET

Every design is trained from three seeds on the same rows. τ is measured, greedy, in trees of 6 and of 10 levels, on
held-out prompts of text and of pictures, on these also with the draft alone shown another picture, and none. A run
that is broken off goes on where it stopped.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from training.evidence.runs import BATCH_SIZE, collect, measure, table, train_draft
from training.glyph_world.world import ordered_dataset, prompts
from training.tiny_world.build.target import load_target
from transformers_msd import TreeConfig


DOCS = Path(__file__).parents[2] / "docs"
DESIGNS = {
    "decoupled (MSD)": {},
    "fused (EAGLE)": {"decoupled": False},
    "visual rows averaged by 4": {"visual_pool_size": 4},
    "visual rows left out (HiViS)": {"visual_pool_size": 0},
}
TREES = {"6 levels": TreeConfig(24, 6, 4, gate=False), "10 levels": TreeConfig(40, 10, 4, gate=False)}
SEEDS = ("0", "1", "2")
NUM_PROMPTS = 20  # of a kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/glyph_world"))
    parser.add_argument("--output", type=Path, default=DOCS / "looking.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    target, processor = load_target(arguments.target)
    rows = ordered_dataset([0.5] * (arguments.steps * BATCH_SIZE), seed=11)
    asked = {kind: prompts(kind, NUM_PROMPTS) for kind in ("picture", "copy", "order")}

    def run(design: str, seed: str) -> dict[str, float]:
        draft = train_draft(target, processor, rows, int(seed), arguments.work, DESIGNS[design])
        return {
            f"{kind}, {levels}": tau
            for levels, tree in TREES.items()
            for kind, tau in measure(target, processor, draft, tree, asked).items()
        }

    runs = [(design, seed) for seed in arguments.seeds for design in DESIGNS]
    print(table(collect(arguments.output, runs, run), "draft"))


if __name__ == "__main__":
    main()
