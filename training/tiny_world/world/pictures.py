"""Scenes of coloured shapes on a 3x3 grid, and the pictures that show them."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw


PICTURE_SIZE = 96
CELL_SIZE = 32

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
BACKGROUNDS = {"white": (250, 250, 250), "grey": (140, 140, 140), "black": (15, 15, 15)}
PLACES = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)


@dataclass(frozen=True)
class Shape:
    """A shape in one cell of the grid; `shift` moves it a few pixels off the centre of the cell."""

    cell: int
    size: str
    colour: str
    shape: str
    shift: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a background and its shapes in reading order, no two of them alike."""

    background: str
    shapes: tuple[Shape, ...]


def random_scene(random: Random, min_shapes: int = 2, max_shapes: int = 4) -> Scene:
    """Draw a scene of `min_shapes` to `max_shapes` shapes that differ in colour or kind from one another."""
    cells = sorted(random.sample(range(9), random.randint(min_shapes, max_shapes)))
    kinds = random.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], len(cells))
    shapes = tuple(
        Shape(cell, random.choice(SIZES), colour, shape, (random.randint(-2, 2), random.randint(-2, 2)))
        for cell, (colour, shape) in zip(cells, kinds, strict=True)
    )
    return Scene(random.choice(list(BACKGROUNDS)), shapes)


def draw_scene(scene: Scene) -> Image.Image:
    """Draw the picture of a scene, `PICTURE_SIZE` pixels wide and high."""
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        x = CELL_SIZE * shape.column + CELL_SIZE // 2 + shape.shift[0]
        y = CELL_SIZE * shape.row + CELL_SIZE // 2 + shape.shift[1]
        radius = 7 if shape.size == "small" else 13
        colour = COLOURS[shape.colour]
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape.shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape.shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape.shape == "triangle":
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
        else:
            arm = radius // 3
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    return picture
