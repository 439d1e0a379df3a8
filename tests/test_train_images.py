"""train.py, images: opened as people see them, inspected, seen once by the tower, kept."""

import hashlib
import io
import os
import shutil
import struct
import threading
import zlib
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import posix
from PIL import Image, ImageChops, ImageDraw, ImageOps
from support.training import (
    MARKER,
    about,
    draw_scene,
    make_samples,
    record,
    save_noise,
    write_records,
)

HEIGHT, WIDTH = 64, 96


def drawing() -> Image.Image:
    """What every image below shows to people: on white a black bar, a red block, a blue disc."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((4, 4, 15, 59), fill="black")
    pen.rectangle((64, 4, 91, 19), fill="red")
    pen.ellipse((60, 36, 83, 59), fill="blue")
    return image


DRAWING = drawing()
GREY = DRAWING.convert("L")
BLACK_AND_WHITE = GREY.point(lambda value: 255 if value > 128 else 0)
INK = ImageChops.invert(BLACK_AND_WHITE)  # where something is drawn

# How a camera has to turn the image before it notes each number of Exif's Orientation
TURNED_BY_CAMERA = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}
# Files that lose nothing, or next to nothing
FINEST = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{**FINEST.get(kind, {}), **options})
    return file.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    """Return a file whose pixels lie as the camera was held, with its note how to turn them."""
    image = DRAWING
    for turn in TURNED_BY_CAMERA[orientation]:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif)


def clear(colours: Image.Image) -> Image.Image:
    """Return an image that is black, but clear, where nothing is drawn."""
    image = Image.new(colours.mode, colours.size)
    image.paste(colours, mask=INK)
    image.putalpha(INK)
    return image


def by_index(colours: Image.Image) -> Image.Image:
    """Return an image of four colours; the first one is that of the ground, and black."""
    image = Image.new("P", colours.size, 0)
    image.putpalette([0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 255])
    pixels = numpy.asarray(colours).astype(int)  # (height, width, 3)
    index = numpy.zeros(pixels.shape[:2], dtype="uint8")
    for number, colour in enumerate([(0, 0, 0), (255, 0, 0), (0, 0, 255)], start=1):
        index[abs(pixels - colour).sum(axis=2) < 10] = number
    image.putdata(index.flatten().tolist())
    return image


def clear_ground(mode: str) -> Image.Image:
    """Return an image whose ground has the colour 7, which its file will declare clear."""
    return Image.composite(DRAWING.convert(mode), Image.new(mode, DRAWING.size, 7), INK)


def png_of_16_bits(image: Image.Image) -> bytes:
    """Return a PNG with 16 bits per colour, which Pillow reads, but does not write."""
    kind = {"RGB": 2, "LA": 4, "RGBA": 6}[image.mode]
    pixels = numpy.asarray(image).astype(">u2") * 257  # (height, width, colours)
    rows = [b"\0" + row.tobytes() for row in pixels]
    head = struct.pack(">IIBBBBB", *image.size, 16, kind, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in (
        (b"IHDR", head),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        file += struct.pack(">I", len(content)) + name + content + checksum
    return file


def moving(kind: str) -> bytes:
    later = [Image.new("RGB", DRAWING.size, colour) for colour in ("green", "pink")]
    return saved(DRAWING, kind, save_all=True, append_images=later, duration=100)


def awkward_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Return files by name: their bytes, and what people see in them."""
    cmyk = DRAWING.convert("CMYK")
    bit = {"bits": 1, "transparency": 1}
    two_in_one = {"save_all": True, "append_images": [Image.new("RGB", DRAWING.size)]}
    images = {
        "plain.jpg": (saved(DRAWING, "JPEG"), DRAWING),
        "plain.bmp": (saved(DRAWING, "BMP"), DRAWING),
        "grey.jpg": (saved(GREY, "JPEG"), GREY),
        "black and white.png": (saved(BLACK_AND_WHITE.convert("1"), "PNG"), BLACK_AND_WHITE),
        "cmyk.jpg": (saved(cmyk, "JPEG"), cmyk.convert("RGB")),
        "cmyk.tif": (saved(cmyk, "TIFF"), cmyk.convert("RGB")),
        "rgba.png": (saved(clear(DRAWING), "PNG"), DRAWING),
        "rgba.webp": (saved(clear(DRAWING), "WEBP", exact=True), DRAWING),
        "rgba.tif": (saved(clear(DRAWING), "TIFF"), DRAWING),
        "la.png": (saved(clear(GREY), "PNG"), GREY),
        "la.tif": (saved(clear(GREY), "TIFF"), GREY),
        "palette, one clear.png": (saved(by_index(DRAWING), "PNG", transparency=0), DRAWING),
        "palette, many clear.png": (
            saved(by_index(DRAWING), "PNG", transparency=b"\0\xff\xff\xff"),
            DRAWING,
        ),
        "palette, one clear.gif": (saved(by_index(DRAWING), "GIF", transparency=0), DRAWING),
        "grey, one clear.png": (saved(clear_ground("L"), "PNG", transparency=7), GREY),
        "rgb, one clear.png": (saved(clear_ground("RGB"), "PNG", transparency=(7, 0, 0)), DRAWING),
        "one bit, one clear.png": (
            # black on clear: drawn is 0, the ground is 1, which is declared clear
            saved(BLACK_AND_WHITE.convert("1"), "PNG", **bit),
            BLACK_AND_WHITE,
        ),
        "16 bits, rgb.png": (png_of_16_bits(DRAWING), DRAWING),
        "16 bits, rgba.png": (png_of_16_bits(clear(DRAWING)), DRAWING),
        "16 bits, la.png": (png_of_16_bits(clear(GREY)), GREY),
        "moving.gif": (moving("GIF"), DRAWING),
        "moving.webp": (moving("WEBP"), DRAWING),
        "moving.png": (moving("PNG"), DRAWING),
        "two in one.jpg": (saved(DRAWING, "MPO", **two_in_one), DRAWING),
        "a png.jpg": (saved(DRAWING, "PNG"), DRAWING),
    }
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in TURNED_BY_CAMERA:
            name = f"turned {orientation}.{kind.lower()}"
            images[name] = (turned(kind, orientation), DRAWING)
    return images


