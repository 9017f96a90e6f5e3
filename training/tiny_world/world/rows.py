"""Conversations about the tiny world, in TRL's conversational format, all of them made from seeds.

A tenth of all conversations, told by a hash of what they are about, is held out: training rows never come from it,
evaluation rows always do.
"""

from collections.abc import Callable, Iterator
from random import Random
from zlib import crc32

from datasets import Dataset, Features, Image, List, Value

from training.tiny_world.world.picture_talk import (
    ATTRIBUTE_KINDS,
    attribute_question,
    cell_by_cell,
    comparison,
    description,
    follow_up,
    listed_questions,
    random_attribute_question,
)
from training.tiny_world.world.pictures import Scene, draw_scene, random_scene
from training.tiny_world.world.text_talk import repetitions, text_turns


GROUPS = ("text", "image", "images", "second turn")
FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
    }
)
_PROMPT_SEED = 1_000_003
_QUESTION_SEED = 2_000_003


def is_held_out(scenes: list[Scene], first_request: str) -> bool:
    """Tell whether a conversation about these scenes, or with this first request if there are none, is held out."""
    subject = repr([(scene.background, [shape.name + shape.place for shape in scene.shapes]) for scene in scenes])
    return crc32((subject if scenes else first_request).encode()) % 10 == 0


def make_row(scenes: list[Scene], turns: list[tuple[str, str]]) -> dict:
    """Write turns about scenes as a row of `messages` and `images`; an answer of "" leaves the turn open."""
    messages = []
    for i, (request, answer) in enumerate(turns):
        pictures = [{"type": "image", "text": None} for _ in scenes] if i == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": request}]})
        if answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, "images": [draw_scene(scene) for scene in scenes]}


def _text(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    return [], text_turns(random)[: random.choice([1, 1, 2])]


def _image(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    scene = random_scene(random)
    return [scene], [description(random, scene)]


def _images(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    scenes = [random_scene(random, max_shapes=3), random_scene(random, max_shapes=3)]
    return scenes, [comparison(random, *scenes)]


def _second_turn(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    if random.random() < 0.3:
        return [], text_turns(random)
    scene = random_scene(random)
    first = description(random, scene) if random.random() < 0.5 else random_attribute_question(random, scene)
    return [scene], [first, follow_up(random, scene)]


def _attributes(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    scene = random_scene(random)
    turns = dict(random_attribute_question(random, scene) for _ in range(random.randint(3, 6)))
    return [scene], list(turns.items())


def _cells(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    scene = random_scene(random, 3, 7)
    return [scene], [cell_by_cell(scene)]


def _copies(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    return [], repetitions(random)


def _look_ups(random: Random) -> tuple[list[Scene], list[tuple[str, str]]]:
    return [], listed_questions(random, random_scene(random))


Maker = Callable[[Random], tuple[list[Scene], list[tuple[str, str]]]]
_MAKERS = {"text": _text, "image": _image, "images": _images, "second turn": _second_turn}
_TRAINING_MIXTURE = ((_text, 0.2), (_image, 0.2), (_images, 0.15), (_second_turn, 0.15), (_attributes, 0.3))


def _draw(make: Maker, random: Random, held_out: bool) -> tuple[list[Scene], list[tuple[str, str]]]:
    while True:
        scenes, turns = make(random)
        if is_held_out(scenes, turns[0][0]) == held_out:
            return scenes, turns


def training_rows(
    num_rows: int,
    seed: int = 0,
    cells: float = 0.0,
    copies: float = 0.0,
    questions: float = 0.0,
    look_ups: float = 0.0,
) -> Iterator[dict]:
    """Yield training rows, `messages` and `images`.

    Args:
        cells: Share of rows that go through a picture place by place, an exercise.
        copies: Share of rows that repeat a row of words, another one.
        questions: Share of rows of attribute questions, besides those in the mixture.
        look_ups: Share of rows of questions about shapes listed in words, a third exercise.
    """
    random = Random(seed)
    makers, weights = zip(*_TRAINING_MIXTURE, strict=True)
    exercises = ((_cells, cells), (_copies, copies), (_attributes, questions), (_look_ups, look_ups))
    makers = (*makers, *(make for make, _ in exercises))
    rest = 1.0 - sum(share for _, share in exercises)
    weights = (*(rest * weight for weight in weights), *(share for _, share in exercises))
    for _ in range(num_rows):
        yield make_row(*_draw(random.choices(makers, weights)[0], random, held_out=False))


def training_dataset(num_rows: int, seed: int = 0) -> Dataset:
    """Return the rows of `training_rows` as a dataset."""
    return Dataset.from_list(list(training_rows(num_rows, seed)), features=FEATURES)


def evaluation_prompts(num_per_group: int = 25) -> list[dict]:
    """Return held-out prompts with the keys `group`, `messages` (last one from the user), `images` and `answer`."""
    prompts = []
    for i, group in enumerate(GROUPS):
        random, seen = Random(_PROMPT_SEED + i), set()
        while len(seen) < num_per_group:
            scenes, turns = _draw(_MAKERS[group], random, held_out=True)
            turns = turns if group == "second turn" else turns[:1]
            request, answer = turns[-1]
            key = repr((scenes, turns))
            if key not in seen:
                seen.add(key)
                row = make_row(scenes, [*turns[:-1], (request, "")])
                prompts.append({"group": group, **row, "answer": answer})
    return prompts


def attribute_questions(num_questions: int = 400) -> list[dict]:
    """Return held-out questions of all kinds: `kind`, `messages`, `images`, `answer`, and the `value` it ends with."""
    random, questions = Random(_QUESTION_SEED), []
    while len(questions) < num_questions:
        kind = ATTRIBUTE_KINDS[len(questions) % len(ATTRIBUTE_KINDS)]
        scene = random_scene(random)
        question = attribute_question(random, scene, kind)
        if question is not None and is_held_out([scene], ""):
            row = make_row([scene], [(question.request, "")])
            questions.append({"kind": kind, **row, "answer": question.answer, "value": question.value})
    return questions


def balanced_rows(num_rows: int = 1500, seed: int = 40) -> Dataset:
    """Make `num_rows` rows of text, and behind them as many with pictures."""
    kinds: dict[bool, list[dict]] = {False: [], True: []}
    for row in training_rows(10**9, seed):
        kinds[bool(row["images"])].append(row)
        if all(len(rows) >= num_rows for rows in kinds.values()):
            break
    return Dataset.from_list([row for rows in kinds.values() for row in rows[:num_rows]], features=FEATURES)
