"""
Where does an ensemble of views help? A target that knows more than its draft VLM (IbED, TABED: arXiv 2601.20357).

    python -m training.evidence.ensemble --work FOLDER

The tiny world's target learns a second style, pictures on ruled paper, and up to five pictures at once; its draft VLM
stays as it is and has seen neither. Five scenarios: what the draft knows, the other style, three to five pictures,
second turns, no picture. Every view alone (multimodal, text, pooled, caption) and their ensembles, as a chain of five
as published and as a tree, drafting in every round and gated. Told are τ by scenario, the mean and the worst.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from training.real_llava.build import learn
from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft_vlm import DRAFT_VLM_CHECKPOINT
from training.tiny_world.build.train_target import collate, encode_row
from training.tiny_world.measure.compare_drafters import Captioner
from training.tiny_world.measure.evaluate import acceptance_length, timed
from training.tiny_world.world.picture_talk import description, follow_up, join
from training.tiny_world.world.pictures import PICTURE_SIZE, Scene, random_scene
from training.tiny_world.world.rows import is_held_out, make_row, training_rows
from training.tiny_world.world.text_talk import text_turns
from transformers_msd import Caption, EnsembleDrafter, Pooled, TextOnly, TreeConfig


DOCS = Path(__file__).parents[2] / "docs"
SCENARIOS = ("known", "other style", "3 to 5 pictures", "second turn", "no picture")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
TREES = {"chain of 5": TreeConfig(6, 5, 1), "tree of 16": TreeConfig(16, 5, 3)}
TOKENS_OF_BATCH, NEW_SHARE = 1600, 0.7


def ruled(picture: Image.Image) -> Image.Image:
    """Draw a grid of lines over a picture."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for place in range(2, PICTURE_SIZE, 6):
        draw.rectangle((0, place, PICTURE_SIZE, place + 1), fill=(90, 110, 160))
        draw.rectangle((place, 0, place + 1, PICTURE_SIZE), fill=(160, 110, 90))
    return picture


def describe_all(scenes: list[Scene]) -> tuple[str, str]:
    """Return a request about several scenes, and the answer."""
    parts = [
        f"The {ORDINALS[place]} picture shows {join([f'a {shape.name}' for shape in scene.shapes])}."
        for place, scene in enumerate(scenes)
    ]
    return "Say what each picture shows.", " ".join(parts)


def make(scenario: str, random: Random, held_out: bool) -> dict:
    """Make a row of a scenario, its last turn answered."""
    while True:
        if scenario == "no picture":
            scenes, turns = [], text_turns(random)[:1]
        elif scenario == "3 to 5 pictures":
            scenes = [random_scene(random, max_shapes=3) for _ in range(random.randint(3, 5))]
            turns = [describe_all(scenes)]
        else:
            scenes = [random_scene(random)]
            turns = [description(random, scenes[0])]
            if scenario == "second turn":
                turns.append(follow_up(random, scenes[0]))
        if is_held_out(scenes, turns[0][0]) == held_out:
            break
    row = make_row(scenes, turns)
    return row | {"images": [ruled(image) for image in row["images"]]} if scenario == "other style" else row


def training_batches(processor: LlavaProcessor, num_batches: int) -> Iterator[dict]:
    """Yield batches of rows of similar length, old kinds and new ones."""
    random, old = Random(3), training_rows(10**9, seed=30)
    ready: list[list[dict]] = []
    for _ in range(num_batches):
        if not ready:
            pool = [
                encode_row(
                    processor,
                    make(random.choice(SCENARIOS[1:4]), random, False) if random.random() < NEW_SHARE else next(old),
                )
                for _ in range(256)
            ]
            ready = [[]]
            for row in sorted(pool, key=lambda row: len(row["labels"])):
                if ready[-1] and len(row["labels"]) * (len(ready[-1]) + 1) > TOKENS_OF_BATCH:
                    ready.append([])
                ready[-1].append(row)
            random.shuffle(ready)
        yield collate(ready.pop(), processor.tokenizer.pad_token_id)