AWKWARD = awkward_images()


def difference(ours: Image.Image, theirs: Image.Image) -> numpy.ndarray:
    """Return how many grey levels two images differ by: (height, width, 3)."""
    assert ours.size == theirs.size and ours.mode == "RGB"
    return abs(numpy.asarray(ours).astype(int) - numpy.asarray(theirs.convert("RGB")))


# ---- open_image


@pytest.mark.parametrize("name", AWKWARD)
def test_images_are_opened_as_people_see_them(train, name):
    """Upright, in colour, on white, the first of several: equal to the drawing in all of them.

    Otherwise a black drawing on clear ground is learned as a black square, without a word.
    """
    content, seen = AWKWARD[name]
    opened = train.open_image(io.BytesIO(content), HEIGHT, WIDTH)
    lossy = name.endswith((".jpg", ".jpeg"))
    assert difference(opened, seen).mean() < (2 if lossy else 0.1)


def open_plainly(file: io.BytesIO, height: int, width: int) -> Image.Image:
    """Do what open_image does by other means: whole decode, turned and laid on white in numpy."""
    image = Image.open(file)
    orientation = image.getexif().get(0x0112, 1)
    image.load()
    pixels = numpy.asarray(image.convert("RGBA")).astype(float)  # (height, width, 4)
    alpha = pixels[:, :, 3:] / 255
    flat = pixels[:, :, :3] * alpha + 255 * (1 - alpha)
    # Pillow turns a TIFF by itself
    for turn in reversed(TURNED_BY_CAMERA[orientation if image.format != "TIFF" else 1]):
        flat = {
            Image.Transpose.FLIP_LEFT_RIGHT: lambda x: x[:, ::-1],
            Image.Transpose.FLIP_TOP_BOTTOM: lambda x: x[::-1],
            Image.Transpose.ROTATE_180: lambda x: x[::-1, ::-1],
            Image.Transpose.TRANSPOSE: lambda x: x.swapaxes(0, 1),
            Image.Transpose.TRANSVERSE: lambda x: x[::-1, ::-1].swapaxes(0, 1),
            Image.Transpose.ROTATE_90: lambda x: x.swapaxes(0, 1)[:, ::-1],
            Image.Transpose.ROTATE_270: lambda x: x.swapaxes(0, 1)[::-1],
        }[turn](flat)
    whole = Image.fromarray(flat.round().astype("uint8").copy())
    return whole.resize((width, height), Image.Resampling.BICUBIC)


def test_images_are_opened_as_plain_code_opens_them(train):
    """Sizes and colours are those of another program that does the same."""
    for name, (content, _) in AWKWARD.items():
        for size in ((56, 112), (HEIGHT, WIDTH)):
            ours = train.open_image(io.BytesIO(content), *size)
            theirs = open_plainly(io.BytesIO(content), *size)
            # the same numbers are rounded elsewhere
            assert difference(theirs, ours).max() <= 2, (name, size)


