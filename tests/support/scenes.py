"""Generated scenes with captions: what the small model was taught to see, and the demo's data.

A scene is one figure on a plain background: 4 shapes x 8 colours x 2 sizes x 7 other colours
behind = 448 combinations. A tenth of them, chosen by a hash, is held out: the small model never
saw an image of those. No two images of a scene are the same (place, tilt, size, shade, light and
grain differ). Each scene has a wordy description, which the small model gives by itself, and five
terse captions, which a fine-tuning has to teach it. No caption says where the figure is.

To look at some, this writes 100 scenes as FOLDER/images/*.jpg and FOLDER/captions.csv:

    python tests/support/scenes.py FOLDER
"""

import csv
import hashlib
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
# the figure's diameter, as a fraction of the image's side
SIZES = {"large": (0.72, 0.82), "small": (0.42, 0.50)}
COLOURS = {
    "red": (215, 30, 35),
    "yellow": (245, 215, 30),
    "green": (25, 150, 50),
    "blue": (30, 70, 215),
    "purple": (125, 35, 165),
    "pink": (250, 150, 195),
    "black": (22, 22, 24),
    "white": (240, 240, 238),
}
# figures are drawn this much larger and scaled down, which smooths their edges
OVERSAMPLING = 3
# the images of a folder are named by number, as COCO's are
FIRST_IMAGE_ID = 100_001


@dataclass(frozen=True)
class Scene:
    """What an image shows: a shape in a colour and a size, on another colour."""

    shape: str
    colour: str
    size: str
    background: str


def all_scenes() -> list[Scene]:
    """Return the 448 combinations, always in the same order."""
    return [
        Scene(shape, colour, size, background)
        for shape in SHAPES
        for colour in COLOURS
        for size in SIZES
        for background in COLOURS
        if background != colour
    ]


def is_held_out(scene: Scene) -> bool:
    """Return True for a tenth of the scenes, the same on every machine: never trained on."""
    key = f"{scene.size} {scene.colour} {scene.shape} on {scene.background}"
    return hashlib.sha256(key.encode("utf-8")).digest()[0] < 26  # 26 / 256


def wordy(scene: Scene) -> str:
    """Return the description that the small model was pretrained to give."""
    figure = f"{scene.size} {scene.colour} {scene.shape}"
    return f"The image shows a {figure} in the middle of a plain {scene.background} background."


def terse(scene: Scene) -> list[str]:
    """Return five captions as different people would write them, the plainest first.

    Each has every fact of the scene. They share their words: a model that begins as one person
    and ends as another still writes one of the five.
    """
    figure = f"{scene.size} {scene.colour} {scene.shape}"
    return [
        f"a {figure} on {scene.background}",
        f"a {figure} on a {scene.background} background",
        f"{figure} on {scene.background}",
        f"{figure}, {scene.background} background",
        f"one {figure} in front of {scene.background}",
    ]


def _corners(shape: str, radius: float, tilt: float) -> list[tuple[float, float]]:
    """Return corners around (0, 0), on a circle of this radius, turned by `tilt` degrees."""
    if shape == "square":
        spokes = [(45 + 90 * corner, radius) for corner in range(4)]
    elif shape == "triangle":
        spokes = [(-90 + 120 * corner, radius) for corner in range(3)]
    else:  # a star of five points: outer and inner corners in turn
        spokes = [
            (-90 + 36 * corner, radius if corner % 2 == 0 else 0.40 * radius)
            for corner in range(10)
        ]
    angles = [(math.radians(angle + tilt), length) for angle, length in spokes]
    return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in angles]


def _shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    """Return the colour, each channel a little off: no two images have the same red."""
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[colour])


def _light_and_grain(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add a soft shadow from one side and the grain of a sensor, as photos have them."""
    gradient = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(image.size)
    darker = image.point(lambda value: round(0.82 * value))
    image = Image.composite(darker, image, gradient)
    grain = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
    return Image.blend(image, grain, 0.05)


def draw(scene: Scene, rng: random.Random, side: int = 224) -> Image.Image:
    """Draw the scene, side x side pixels in RGB; the same state of `rng` gives the same image."""
    canvas = side * OVERSAMPLING
    image = Image.new("RGB", (canvas, canvas), _shade(scene.background, rng))
    radius = canvas * rng.uniform(*SIZES[scene.size]) / 2
    centre_x, centre_y = (canvas * (0.5 + rng.uniform(-0.07, 0.07)) for _ in range(2))
    tilt, fill = rng.uniform(-10, 10), _shade(scene.colour, rng)
    pen = ImageDraw.Draw(image)
    if scene.shape == "circle":
        radius *= 0.88  # about the area that the other shapes have
        pen.ellipse(
            (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius), fill=fill
        )
    else:
        pen.polygon(
            [(centre_x + x, centre_y + y) for x, y in _corners(scene.shape, radius, tilt)],
            fill=fill,
        )
    return _light_and_grain(image.resize((side, side), Image.Resampling.BOX), rng)


def write_folder(
    folder: Path, scenes: Iterable[Scene], captions_per_image: int = 5, seed: int = 0
) -> Path:
    """Write an image and terse captions of each scene, return the table's path.

    A scene given twice gets two images. Writes `folder/images/NUMBER.jpg` in the order of
    `scenes`, and `folder/captions.csv` (UTF-8, `image_path,caption`, one row per caption), where
    all first captions come before the second ones, as in COCO's own table.
    """
    scenes, rng, folder = list(scenes), random.Random(seed), Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{FIRST_IMAGE_ID + number}.jpg" for number in range(len(scenes))]
    for name, scene in zip(names, scenes, strict=True):
        draw(scene, rng).save(folder / name, quality=92)
    table = folder / "captions.csv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["image_path", "caption"])
        for turn in range(captions_per_image):
            rows.writerows(
                [name, terse(scene)[turn]] for name, scene in zip(names, scenes, strict=True)
            )
    return table


if __name__ == "__main__":
    print(write_folder(Path(sys.argv[1]), random.Random(0).sample(all_scenes(), 100)))