def prompts_of(scenario: str, num_prompts: int) -> list[dict]:
    """Held-out prompts of a scenario, with the `answer` of the world."""
    random, prompts = Random(f"prompts {scenario}"), []
    for _ in range(num_prompts):
        row = make(scenario, random, True)
        prompts.append(row | {"messages": row["messages"][:-1], "answer": row["messages"][-1]["content"][0]["text"]})
    return prompts


def make_drafters(draft: LlavaForConditionalGeneration, processor: LlavaProcessor, tree: TreeConfig) -> dict[str, Any]:
    """Make every drafter of the table by its name there."""
    text, pooled, caption = TextOnly(), Pooled(3, 3), Caption(Captioner(draft, processor))
    views: dict[str, tuple[tuple, Any]] = {
        "M (multimodal)": (("multimodal",), (1.0,)),
        "T (text only)": ((text,), (1.0,)),
        "P (pooled)": ((pooled,), (1.0,)),
        "C (caption)": ((caption,), (1.0,)),
        "IbED, M T": (("multimodal", text), (0.5, 0.5)),
        "TABED, M T": (("multimodal", text), "grid"),
        "IbED, M T P C": (("multimodal", text, pooled, caption), (0.25,) * 4),
        "TABED, M T P C": (("multimodal", text, pooled, caption), "grid"),
    }
    return {name: EnsembleDrafter(draft, *own, tree_config=tree) for name, own in views.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ensemble"), help="where the target is kept")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--num_prompts", type=int, default=20, help="of each scenario")
    parser.add_argument("--output", type=Path, default=DOCS / "ensemble.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if (arguments.work / "config.json").exists():
        target, processor = load_target(arguments.work)
    else:
        target, processor = load_target()
        learn(target, training_batches(processor, arguments.steps), arguments.steps, 5e-4, "target")
        target.save_pretrained(arguments.work)
        processor.save_pretrained(arguments.work)
    draft = LlavaForConditionalGeneration.from_pretrained(DRAFT_VLM_CHECKPOINT, dtype=torch.float32).eval()
    asked = {scenario: prompts_of(scenario, arguments.num_prompts) for scenario in SCENARIOS}
    encoded = {name: [encode_prompts(processor, [prompt]) for prompt in prompts] for name, prompts in asked.items()}
    call = {"do_sample": False, "max_new_tokens": 120}
    plain = {name: [target.generate(**inputs, **call) for inputs in prompts] for name, prompts in encoded.items()}
    right = {
        name: sum(
            processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            == prompt["answer"]
            for ids, inputs, prompt in zip(plain[name], encoded[name], asked[name], strict=True)
        )
        for name in SCENARIOS
    }
    results: dict[str, Any] = {"prompts": arguments.num_prompts, "answered right by the target": right}
    print(results, flush=True)
    for shape, tree in TREES.items():
        for is_gated in (False, True):
            name = f"{shape}, {'gated' if is_gated else 'drafting in every round'}"
            own_tree = TreeConfig(tree.num_nodes, tree.depth, tree.top_k, gate=is_gated, ngrams=False)
            print(f"\n| {name} | {' | '.join(SCENARIOS)} | mean | worst |", flush=True)
            print("|---" * (len(SCENARIOS) + 3) + "|")
            results[name] = {}
            for drafter_name, drafter in make_drafters(draft, processor, own_tree).items():
                found = {}
                for scenario, prompts in encoded.items():
                    lengths = []
                    for inputs, ids in zip(prompts, plain[scenario], strict=True):
                        output, _ = timed(target, 0, **inputs, **call, assistant_model=drafter)
                        if not torch.equal(output.sequences, ids):
                            raise RuntimeError("An answer differs from plain decoding's.")
                        lengths.append(output.speculative_stats.acceptance_lengths[:, 0].tolist())
                    found[scenario] = acceptance_length(lengths)
                results[name][drafter_name] = found
                taus = list(found.values())
                cells = [f"{tau:.2f}" for tau in (*taus, sum(taus) / len(taus), min(taus))]
                print(f"| {drafter_name} | {' | '.join(cells)} |", flush=True)
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