TOO_DEEP = {
    "16 bits.png": saved(Image.new("I;16", (64, 64), 9000), "PNG"),
    "32 bits.tif": saved(Image.new("I", (64, 64), 9000), "TIFF"),
    "numbers.tif": saved(Image.new("F", (64, 64), 0.5), "TIFF"),
}


@pytest.mark.parametrize("name", TOO_DEEP)
def test_images_with_more_than_8_bits_of_grey_are_refused(train, name):
    """They are refused by their reason. Otherwise all above 255 would be learned as white."""
    with pytest.raises(ValueError, match="more than 8 bits"):
        train.open_image(io.BytesIO(TOO_DEEP[name]), 56, 56)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A photo of 12 megapixels: soft light, hard edges, and grain."""
    image = Image.linear_gradient("L").resize((4000, 3000)).convert("RGB")
    pen = ImageDraw.Draw(image)
    for number in range(60):
        x, y = 61 * number, 47 * number % 2700
        pen.ellipse((x, y, x + 400, y + 260), fill=(number * 4, 255 - number * 3, y % 256))
    return Image.blend(image, Image.effect_noise(image.size, 60).convert("RGB"), 0.1)


@pytest.mark.parametrize(
    ("size", "orientation"), [((280, 280), 1), ((644, 476), 6), ((1008, 1344), 1)]
)
def test_large_photos_are_decoded_at_a_fraction(train, photo, size, orientation, monkeypatch):
    """A large JPEG is decoded at a half to an eighth, within a few grey levels of the whole.

    Never below the size that is asked for. Otherwise users' own photos take minutes, or blur.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(photo, "JPEG", quality=92, exif=exif)
    decoded = []
    turn = ImageOps.exif_transpose

    def note_size(image: Image.Image) -> Image.Image:
        decoded.append(image.size)
        return turn(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", note_size)
    opened = train.open_image(io.BytesIO(content), *size)
    [(width, height)] = decoded
    assert max(size) <= min(width, height) and width * height <= 4000 * 3000 / 4
    whole = turn(Image.open(io.BytesIO(content)))
    whole = whole.resize(opened.size, Image.Resampling.BICUBIC)
    assert difference(opened, whole).mean() < 2


# ---- Inspecting


@pytest.mark.parametrize("name", AWKWARD)
def test_sizes_are_read_from_the_head(train, name, tmp_path, monkeypatch):
    """The head of a file tells the size of the upright image, which is what the tower gets.

    Otherwise an image of another shape is squashed, or has other tokens than features.
    """
    content, _ = AWKWARD[name]
    with Image.open(io.BytesIO(content)) as image:
        assert train.upright_size(image) == (HEIGHT, WIDTH)
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    (tmp_path / name).write_bytes(content)
    found = train.inspect_image(str(tmp_path / name), 28)
    assert not found.problem and (found.height, found.width) == (56, 84)
    assert found.digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("size", "orientation", "expected"),
    [
        ((640, 480), 1, (476, 644)),
        ((640, 480), 6, (644, 476)),  # as a telephone that was held upright writes it
        ((480, 640), 3, (644, 476)),
        ((4000, 3000), 1, (476, 644)),  # within MAX_PIXELS
        ((20, 30), 1, (84, 56)),
    ],
)
def test_native_sizes(train, tmp_path, monkeypatch, size, orientation, expected):
    """Without IMAGE_SIZE an image keeps its upright shape, in multiples of 28, in MAX_PIXELS."""
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save_noise(tmp_path / "photo.jpg", size, exif=exif)
    found = train.inspect_image(str(path), 28)
    assert (found.height, found.width) == expected
    assert found.height * found.width <= train.MAX_PIXELS
    assert train.open_image(found.path, found.height, found.width).size == expected[::-1]


@pytest.mark.parametrize("size", [(15_000, 90), (5_700, 28), (28, 6_000), (28 * 200 + 15, 28)])
def test_shapes_that_the_model_cannot_see(train, tmp_path, monkeypatch, size):
    """A ratio over 200 as resized is refused by name. Otherwise the model stops the training."""
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    Image.new("L", size).save(tmp_path / "strip.png")
    found = train.inspect_image(str(tmp_path / "strip.png"), 28)
    assert found.problem.startswith(f"{tmp_path / 'strip.png'} can't be opened: ")
    assert "200" in found.problem


