"""Write training rows of the tiny world to disk: `python -m training.tiny_world.write_dataset --output FOLDER`."""

import argparse
from pathlib import Path

from training.tiny_world.world import training_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("/tmp/tiny_world/rows"))
    parser.add_argument("--num-rows", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=30)
    arguments = parser.parse_args()
    training_dataset(arguments.num_rows, arguments.seed).save_to_disk(arguments.output)
    print(f"Wrote {arguments.num_rows:,} rows to {arguments.output}.")


if __name__ == "__main__":
    main()
