"""Instructions that need no picture, with their answers and follow-ups: stories, lists, counting, rewriting."""

from random import Random


NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Lena", "Max")
ANIMALS = ("fox", "bear", "rabbit", "wolf", "mouse", "owl", "horse", "duck", "cat", "dog", "frog", "hen")
LANDSCAPES = ("forest", "river", "mountain", "garden", "village", "lake", "meadow", "castle")
THINGS = ("key", "lamp", "book", "coat", "bell", "boat", "ring", "map", "drum", "kite")
FOODS = ("apples", "pears", "bread", "cheese", "honey", "milk", "nuts", "soup", "eggs", "carrots", "rice", "beans")
MOODS = ("happy", "brave", "quiet", "clever", "kind", "tired")
WEATHERS = ("sunny", "rainy", "windy", "cold", "warm", "foggy")


def _story_text(name: str, animal: str, place: str, thing: str, mood: str) -> str:
    return (
        f"One morning {name} went for a walk to the {place}. There {name} met a {mood} {animal} that had lost its "
        f'{thing}. "Please help me," said the {animal}. So they looked for the {thing} behind every tree and under '
        f"every stone. At last {name} found the {thing} near the {place}. The {animal} was very happy, and from "
        "that day on they were good friends."
    )


def _story(random: Random) -> list[tuple[str, str]]:
    name, animal, place = random.choice(NAMES), random.choice(ANIMALS), random.choice(LANDSCAPES)
    thing, mood = random.choice(THINGS), random.choice(MOODS)
    request = f"Tell me a short story about {name}, a {animal} and the {place}."
    if random.random() < 0.5:
        request = f"Write a story about {name} and a {mood} {animal} that has lost its {thing} at the {place}."
    if random.random() < 0.5:
        other = random.choice([other for other in ANIMALS if other != animal])
        follow_up = (
            f"Tell it again with a {other} instead of the {animal}.",
            _story_text(name, other, place, thing, mood),
        )
    else:
        follow_up = (
            "What happened in the end?",
            f"In the end {name} found the {thing} of the {animal}, and {name} and the {animal} became good friends.",
        )
    return [(request, _story_text(name, animal, place, thing, mood)), follow_up]


def _counting(random: Random) -> list[tuple[str, str]]:
    start, step, length = random.randint(1, 40), random.choice([1, 1, 2, 5, 10]), random.randint(10, 20)
    numbers = list(range(start, start + step * length, step))

    def count(numbers: list[int]) -> str:
        return f"{numbers[0]} to {numbers[-1]}", ", ".join(map(str, numbers)) + "."

    request, answer = count(numbers)
    backwards, backwards_answer = count(numbers[::-1])
    steps = "" if step == 1 else f" in steps of {step}"
    follow_up = ("Now count backwards.", f"Counting from {backwards}{steps}: {backwards_answer}")
    return [(f"Count from {request}{steps}.", f"Counting from {request}{steps}: {answer}"), follow_up]


def _reversal(random: Random) -> list[tuple[str, str]]:
    words = random.sample(random.choice([ANIMALS, FOODS, THINGS, NAMES]), random.randint(5, 9))
    listing, reversed_listing = ", ".join(words), ", ".join(words[::-1])
    first = (f"Reverse this list: {listing}.", f"The list in reverse order is: {reversed_listing}.")
    second = ("Write it as a numbered list.", "\n".join(f"{i}. {word}" for i, word in enumerate(words[::-1], 1)))
    if random.random() < 0.5:
        second = ("Now reverse it again.", f"The list in its first order is: {listing}.")
    return [first, second]


def _shopping(random: Random) -> list[tuple[str, str]]:
    name, place = random.choice(NAMES), random.choice(LANDSCAPES)
    foods = random.sample(FOODS, random.randint(4, 7))
    request = f"{name} needs {', '.join(foods[:-1])} and {foods[-1]} for a trip to the {place}. Write a shopping list."
    answer = "\n".join(
        [f"Shopping list for {name}:", *(f"{i}. {food}" for i, food in enumerate(foods, 1)), f"Enjoy the {place}!"]
    )
    extra = random.choice([food for food in FOODS if food not in foods])
    longer = "\n".join(
        [
            f"Shopping list for {name}:",
            *(f"{i}. {food}" for i, food in enumerate([*foods, extra], 1)),
            f"Enjoy the {place}!",
        ]
    )
    return [(request, answer), (f"Add {extra} at the end.", longer)]


def _rewriting(random: Random) -> list[tuple[str, str]]:
    name, animal, place = random.choice(NAMES), random.choice(ANIMALS), random.choice(LANDSCAPES)
    thing, food = random.choice(THINGS), random.choice(FOODS)

    def text(name: str, animal: str, past: bool) -> str:
        walks, carries, sees, gives, go = (
            ("walked", "carried", "saw", "gave", "went") if past else ("walks", "carries", "sees", "gives", "go")
        )
        return (
            f"{name} {walks} to the {place} and {carries} a {thing}. Near the {place} {name} {sees} a {animal}. "
            f"{name} {gives} it some {food}, and then they {go} home together."
        )

    other_name = random.choice([other for other in NAMES if other != name])
    other_animal = random.choice([other for other in ANIMALS if other != animal])
    past = random.random() < 0.5
    if past:
        first = (f"Put this into the past tense: {text(name, animal, False)}", text(name, animal, True))
    else:
        request = f"Replace {name} with {other_name}: {text(name, animal, False)}"
        first, name = (request, text(other_name, animal, False)), other_name
    return [first, (f"Replace the {animal} with a {other_animal}.", text(name, other_animal, past))]


def _plan(random: Random) -> list[tuple[str, str]]:
    name, weather = random.choice(NAMES), random.choice(WEATHERS)
    first, second = random.sample(LANDSCAPES, 2)
    animal, food = random.choice(ANIMALS), random.choice(FOODS)
    request = f"Plan a {weather} day for {name} with a visit to the {first} and the {second}."
    clothes = "a warm coat" if weather in ("rainy", "windy", "cold", "foggy") else "a light hat"
    answer = (
        f"Here is a plan for a {weather} day. In the morning {name} puts on {clothes} and walks to the {first}. "
        f"At noon there is time to eat some {food} and to rest. In the afternoon {name} goes on to the {second} to "
        f"look for a {animal}. In the evening {name} comes home and tells everyone about the day."
    )
    follow_up = (
        "Give me the plan as a short list.",
        f"1. Morning: walk to the {first}.\n2. Noon: eat some {food} and rest.\n"
        f"3. Afternoon: go on to the {second}.\n4. Evening: come home.",
    )
    return [(request, answer), follow_up]


def repetitions(random: Random) -> list[tuple[str, str]]:
    """Return requests to repeat a row of random words, and the answers: several short ones, or a long one."""
    pool = [*NAMES, *ANIMALS, *LANDSCAPES, *THINGS, *FOODS, *MOODS, *WEATHERS, *map(str, range(1, 100))]
    lengths = [random.randint(8, 20)] if random.random() < 0.2 else random.choices(range(2, 9), k=random.randint(1, 5))
    rows = [" ".join(random.sample(pool, length)) for length in lengths]
    return [(f"Repeat these words: {row}.", f"{row}.") for row in rows]


TASKS = (_story, _counting, _reversal, _shopping, _rewriting, _plan)


def text_turns(random: Random) -> list[tuple[str, str]]:
    """Return two turns of a conversation without pictures, each a request and its answer."""
    return random.choice(TASKS)(random)