def test_shapes_that_the_model_just_sees(train, tmp_path, monkeypatch):
    """What is accepted is what the library takes: sides of 28 or more, ratios up to 200."""
    from qwen_vl_utils import smart_resize

    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    for width in (5_600, 5_599, 5_000, 2_000):
        height, width = train.model_size(28, width, 28)
        assert (height, width) == smart_resize(
            height, width, factor=28, max_pixels=train.MAX_PIXELS
        )


@pytest.mark.parametrize(
    ("side", "wanted", "used"), [(28, 280, 280), (28, 300, 308), (32, 280, 288), (32, 288, 288)]
)
def test_image_size_is_taken_to_the_next_multiple(
    train, base, capsys, monkeypatch, side, wanted, used
):
    """IMAGE_SIZE is rounded up to what the model can see, and that is said."""
    monkeypatch.setattr(train, "IMAGE_SIZE", wanted)
    monkeypatch.setattr(train.Base, "side", side)
    assert train.model_size(640, 480, side) == (used, used)
    assert train.describe_size(base) == f"{used}x{used} pixels"
    said = capsys.readouterr().out
    assert said.startswith(f"IMAGE_SIZE = {wanted} is not a multiple of {side}") == (used != wanted)


def make_unusable(folder) -> dict[str, str]:
    """Make files and folders that are not images; return how the reason for each begins."""
    whole = save_noise(folder / "whole.jpg", (200, 200)).read_bytes()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>Please log in.</html>")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    drawing().save(folder / "program.jpg", "EPS")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(DRAWING, "JPEG", exif=exif)
    # the note's type says text where a number is due
    (folder / "exif.jpg").write_bytes(content.replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x02"))
    broken = saved(DRAWING, "PNG", pnginfo=None)
    (folder / "chunk.png").write_bytes(broken[:33] + b"\xff" * 40 + broken[73:])
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    return {
        "page.jpg": "can't be opened: ",
        "empty.jpg": "can't be opened: ",
        "program.jpg": "can't be opened: ",
        "folder.jpg": "is a folder or a device",
        "exif.jpg": "can't be opened: ",
        "chunk.png": "can't be opened: ",
        "gone.jpg": "image is missing: ",
    }


def test_what_is_not_an_image_is_named(train, tmp_path):
    """Whatever stands in an image's place, the reason names it, and all others are inspected."""
    expected = make_unusable(tmp_path)
    found = train.inspect_images([str(tmp_path / name) for name in [*expected, "whole.jpg"]], 28)
    assert not found[str(tmp_path / "whole.jpg")].problem
    for name, reason in expected.items():
        problem = found[str(tmp_path / name)].problem
        assert reason in problem and str(tmp_path / name) in problem, problem


@posix
def test_a_named_pipe_is_not_waited_for(train, tmp_path):
    """A pipe is refused without being opened. Otherwise the check would wait for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    found = train.inspect_image(str(tmp_path / "pipe.jpg"), 28)
    assert found.problem.startswith("image is a folder or a device")


def test_the_file_that_was_perhaps_meant_is_named(train, tmp_path):
    """A missing image is reported by its absolute path, with the near miss where there is one."""
    (tmp_path / "images").mkdir()
    composed, apart = "caf\u00e9.jpg", "cafe\u0301.jpg"
    save_noise(tmp_path / "images" / apart, (60, 60))
    save_noise(tmp_path / "images/one.jpg", (60, 60))

    def problem(name: str) -> str:
        return train.inspect_image(str(tmp_path / name), 28).problem

    assert problem("images/two.jpg") == f"image is missing: {tmp_path}/images/two.jpg"
    assert f"Did you mean {tmp_path}/images/one.jpg?" in problem("imges/one.jpg")
    assert f"Did you mean {tmp_path}/images/one.jpg?" in problem("images/One.JPG")
    if not os.path.exists(tmp_path / "images" / composed):  # macOS takes one for the other
        assert "other Unicode characters" in problem(f"images/{composed}")


def test_images_are_inspected_several_at_a_time(train, tmp_path, monkeypatch):
    """IMAGE_THREADS files are read at once, each once. Otherwise COCO takes many minutes."""
    # Broken, and with it all waiting threads, if the images come one after the other
    together = threading.Barrier(train.IMAGE_THREADS, timeout=60)
    read = []

    def inspect_image(path: str, side: int) -> str:
        together.wait()
        read.append(path)
        return path

    monkeypatch.setattr(train, "inspect_image", inspect_image)
    paths = [f"{number}.jpg" for number in range(2 * train.IMAGE_THREADS)]
    assert train.inspect_images(paths * 5, 28) == dict(
        zip(sorted(paths), sorted(paths), strict=True)
    )
    assert sorted(read) == sorted(paths)


# ---- Kept features


@pytest.fixture
def cache(train, tmp_path, monkeypatch):
    """An empty CACHE_FOLDER."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(train, "CACHE_FOLDER", str(folder))
    return folder


def inspect(train, base, folder, *names: str) -> list:
    return [train.inspect_image(str(folder / name), base.side) for name in names]


@pytest.fixture
def tower_passes(train, monkeypatch) -> list[int]:
    """How many images each pass of the vision tower has had so far."""
    passes = []
    load_tower = train.load_tower

    def load_counting_tower(base):
        tower = load_tower(base)
        see = tower.get_image_features

        def count(pixels, grid, **options):
            passes.append(len(grid))
            return see(pixels, grid, **options)

        tower.get_image_features = count
        return tower

    monkeypatch.setattr(train, "load_tower", load_counting_tower)
    return passes


CHANGES = {
    "nothing": lambda train, model, image: None,
    "weights": lambda train, model, image: touch(model / "model-00002-of-00002.safetensors"),
    "size of the weights": lambda train, model, image: append(
        model / "model-00001-of-00002.safetensors"
    ),
    "config.json": lambda train, model, image: append(model / "config.json"),
    "preprocessor_config.json": lambda train, model, image: append(
        model / "preprocessor_config.json"
    ),
    "IMAGE_SIZE": lambda train, model, image: setattr(train, "IMAGE_SIZE", 140),
    "IMAGE_SIZE = None": lambda train, model, image: setattr(train, "IMAGE_SIZE", None),
    "image": lambda train, model, image: append(image),
    "Pillow": lambda train, model, image: setattr(train.Image, "__version__", "99"),
    "transformers": lambda train, model, image: setattr(train.transformers, "__version__", "99"),
    "open_image": lambda train, model, image: setattr(train, "open_image", open_plainly),
}


def touch(path):
    os.utime(path, ns=(0, 0))


def append(path):
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("what", CHANGES)
def test_features_meet_only_what_they_were_made_of(
    train, base, image_folder, cache, tmp_path, monkeypatch, what
):
    """Another model, size, image, version or open_image never meets old features.

    Otherwise a training would quietly learn from what another model saw.
    """
    folder = tmp_path / "model"
    shutil.copytree(train.MODEL_FOLDER, folder)
    monkeypatch.setattr(train, "MODEL_FOLDER", str(folder))
    # so that what the change sets is undone
    for place, name in ((train, "IMAGE_SIZE"), (train, "open_image")):
        monkeypatch.setattr(place, name, getattr(place, name))
    for place in (train.Image, train.transformers):
        monkeypatch.setattr(place, "__version__", place.__version__)
    [image] = inspect(train, base, image_folder, "one.jpg")
    features = train.KeptFeatures(base)
    features.write(image, torch.zeros(features.tokens(image), features.width))
    CHANGES[what](train, folder, image_folder / "one.jpg")
    [image] = inspect(train, base, image_folder, "one.jpg")
    assert train.KeptFeatures(base).holds(image) == (what == "nothing")


def test_features_meet_only_their_own_precision_and_size(
    train, base, exact, image_folder, cache, monkeypatch
):
    """Features of another precision, MAX_PIXELS or shape are others, also with as many tokens."""
    save_noise(image_folder / "wide.jpg", (224, 56))
    square = inspect(train, base, image_folder, "wide.jpg")
    features = train.KeptFeatures(base)
    assert train.see_images(square, features, base) == {} and features.holds(square[0])
    assert not train.KeptFeatures(exact).holds(square[0])
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    [wide] = inspect(train, base, image_folder, "wide.jpg")
    assert features.tokens(wide) == features.tokens(square[0]) == 16
    assert not features.holds(wide)
    train.see_images([wide], features, base)
    monkeypatch.setattr(train, "MAX_PIXELS", 4 * 28 * 28)
    [small] = inspect(train, base, image_folder, "wide.jpg")
    assert features.holds(wide) and not features.holds(small)


def test_a_model_folder_that_transformers_wrote(train, base, image_folder, cache, monkeypatch):
    """transformers 5 saves processor_config.json alone: such a folder works, and that file counts.

    Otherwise a model that somebody has merged or changed could not be trained further.
    """
    folder = image_folder / "model"
    shutil.copytree(train.MODEL_FOLDER, folder)
    (folder / "preprocessor_config.json").unlink()
    base.processor.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    monkeypatch.setattr(train, "MODEL_FOLDER", str(folder))
    [image] = inspect(train, base, image_folder, "one.jpg")
    own = train.Base(*train.load_processor(), base.device, base.dtype)
    features = train.KeptFeatures(own)
    assert train.see_images([image], features, own) == {} and features.holds(image)
    append(folder / "processor_config.json")
    assert not train.KeptFeatures(own).holds(image)


@pytest.mark.parametrize("damage", ["cut", "too long", "empty", "a folder", "only half written"])
def test_half_a_file_of_features_is_not_used(
    train, base, image_folder, cache, tower_passes, damage
):
    """A file that is not whole counts as absent, and is made anew."""
    images = inspect(train, base, image_folder, "one.jpg", "two.jpg")
    features = train.KeptFeatures(base)
    train.see_images(images, features, base)
    path = features.path(images[0])
    whole = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
        assert not features.holds(images[0])
        return
    if damage == "only half written":  # as a kill leaves it
        path.rename(path.with_name(f"{path.name}.4711.tmp"))
    else:
        path.write_bytes({"cut": whole[:-1], "too long": whole + b"x", "empty": b""}[damage])
    assert [features.holds(image) for image in images] == [False, True]
    train.see_images(images, features, base)
    assert path.read_bytes() == whole and tower_passes == [2, 1]


def test_features_cut_short_while_training(train, base, image_folder, cache):
    """A file that shrinks later is an error. Otherwise the rest would be whatever memory held."""
    images = inspect(train, base, image_folder, "one.jpg")
    features = train.KeptFeatures(base)
    train.see_images(images, features, base)
    path = features.path(images[0])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="was cut short: delete it and run again"):
        features.read(images)


