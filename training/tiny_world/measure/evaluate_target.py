"""Measure whether the target reads the picture: `python -m training.tiny_world.measure.evaluate_target`."""

import argparse
import json
import sys
from pathlib import Path

from training.tiny_world.build.accuracy import evaluate
from training.tiny_world.build.target import CHECKPOINT, load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--num-questions", type=int, default=400)
    arguments = parser.parse_args()
    try:
        figures = evaluate(*load_target(arguments.target), arguments.num_questions)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
