"""
Do two stages pay? MSD (arXiv 2505.14260) trains on text first, then on ever more rows with pictures.

    python -m training.glyph_world.train_target --output TARGET
    python -m training.evidence.two_stages --target TARGET

Every arm sees as many rows, in another order; the first three see as many pictures, too. The rate stays and falls only
at the end. τ, greedy, on held-out prompts of text and pictures. What is broken off goes on where it was last saved.
`--world tiny` does the same on the tiny world's shipped target.
"""

import argparse
from pathlib import Path
from random import Random
from shutil import rmtree

from datasets import Dataset
from transformers.utils import logging

from training.evidence.runs import BATCH_SIZE, ask, collect, measure, table, train_draft
from training.glyph_world import world as glyph_world
from training.tiny_world.build.target import CHECKPOINT, load_target
from training.tiny_world.measure.evaluate import PICTURES
from training.tiny_world.world.rows import FEATURES, evaluation_prompts, training_rows
from transformers_msd import TreeConfig
from transformers_msd.trainer.curriculum import visual_probability


DOCS = Path(__file__).parents[2] / "docs"
# The chance of a row with pictures after a fraction of the training.
ORDERS = {
    "text, then a ramp (MSD)": visual_probability,
    "mixed, as many pictures": lambda progress: 0.25,
    "pictures, then text": lambda progress: float(progress <= 0.25),
    "mixed, half pictures": lambda progress: 0.5,
    "text only": lambda progress: 0.0,
    "pictures only": lambda progress: 1.0,
}
BUDGETS = ("150", "600", "1800")
SEEDS = ("0", "1", "2")
TREE = TreeConfig(24, 6, 4, gate=False, ngrams=False)
NUM_PROMPTS = 20  # of a kind
SAVING = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1}


def tiny_dataset(shares_of_pictures: list[float], seed: int) -> Dataset:
    """Make a row of the tiny world for every share, with pictures by that chance."""
    random, text, pictures = Random(seed), [], []
    made = []
    endless = training_rows(10**9, seed)
    for share in shares_of_pictures:
        wanted = pictures if random.random() < share else text
        while not wanted:
            row = next(endless)
            (pictures if row["images"] else text).append(row)
        made.append(wanted.pop(0))
    return Dataset.from_list(made, features=FEATURES)


def tiny_prompts(num_prompts: int = NUM_PROMPTS) -> dict[str, list[dict]]:
    """Held-out prompts of the tiny world, of text and of one picture."""
    asked = evaluation_prompts(num_prompts)
    groups = {"text": "text", "pictures": "image"}
    return {kind: [prompt for prompt in asked if prompt["group"] == group] for kind, group in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--world", choices=("glyphs", "tiny"), default="glyphs")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/two_stages"))
    parser.add_argument("--output", type=Path, help="docs/two_stages_WORLD.json by default")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    target, processor = load_target(arguments.target)
    is_tiny = arguments.world == "tiny"
    make_rows = tiny_dataset if is_tiny else glyph_world.ordered_dataset
    asked = ask(target, processor, tiny_prompts() if is_tiny else glyph_world.prompts_by_kind(NUM_PROMPTS))

    def run(order: str, budget: str, seed: str) -> dict[str, float]:
        num_rows = int(budget) * BATCH_SIZE
        rows = make_rows([ORDERS[order](number / num_rows) for number in range(1, num_rows + 1)], seed=100 + int(seed))
        work = arguments.work / f"{budget}_{seed}_{[*ORDERS].index(order)}"
        draft = train_draft(target, processor, rows, int(seed), work, training=SAVING)
        figures = measure(target, draft, TREE, asked, PICTURES[:1])
        rmtree(work)
        return figures

    runs = [(order, budget, seed) for seed in arguments.seeds for budget in arguments.budgets for order in ORDERS]
    output = arguments.output or DOCS / f"two_stages_{arguments.world}.json"
    print(table(collect(output, runs, run), "order of training, steps"))


if __name__ == "__main__":
    main()