def test_a_write_that_fails_leaves_nothing(train, base, image_folder, cache, monkeypatch):
    """A kill or a full disk in the middle of a write leaves neither a file nor a part of it."""
    images = inspect(train, base, image_folder, "one.jpg")
    features = train.KeptFeatures(base)

    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "replace", fail)
    with pytest.raises(SystemExit, match="can't be written .No space left on device.. What is"):
        train.see_images(images, features, base)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_disk_without_room_is_said_before_the_tower_loads(
    train, base, image_folder, cache, monkeypatch, capsys
):
    """The gigabytes are said, and a full disk stops it first. Otherwise hours end in the middle."""
    images = inspect(train, base, image_folder, "one.jpg", "two.jpg")
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(train, "load_tower", lambda base: pytest.fail("the tower was loaded"))
    with pytest.raises(SystemExit, match="Not enough disk space for"):
        train.see_images(images, train.KeptFeatures(base), base)
    assert "The vision tower has to see 2 images. Its output takes" in capsys.readouterr().out


# ---- The pass of the vision tower


def test_the_tower_sees_each_image_once(
    train, base, image_folder, cache, tower_passes, monkeypatch
):
    """Copies, links and captions of an image cost no further pass, and a second start none."""
    shutil.copy(image_folder / "one.jpg", image_folder / "one (1).jpg")
    names = ["one.jpg", "one (1).jpg", "two.jpg"]
    for make in (os.link, os.symlink):
        try:
            make(image_folder / "one.jpg", image_folder / f"{make.__name__}.jpg")
        except OSError:
            continue  # this system does not let us make links
        names.append(f"{make.__name__}.jpg")
    images = inspect(train, base, image_folder, *names)
    features = train.KeptFeatures(base)
    assert train.see_images(images * 3, features, base) == {}
    assert tower_passes == [2]
    rows = features.read(images)
    assert len({row.tobytes() for row in rows.split(16)[0].numpy()}) > 1
    assert all(torch.equal(rows[:16], part) for part in rows.split(16)[1:2] + rows.split(16)[3:])
    monkeypatch.setattr(train, "load_tower", lambda base: pytest.fail("the tower was loaded"))
    assert train.see_images(images, features, base) == {}


