"""Write rows of the tiny world to disk: `python -m training.tiny_world.world.write_dataset --output FOLDER`."""

import argparse
from pathlib import Path

from datasets import Dataset

from training.tiny_world.world.rows import FEATURES, evaluation_prompts, training_dataset


def held_out_dataset(num_per_group: int) -> Dataset:
    """Return the held-out prompts as a dataset, the groups taking turns."""
    prompts = evaluation_prompts(num_per_group)
    order = [prompt for start in range(num_per_group) for prompt in prompts[start::num_per_group]]
    return Dataset.from_list([{name: prompt[name] for name in FEATURES} for prompt in order], features=FEATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("/tmp/tiny_world/rows"))
    parser.add_argument("--num-rows", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=30)
    parser.add_argument("--held-out", action="store_true", help="write the 100 held-out prompts, not rows to train on")
    arguments = parser.parse_args()
    dataset = held_out_dataset(25) if arguments.held_out else training_dataset(arguments.num_rows, arguments.seed)
    dataset.save_to_disk(arguments.output)
    print(f"Wrote {len(dataset):,} rows to {arguments.output}.")


if __name__ == "__main__":
    main()
