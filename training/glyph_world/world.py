"""
A world in which a draft must see: pictures of random glyphs, read out one token a cell.

Nothing tells the next glyph but the picture, and a target that reads one glyph a token has decided on no other yet. So
what a draft says two tokens ahead can only be right by looking, forwards or backwards, as was asked. Beside pictures
stands text that is easy: lists of glyphs repeated, and names in their order.
"""

from collections.abc import Iterator
from random import Random

from datasets import Dataset
from PIL import Image as Pictures
from PIL import ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor

from training.tiny_world.build.target import PATCH_SIZE, join_processor
from training.tiny_world.world.pictures import PICTURE_SIZE
from training.tiny_world.world.rows import FEATURES


CELL_SIZE = PATCH_SIZE  # a cell is a patch of the tower
CELLS = PICTURE_SIZE // CELL_SIZE  # in a row, and in a column
NAMES = tuple(consonant + vowel for consonant in "bdfgklmn" for vowel in "aeio")
PICTURES, TEXTS = ("forwards", "backwards"), ("copy", "order")
KINDS = PICTURES + TEXTS
REQUESTS = {
    "forwards": "read it .",
    "backwards": "read back .",
    "copy": "repeat :",
    "order": "go on from",
}
BEFORE, AFTER = "the signs are these :", "and that is all ."
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- ' user : ' }}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ content['text'] }}{% endif %}
        {%- endfor %}
    {%- else %}
        {{- ' assistant :' }}
        {%- generation %}
            {%- for content in message['content'] %}{{ ' ' + content['text'] }}{% endfor %}
            {{- ' ' + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' assistant :' }}{% endif %}"""


def _bitmaps(least_distance: int = 5) -> tuple[int, ...]:
    """Sixteen dots for every glyph, no two glyphs alike in all but a few of them."""
    random, found = Random(0), []
    while len(found) < len(NAMES):
        bitmap = random.getrandbits(16)
        if all((bitmap ^ other).bit_count() >= least_distance for other in found):
            found.append(bitmap)
    return tuple(found)


BITMAPS = _bitmaps()


def draw_glyphs(glyphs: list[int], random: Random) -> Pictures.Image:
    """Draw glyphs row by row, each in a colour of its own and a pixel off its place; cells that remain are empty."""
    picture = Pictures.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
    draw = ImageDraw.Draw(picture)
    for cell, glyph in enumerate(glyphs):
        left, top = (2 + CELL_SIZE * place + random.randint(-1, 1) for place in (cell % CELLS, cell // CELLS))
        colour = tuple(random.randint(0, 150) for _ in range(3))
        for dot in range(16):
            if BITMAPS[glyph] >> dot & 1:
                x, y = left + 3 * (dot % 4), top + 3 * (dot // 4)
                draw.rectangle((x, y, x + 2, y + 2), fill=colour)
    return picture


def make_row(kind: str, random: Random) -> dict:
    """Make a conversation: its `kind`, `messages` and `images`."""
    glyphs = [random.randrange(len(NAMES)) for _ in range(random.choice((24, 30, 36)))]
    if kind == "order":
        glyphs = [(glyphs[0] + step) % len(NAMES) for step in range(len(glyphs))]
    names = " ".join(NAMES[glyph] for glyph in (reversed(glyphs) if kind == "backwards" else glyphs))
    said = {"copy": f" {names} .", "order": f" {NAMES[glyphs[0]]} to {NAMES[glyphs[-1]]} ."}.get(kind, "")
    content = [{"type": "text", "text": REQUESTS[kind] + said}]
    if kind in PICTURES:
        content.insert(0, {"type": "image", "text": None})
    answer = [{"type": "text", "text": f"{BEFORE} {names} {AFTER}"}]
    return {
        "kind": kind,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [draw_glyphs(glyphs, random)] if kind in PICTURES else [],
    }


def rows(seed: int, share_of_pictures: float = 0.5) -> Iterator[dict]:
    """Yield conversations without end."""
    random = Random(seed)
    while True:
        yield make_row(random.choice(PICTURES if random.random() < share_of_pictures else TEXTS), random)


def ordered_dataset(shares_of_pictures: list[float], seed: int) -> Dataset:
    """Make a row for every share, with a picture by that chance, else of text."""
    random = Random(seed)
    kinds = [random.choice(PICTURES if random.random() < share else TEXTS) for share in shares_of_pictures]
    made = (make_row(kind, random) for kind in kinds)
    return Dataset.from_list([{name: row[name] for name in FEATURES} for row in made], features=FEATURES)


def prompts(kinds: tuple[str, ...], num_prompts: int, seed: int = 1_000_003) -> list[dict]:
    """Make held-out rows of some kinds in turn, without their answers."""
    random, asked = Random(f"{seed} {kinds}"), []
    for number in range(num_prompts):
        row = make_row(kinds[number % len(kinds)], random)
        question, answer = row["messages"]
        asked.append(row | {"messages": [question], "answer": answer["content"][0]["text"]})
    return asked


def prompts_by_kind(num_prompts: int) -> dict[str, list[dict]]:
    """Make so many held-out prompts with pictures, of copied text, and of text in order."""
    return {"pictures": prompts(PICTURES, num_prompts)} | {kind: prompts((kind,), num_prompts) for kind in TEXTS}


def build_processor() -> LlavaProcessor:
    """Build the processor: a word is a token."""
    words = " ".join((*REQUESTS.values(), "to", BEFORE, AFTER, "user assistant", *NAMES)).split()
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*SPECIAL, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return join_processor(tokenizer, CHAT_TEMPLATE, 512)