def test_features_do_not_depend_on_the_batch(train, exact, image_folder, tmp_path, monkeypatch):
    """TOWER_BATCH changes nothing, also where sizes differ: each image attends to itself."""
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    monkeypatch.setattr(train, "MAX_PIXELS", 20 * 28 * 28)
    names = ["one.jpg", "two.jpg", "wide.jpg", "tall.jpg"]
    save_noise(image_folder / "wide.jpg", (300, 90))
    save_noise(image_folder / "tall.jpg", (100, 300))
    images = inspect(train, exact, image_folder, *names)
    kept = []
    for size in (1, 3, 16):
        monkeypatch.setattr(train, "TOWER_BATCH", size)
        monkeypatch.setattr(train, "CACHE_FOLDER", str(tmp_path / f"cache {size}"))
        features = train.KeptFeatures(exact)
        train.see_images(images, features, exact)
        kept.append(features.read(images))
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert kept[0].shape == (
        sum(map(features.tokens, images)),
        exact.config.text_config.hidden_size,
    )


def test_a_pass_that_was_stopped_is_resumed(
    train, base, image_folder, cache, tower_passes, monkeypatch
):
    """What the tower has seen before a kill is not seen again."""
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        save_noise(image_folder / name, (60, 60))
    images = inspect(train, base, image_folder, *names)
    monkeypatch.setattr(train, "TOWER_BATCH", 2)
    features = train.KeptFeatures(base)
    write = features.write

    def write_three(image, rows):
        if sum(map(features.holds, images)) == 3:
            raise KeyboardInterrupt
        write(image, rows)

    monkeypatch.setattr(features, "write", write_three)
    with pytest.raises(KeyboardInterrupt):
        train.see_images(images, features, base)
    assert sum(map(features.holds, images)) == 3 and tower_passes == [2, 2]
    monkeypatch.setattr(features, "write", write)
    train.see_images(images, features, base)
    assert all(map(features.holds, images)) and tower_passes == [2, 2, 2]


