"""Questions about scenes with their answers: attributes, descriptions, comparisons, follow-ups."""

from dataclasses import dataclass
from random import Random

from training.tiny_world.world.pictures import COLOURS, PLACES, SHAPES, Scene, Shape


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("on the left", "in the middle", "on the right")
ATTRIBUTE_KINDS = (
    "colour at place",
    "shape at place",
    "size at place",
    "colour of shape",
    "shape of colour",
    "place",
    "count",
    "count of colour",
    "background",
    "further left",
)
# Those that search the picture for a shape, in the list of all.
SEARCHES = ("colour of shape", "place", "count of colour", "further left")
# How often each is asked: searching is the last to be learned.
_KIND_WEIGHTS = (1, 1, 1, 2, 1, 2, 1, 2, 1, 2)


def join(parts: list[str]) -> str:
    """Join phrases with commas and a last "and"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _count(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun}" if number == 1 else f"{NUMBERS[number]} {noun}s"


def _there_are(number: int, noun: str) -> str:
    return f"There {'is' if number == 1 else 'are'} {_count(number, noun)}."


def _a(shape: Shape) -> str:
    return f"a {shape.name}"


def _a_at(shape: Shape) -> str:
    return f"a {shape.name} in the {shape.place}"


def _seen(scene: Scene) -> str:
    """List all shapes: what must be searched for is looked up in this list rather than in the picture."""
    return f"I see {join([_a_at(shape) for shape in scene.shapes])}."


def _unique(scene: Scene, attribute: str) -> list[Shape]:
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [shape for shape, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1]


@dataclass(frozen=True)
class Question:
    """A question about a scene; a right answer ends with `value`."""

    request: str
    answer: str
    value: str


def attribute_question(random: Random, scene: Scene, kind: str) -> Question | None:
    """Return a question of this kind, or None where the scene allows none."""
    shape = random.choice(scene.shapes)
    name, place = f"{shape.colour} {shape.shape}", f"shape in the {shape.place}"
    if kind == "colour at place":
        return Question(f"What colour is the {place}?", f"The {place} is {shape.colour}.", shape.colour)
    if kind == "shape at place":
        return Question(f"What is the {place}?", f"The {place} is a {shape.shape}.", shape.shape)
    if kind == "size at place":
        return Question(f"How big is the {place}?", f"The {place} is {shape.size}.", shape.size)
    if kind == "place":
        answer = f"{_seen(scene)} The {name} is in the {shape.place}."
        return Question(f"Where is the {name}?", answer, shape.place)
    if kind == "count":
        answer = _there_are(len(scene.shapes), "shape")
        return Question("How many shapes are there?", answer, answer[:-1])
    if kind == "background":
        return Question("What colour is the background?", f"The background is {scene.background}.", scene.background)
    if kind == "count of colour":
        return _count_of_colour(random, scene)
    if kind == "further left":
        return _further_left(scene, random.choice(scene.shapes), shape)
    attribute = "shape" if kind == "colour of shape" else "colour"
    unique = _unique(scene, attribute)
    if not unique:
        return None
    shape = random.choice(unique)
    if kind == "colour of shape":
        answer = f"{_seen(scene)} The {shape.shape} is {shape.colour}."
        return Question(f"What colour is the {shape.shape}?", answer, shape.colour)
    return Question(f"What is the {shape.colour} thing?", f"The {shape.colour} thing is a {shape.shape}.", shape.shape)


def _count_of_colour(random: Random, scene: Scene) -> Question:
    colour = random.choice([*(shape.colour for shape in scene.shapes), random.choice(list(COLOURS))])
    found = [f"a {s.colour} {s.shape} in the {s.place}" for s in scene.shapes if s.colour == colour]
    request = f"How many {colour} shapes are there?"
    if not found:
        return Question(request, f"{_seen(scene)} There is no {colour} shape.", f"no {colour} shape")
    value = f"{NUMBERS[len(found)]} in all"
    return Question(request, f"{_seen(scene)} There is {join(found)}: {value}.", value)


def _further_left(scene: Scene, first: Shape, second: Shape) -> Question | None:
    if first.column == second.column:
        return None
    names = [f"the {shape.colour} {shape.shape}" for shape in (first, second)]
    left = names[0] if first.column < second.column else names[1]
    places = f"{names[0]} is in the {first.place} and {names[1]} in the {second.place}".capitalize()
    value = f"{left} is further left"
    return Question(
        f"Which is further left, {names[0]} or {names[1]}?", f"{_seen(scene)} {places}, so {value}.", value
    )


def random_attribute_question(random: Random, scene: Scene) -> tuple[str, str]:
    """Return a question of a random kind that the scene allows, and its answer."""
    while True:
        question = attribute_question(random, scene, random.choices(ATTRIBUTE_KINDS, _KIND_WEIGHTS)[0])
        if question is not None:
            return question.request, question.answer


def listed_questions(random: Random, scene: Scene) -> list[tuple[str, str]]:
    """Return questions that search a scene, its shapes listed in the first, and their answers without that list."""
    turns = {}
    for kind in random.choices(SEARCHES, k=8):
        question = attribute_question(random, scene, kind)
        if question is not None:
            turns[question.request] = question.answer.removeprefix(_seen(scene)).lstrip()
    (request, answer), *others = turns.items()
    return [(f"{_seen(scene)} {request}", answer), *others]


def _sentences(scene: Scene, random: Random) -> str:
    verb = random.choice(["there is", "I can see"])
    opening = f"The picture shows {_count(len(scene.shapes), 'shape')} on a {scene.background} background."
    return " ".join([opening, *(f"In the {shape.place} {verb} {_a(shape)}." for shape in scene.shapes)])


def _list(scene: Scene, random: Random) -> str:
    opening = random.choice(["Here is everything in the picture:", "This is what the picture holds:"])
    return "\n".join([opening, *(f"{i}. {_a_at(shape)}" for i, shape in enumerate(scene.shapes, 1))])


def _rows(scene: Scene, random: Random) -> str:
    sentences = []
    for i, row in enumerate(ROWS):
        shapes = [f"{_a(shape)} {COLUMNS[shape.column]}" for shape in scene.shapes if shape.row == i]
        sentences.append(f"The {row} row holds {join(shapes)}." if shapes else f"The {row} row is empty.")
    return " ".join([*sentences, f"The background is {scene.background}."])


def _story(scene: Scene, random: Random) -> str:
    first, *others = scene.shapes
    moment = random.choice(["One day", "Every evening", "Long ago"])
    sentences = [f"Once upon a time {_a(first)} lived in the {first.place} of a {scene.background} land."]
    sentences += [f"It was a friend of the {shape.name} in the {shape.place}." for shape in others]
    ending = f"{moment} they all met in the middle, told each other stories and were very happy."
    return " ".join([*sentences, ending])


def _colours(scene: Scene, random: Random) -> str:
    colours = list(dict.fromkeys(shape.colour for shape in scene.shapes))
    opening = f"The shapes come in {_count(len(colours), 'colour')}: {join(colours)}."
    groups = [
        f"The {colour} part is "
        + join([f"a {s.size} {s.shape} in the {s.place}" for s in scene.shapes if s.colour == colour])
        for colour in colours
    ]
    return f"{opening} {'. '.join(groups)}."


def cell_by_cell(scene: Scene) -> tuple[str, str]:
    """Return the request to go through all nine cells, and the answer."""
    shapes = {shape.place: _a(shape) for shape in scene.shapes}
    cells = [f"{place}: {shapes.get(place, 'nothing')}" for place in PLACES]
    return "Go through the picture place by place.", ", ".join(cells) + "."


DESCRIPTIONS = (
    (
        ("Describe the picture.", "What can you see in this picture?", "Please describe this image in detail."),
        _sentences,
    ),
    (("List everything in the picture.", "Make a numbered list of the shapes."), _list),
    (("Describe the picture row by row.", "Go through the rows of the picture."), _rows),
    (("Tell a story about this picture.", "Make up a short story about these shapes."), _story),
    (("Describe the colours of the picture.", "Which colours are there, and where?"), _colours),
)


def description(random: Random, scene: Scene) -> tuple[str, str]:
    """Return a request to describe the scene at length, and the answer."""
    questions, answer = random.choice(DESCRIPTIONS)
    return random.choice(questions), answer(scene, random)


def follow_up(random: Random, scene: Scene) -> tuple[str, str]:
    """Return a second request about a scene that was talked about before, with an answer of some length."""
    kind = random.randrange(4)
    if kind == 0:
        return description(random, scene)
    if kind == 1:
        backwards = [f"the {shape.name} in the {shape.place}" for shape in reversed(scene.shapes)]
        return "Name the shapes again, from last to first.", f"From last to first they are {join(backwards)}."
    if kind == 2:
        size = random.choice(["small", "large"])
        shapes = [
            f"the {shape.colour} {shape.shape} in the {shape.place}" for shape in scene.shapes if shape.size == size
        ]
        answer = f"The {size} shapes are {join(shapes)}." if shapes else f"There are no {size} shapes in this picture."
        return f"Which shapes are {size}?", f"{answer} {_there_are(len(scene.shapes), 'shape')[:-1]} in all."
    kinds = [f"{_count(number, shape)}" for shape in SHAPES if (number := _number(scene, shape))]
    kinds = [kind.replace("crosss", "crosses") for kind in kinds]
    missing = [shape for shape in SHAPES if not _number(scene, shape)]
    rest = f" There is no {' and no '.join(missing)}." if missing else ""
    return "How many shapes of each kind are there?", f"The picture holds {join(kinds)}.{rest}"


def _number(scene: Scene, shape: str) -> int:
    return sum(other.shape == shape for other in scene.shapes)


def comparison(random: Random, first: Scene, second: Scene) -> tuple[str, str]:
    """Return a request about two scenes, and the answer."""
    kind = random.randrange(3)
    if kind == 0:
        which, scene = random.choice([("first", first), ("second", second)])
        answer = f"The {which} picture shows {join([_a_at(shape) for shape in scene.shapes])}."
        return f"What is in the {which} picture?", f"{answer} Its background is {scene.background}."
    parts = [
        f"The {which} picture shows {_count(len(scene.shapes), 'shape')} on a {scene.background} background: "
        f"{join([_a_at(shape) if kind == 1 else _a(shape) for shape in scene.shapes])}."
        for which, scene in (("first", first), ("second", second))
    ]
    if kind == 1:
        return "Describe both pictures.", " ".join(parts)
    difference = len(first.shapes) - len(second.shapes)
    if difference == 0:
        parts.append("Both have the same number of shapes.")
    else:
        parts.append(f"The {'first' if difference > 0 else 'second'} picture has more shapes.")
    return random.choice(["Compare the two pictures.", "How do these pictures differ?"]), " ".join(parts)