def test_processes_share_the_images(train, base, image_folder, tmp_path, monkeypatch):
    """Each process sees its part, all learn what could not be opened, and nothing is left."""
    names = [f"{number}.png" for number in range(7)]
    for name in names:
        save_noise(image_folder / name, (60, 60))
    whole = (image_folder / "6.png").read_bytes()
    (image_folder / "6.png").write_bytes(whole[:-200])
    images = inspect(train, base, image_folder, *names)
    seen, others = [], [{"digest of another process": "its reason"}]
    monkeypatch.setattr(train, "gather_object", lambda ours: ours + others)
    for index in range(3):
        state = SimpleNamespace(process_index=index, num_processes=3)
        monkeypatch.setattr(train, "PartialState", lambda state=state: state)
        monkeypatch.setattr(train, "CACHE_FOLDER", str(tmp_path / f"cache {index}"))
        features = train.KeptFeatures(base)
        problems = train.see_images(images, features, base)
        assert problems["digest of another process"] == "its reason"
        assert (images[6].digest in problems) == (index == 0), "it is the seventh: the first's"
        seen.append([number for number in range(7) if features.holds(images[number])])
    assert seen == [[0, 3], [1, 4], [2, 5]]


def test_all_processes_share_what_the_first_one_has_found(
    train, base, image_folder, cache, monkeypatch
):
    """The list is that of process 0. Otherwise another run's files make the shares differ."""
    images = inspect(train, base, image_folder, "one.jpg", "two.jpg")
    state = SimpleNamespace(process_index=1, num_processes=2)
    monkeypatch.setattr(train, "PartialState", lambda: state)
    monkeypatch.setattr(train, "broadcast_object_list", lambda ours: [images])
    features = train.KeptFeatures(base)
    train.see_images([], features, base)
    assert [features.holds(image) for image in images] == [False, True]


def test_images_are_opened_while_the_tower_works(train, base, monkeypatch):
    """IMAGE_THREADS images are opened at once, but not all of COCO before they are needed."""
    together = threading.Barrier(train.IMAGE_THREADS, timeout=60)
    opened = []

    def prepare_pixels(image, base):
        together.wait()
        opened.append(image)

    monkeypatch.setattr(train, "prepare_pixels", prepare_pixels)
    images = list(range(50 * train.IMAGE_THREADS))
    for taken, (image, future) in enumerate(train.open_ahead(images, base), start=1):
        future.result()
        assert image == images[taken - 1]
        assert len(opened) - taken <= 2 * train.TOWER_BATCH + train.IMAGE_THREADS
    assert sorted(opened) == images


# ---- Images that can't be opened


def spoil_images(folder) -> dict[str, str]:
    """Make images whose heads are right; return why each of them can't be opened after all."""
    whole = save_noise(folder / "cut.jpg", (200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    content = save_noise(folder / "cut.bmp", (200, 200)).read_bytes()
    (folder / "cut.bmp").write_bytes(content[:-3000])
    (folder / "deep.png").write_bytes(TOO_DEEP["16 bits.png"])
    return {"cut.jpg": "truncated", "cut.bmp": "truncated", "deep.png": "more than 8 bits"}


@pytest.fixture
def six_images(train, image_folder, tmp_path, monkeypatch):
    """Six good images with their JSON as DATA_JSON; returns a function to add records to it."""
    records = []
    for number, colour in enumerate(["red", "green", "blue", "black", "white", "yellow"]):
        draw_scene(image_folder / f"{number}.jpg", "star", colour, "purple")
        records.append(about(f"{number}.jpg", f"a {colour} star"))

    def add(*more: dict) -> None:
        records.extend(more)
        write_records(image_folder / "data.json", *records)

    add()
    monkeypatch.setattr(train, "DATA_JSON", str(image_folder / "data.json"))
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    return add


def names_in(table) -> set[str]:
    return {os.path.basename(image["path"]) for row in table for image in row["images"]}


def test_images_that_cannot_be_opened_are_listed_before_the_first_step(
    train, base, image_folder, six_images, cache, capsys, monkeypatch
):
    """All are named with their reasons at once, and treated as ON_BAD_SAMPLE says.

    Otherwise each costs a start, or spoils the training hours later.
    """
    expected = spoil_images(image_folder)
    six_images(*[about(name, "an image") for name in expected])
    six_images(record(MARKER.format("0.jpg") + MARKER.format("cut.jpg"), "one of two is lost"))
    features = train.KeptFeatures(base)
    with pytest.raises(SystemExit, match="^3 .*images can't be used .*ON_BAD_SAMPLE"):
        train.prepare_data(base, features, resuming=False)
    listed = capsys.readouterr().out
    for name, reason in expected.items():
        [line] = [line for line in listed.splitlines() if str(image_folder / name) in line]
        assert "can't be opened: " in line and reason in line
    monkeypatch.setattr(train, "ON_BAD_SAMPLE", "drop")
    tables = train.prepare_data(base, features, resuming=False)
    assert "images can't be used" in capsys.readouterr().out
    assert names_in(tables["train"]) | names_in(tables["test"]) == {f"{n}.jpg" for n in range(6)}
    assert names_in(tables["train"]).isdisjoint(names_in(tables["test"]))
    assert sum(map(len, tables["train"]["answers"])) == 5


def test_held_out_images_that_cannot_be_opened_are_not_scored(
    train, base, image_folder, six_images, cache, monkeypatch
):
    """A lost image of TEST_JSON is left out. Otherwise a grey square would be scored."""
    spoil_images(image_folder)
    draw_scene(image_folder / "own.jpg", "circle", "red", "blue")
    test = [about("own.jpg", "a red circle"), about("cut.jpg", "half an image")]
    path = write_records(image_folder / "test.json", *test)
    monkeypatch.setattr(train, "TEST_JSON", str(path))
    with pytest.raises(SystemExit, match="^1 .*images can't be used"):
        train.prepare_data(base, train.KeptFeatures(base), resuming=False)
    monkeypatch.setattr(train, "ON_BAD_SAMPLE", "drop")
    tables = train.prepare_data(base, train.KeptFeatures(base), resuming=False)
    assert names_in(tables["test"]) == {"own.jpg"} and len(names_in(tables["train"])) == 6
    questions = train.held_out_questions(tables["test"])
    assert [question["references"] for question in questions] == [["a red circle"]]


def test_an_image_that_changes_between_check_and_pass_is_not_learned(
    train, base, image_folder, cache, tower_passes
):
    """The tower sees what was inspected, or nothing: a file replaced meanwhile is refused."""
    images = inspect(train, base, image_folder, "one.jpg", "two.jpg")
    draw_scene(image_folder / "one.jpg", "square", "green", "white")
    features = train.KeptFeatures(base)
    [(digest, problem)] = train.see_images(images, features, base).items()
    assert digest == images[0].digest and "has changed since it was inspected" in problem
    assert [features.holds(image) for image in images] == [False, True] and tower_passes == [1]


def test_what_is_left_is_learned_as_if_alone(train, exact, image_folder, cache, monkeypatch):
    """Records without their image change nothing in what the others teach."""
    monkeypatch.setattr(train, "ON_BAD_SAMPLE", "drop")
    spoil_images(image_folder)
    good = [about("one.jpg", "a red star"), about("two.jpg", "a small circle")]
    alone = make_samples(train, exact, image_folder, *good)
    path = write_records(image_folder / "data.json", good[0], about("cut.jpg", "x"), good[1])
    examples = train.read_examples(str(path), exact)
    images = [image for example in examples for image in example.images]
    problems = train.see_images(images, train.KeptFeatures(exact), exact)
    left = train.gather_samples(train.drop_unseen(examples, problems)).to_list()
    assert left == alone
