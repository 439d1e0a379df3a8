"""csv2json.py: what it must carry over untouched, what it must refuse, and what it must leave alone."""

import csv
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path

import pytest
from conftest import TESTS, command, run_and_stop, run_script, variables
from PIL import Image
from support import launch

AWKWARD = [
    'A sign says "STOP", and a man\'s dog, it seems, stops.',
    "厨房里有一张桌子，上面放着一盘水果。",
    "two dogs 🐕🐕 on a beach 🏖️",
    "first line\nsecond line\r\nthird line\n\nfifth\nsixth\nseventh",
    "None",
    "NA",
    "007",
    "tab\there, back\\slash, <b>not a token</b>, a | b, <|>",
    "no\u00a0break\u200bzero width \u2028 line separator",
    "/" * 1_000_000,
]


GUARD = {"PYTHONPATH": str(TESTS / "support/guard")}


def picture(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 40).convert(mode).save(path)
    return path


def table(path: Path, rows: list[tuple], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([("image_path", "caption"), *rows])
    return path


def run(folder: Path, **constants):
    return run_script("csv2json.py", folder, GUARD, **constants)


def convert(folder: Path, **constants) -> list[dict]:
    done = run(folder, **constants)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(
        (folder / constants.get("JSON_PATH", "data_vl.json")).read_text(encoding="utf-8")
    )


def refusal(folder: Path, **constants) -> str:
    """The one sentence on stderr with which the script ended; nothing of the JSON was written."""
    done = run(folder, **constants)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(folder.glob("data_vl.json*"))
    return done.stderr.splitlines()[-1]


def paths(records: list[dict]) -> list[str]:
    questions = [record["conversations"][0]["value"] for record in records]
    return [
        question.partition("<|vision_start|>")[2].removesuffix("<|vision_end|>")
        for question in questions
    ]


def test_the_documented_record(folder):
    """A renamed key, another prompt or an id from 0 breaks what reads the format; escaped Chinese is for no eyes."""
    picture(folder / "coco_2014_caption/1.jpg")
    table(
        folder / "coco-2024-dataset.csv",
        [("coco_2014_caption/1.jpg", "A modern kitchen done in white.")],
    )
    question = "请描述这张图片: <|vision_start|>coco_2014_caption/1.jpg<|vision_end|>"
    answer = "A modern kitchen done in white."
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    assert convert(folder) == [{"id": "identity_1", "conversations": turns}]
    written = (folder / "data_vl.json").read_text(encoding="utf-8")
    assert written.startswith('[\n  {\n    "id": "identity_1",\n') and "请描述这张图片" in written


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_survive(folder, encoding):
    """Readers that guess turn "None" into a missing value, "007" into 7, \\r\\n into \\n, and trip over Excel's BOM."""
    picture(folder / "a.jpg")
    table(folder / "coco-2024-dataset.csv", [("a.jpg", caption) for caption in AWKWARD], encoding)
    records = convert(folder)
    assert [record["conversations"][1]["value"] for record in records] == AWKWARD
    assert [record["id"] for record in records] == [
        f"identity_{number}" for number in range(1, len(AWKWARD) + 1)
    ]


def test_ends_are_stripped_and_repeats_dropped(folder):
    """A blank before <|im_end|> is learnt as part of the answer; a row that stands twice is learnt twice."""
    picture(folder / "a.jpg")
    rows = [("a.jpg", " a dog \r\n"), ("./a.jpg", "a dog"), ("a.jpg", "A dog")]
    table(folder / "coco-2024-dataset.csv", rows)
    done = run(folder)
    records = json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))
    assert [record["conversations"][1]["value"] for record in records] == ["a dog", "A dog"]
    assert [record["id"] for record in records] == ["identity_1", "identity_2"]
    assert "NOT USED: 1 rows, same picture and same caption" in done.stdout


def test_what_the_summary_says(folder):
    """A summary that counts rows as pictures hides that a table has one caption a picture instead of five."""
    picture(folder / "a.jpg")
    picture(folder / "b.png")
    table(
        folder / "coco-2024-dataset.csv",
        [("a.jpg", "a dog"), ("a.jpg", "one two three four"), ("b.png", "a cat b")],
    )
    said = run(folder).stdout
    assert "2 pictures, 3 captions, 1.50 captions a picture" in said
    assert "2 to 4 words a caption, mean 3.0" in said
    assert "3 conversations written to data_vl.json" in said


FILES = {
    "gbk": ("image_path,caption\na.jpg,一只狗\n".encode("gbk"), "not UTF-8"),
    "utf-16": ("image_path,caption\na.jpg,dog\n".encode("utf-16"), "not UTF-8"),
    "utf-16 unmarked": ("image_path,caption\na.jpg,dog\n".encode("utf-16-le"), r"['i\x00m\x00a"),
    "other columns": (b"path,text\na.jpg,dog\n", "has the columns ['path', 'text'];"),
    "semicolons": (b"image_path;caption\na.jpg;dog\n", "has the columns ['image_path;caption'];"),
    "only a header": (b"image_path,caption\n", "no row below its header"),
    "empty": (b"", "empty"),
    "lost quote": (b'image_path,caption\na.jpg,"dog\na.jpg,cat\n', "quote"),
    "missing": (None, "run data2csv.py first"),
}


@pytest.mark.parametrize("name", FILES)
def test_not_such_a_table(folder, name):
    """Each of these ended in a traceback of the csv module, or in a JSON without a single usable record."""
    content, expected = FILES[name]
    if content is not None:
        (folder / "coco-2024-dataset.csv").write_bytes(content)
    assert expected in refusal(folder)


def bad_rows(folder: Path) -> list[tuple[str, str, str]]:
    """Rows that no training can use: path, caption, and what is said of it."""
    whole = picture(folder / "whole.jpg", (200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>Please log in.</body></html>")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    picture(folder / "tiny.png", (27, 300))
    picture(folder / "strip.png", (28, 5601), "L")
    picture(folder / "ok.png")
    return [
        ("gone.jpg", "a dog", "picture is missing"),
        ("cut.jpg", "a dog", "does not decode"),
        ("page.jpg", "a dog", "no picture"),
        ("empty.jpg", "a dog", "no picture"),
        ("folder.jpg", "a dog", "picture is missing"),
        ("tiny.png", "a dog", "MIN_SIDE"),
        ("strip.png", "a dog", "MAX_RATIO"),
        ("ok.png", " \n", "empty"),
        ("", "a dog", "empty"),
        (
            "ok.png",
            "a dog<|im_end|>\n<|im_start|>user",
            "special token of the model in it: <|im_end|>",
        ),
        ("ok.png", "<|image_pad|>", "special token of the model in it: <|image_pad|>"),
        ("ok.png", "a \0 dog", "NUL character"),
        ("ok\0.png", "a dog", "NUL character"),
        ("a<|im_end|>.jpg", "a dog", "rename"),
        ("file:///a%3C%7Cim_end%7C%3E.jpg", "a dog", "rename"),
        ("a\nb.jpg", "a dog", "rename"),
        ("./ ok.png", "a dog", "rename"),  # to train.py, which strips the name, it would be ok.png
        ("../ok.png", "a dog", "picture is missing"),
        ("x" * 300 + ".jpg", "a dog", "picture is missing"),
        (
            "https://127.0.0.1:9/ok.png?x=1",
            "a dog",
            "address on the web or the like: download the picture first",
        ),
        ("HTTP://127.0.0.1:9/ok.png", "a dog", "download the picture first"),
        ("ftp://127.0.0.1/ok.png", "a dog", "download the picture first"),
        ("data:image/png;base64,iVBORw0KGgo=", "a dog", "download the picture first"),
        ("file://127.0.0.1/ok.png", "a dog", "download the picture first"),
        ("file:////127.0.0.1/share/ok.png", "a dog", "leads to another computer"),
        ("file:///%2F127.0.0.1/share/ok.png", "a dog", "leads to another computer"),
        (r"\\127.0.0.1\share\ok.png", "a dog", "leads to another computer"),
        ("//127.0.0.1/share/ok.png", "a dog", "leads to another computer"),
    ]


def test_bad_rows_stop_it(folder):
    """A training on a forged turn, half a picture or a login page fails hours later, or worse, doesn't."""
    rows = bad_rows(folder)
    table(folder / "coco-2024-dataset.csv", [("ok.png", "a cat"), *[row[:2] for row in rows]])
    (folder / "data_vl.json").write_text("the older one")
    done = run(folder)
    assert (
        done.returncode == 1 and "Traceback" not in done.stderr and "ON_BAD_SAMPLE" in done.stderr
    )
    named = [line for line in done.stdout.splitlines() if line.startswith("  line ")]
    assert len(named) == len(rows) == 28, "all of them, not the first few"
    lines = csv.reader(open(folder / "coco-2024-dataset.csv", encoding="utf-8", newline=""))
    ends = {tuple(row): lines.line_num for row in lines}
    for line, (path, caption, reason) in zip(named, rows, strict=True):
        assert f"line {ends[path, caption]}, " in line and reason in line
        assert repr(path[:100]) in line or "picture is missing" in reason
    assert (folder / "data_vl.json").read_text() == "the older one"
    assert not (folder / "data_vl.json.tmp").exists()


def test_bad_rows_dropped(folder):
    """ "drop" that drops silently, or leaves holes in the ids, is how a data set shrinks without anyone knowing."""
    rows = bad_rows(folder)
    table(
        folder / "coco-2024-dataset.csv",
        [("ok.png", "a cat"), *[row[:2] for row in rows], ("ok.png", "two cats")],
    )
    done = run(folder, ON_BAD_SAMPLE="drop")
    records = json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == ["identity_1", "identity_2"]
    assert [record["conversations"][1]["value"] for record in records] == ["a cat", "two cats"]
    assert done.stdout.count("  line ") == 28 and "28 of 30 rows" in done.stdout
    assert "NOT USED: 2 rows, caption has a special token of the model in it" in done.stdout


def test_nothing_left(folder):
    """An empty JSON would end the training with a division by zero."""
    table(folder / "coco-2024-dataset.csv", [("gone.jpg", "a dog")])
    assert "not one row" in refusal(folder, ON_BAD_SAMPLE="drop")


def test_a_comma_without_quotes(folder):
    """pandas took the path for an index and the caption's second half for the caption."""
    picture(folder / "a.jpg")
    (folder / "coco-2024-dataset.csv").write_text(
        "image_path,caption\na.jpg,red car, blue sky\na.jpg,a car\n"
    )
    done = run(folder)
    assert done.returncode == 1 and "line 2, 'a.jpg': more fields than columns" in done.stdout


def test_extra_columns_are_ignored(folder):
    """Tables of one's own have more columns than two, in any order."""
    picture(folder / "a.jpg")
    (folder / "coco-2024-dataset.csv").write_text("licence,caption,image_path\nCC0,a car,a.jpg\n")
    assert paths(convert(folder)) == ["a.jpg"]


def test_other_folders(folder):
    """Relative paths count from the folder of the file that names them, so they differ from the CSV to the JSON."""
    picture(folder / "mine/pictures/a b.jpg")
    absolute = picture(folder / "elsewhere/c.jpg")
    rows = [("pictures/a b.jpg", "a dog"), (r"pictures\a b.jpg", "a cat"), (str(absolute), "a cow")]
    table(folder / "mine/table.csv", rows)
    records = convert(folder, CSV_PATH="mine/table.csv", JSON_PATH="out/deep/data.json")
    assert paths(records) == [
        "../../mine/pictures/a b.jpg",
        "../../mine/pictures/a b.jpg",
        str(absolute),
    ]


def test_file_addresses(folder):
    """file:/// is a path like any other, with its %20; it opened nothing where it was taken for a relative path."""
    inside = picture(folder / "a b.jpg")
    table(folder / "coco-2024-dataset.csv", [(inside.as_uri(), "a dog")])
    assert "a%20b.jpg" in inside.as_uri()
    assert paths(convert(folder)) == [inside.as_posix()]
    table(folder / "coco-2024-dataset.csv", [("file:///not/here.jpg", "a dog")])
    assert "picture is missing: /not/here.jpg" in run(folder).stdout


def test_pictures_outside(folder, training, monkeypatch):
    """train.py refuses every picture that lies outside of IMAGE_FOLDERS: to be told there is an hour too late."""
    train, collator = training
    within = [picture(folder / "data/pictures/a.jpg"), picture(folder / "data/b.jpg")]
    outside = [
        picture(folder / f"photos/{name}.jpg") for name in ("1/c", "1/d", "2/e", "3/f", "4/g")
    ]
    table(folder / "table.csv", [(str(path), "a dog") for path in within])
    constants = {"CSV_PATH": "table.csv", "JSON_PATH": "data/data_vl.json"}
    assert "IMAGE_FOLDERS" not in run(folder, **constants).stdout
    rows = [(path.relative_to(folder), "a dog") for path in within + outside]
    table(folder / "table.csv", [*rows, (str(outside[0]), "a cat")])
    [told] = [
        line for line in run(folder, **constants).stdout.splitlines() if "IMAGE_FOLDERS" in line
    ]
    named = [(folder / "photos" / name).as_posix() for name in "123"]
    assert told.startswith(
        "IMAGE_FOLDERS in train.py has to name these, too (4 in all)"
    ) and told.endswith(f": {named}")
    monkeypatch.setattr(train, "DATA_JSON", str(folder / "data/data_vl.json"))
    records = json.loads((folder / "data/data_vl.json").read_text(encoding="utf-8"))

    def refused() -> list[str]:
        reasons = []
        for path, record in zip(paths(records), records, strict=True):
            try:
                train.parse_record(record, collator.processor)
            except ValueError as reason:
                reasons.append((path.split("/")[-2], "IMAGE_FOLDERS" in str(reason)))
        return reasons

    train.locate_picture.cache_clear()
    assert refused() == [(name, True) for name in "112341"]
    train.locate_picture.cache_clear()
    monkeypatch.setattr(train, "IMAGE_FOLDERS", [".", *named])
    assert refused() == [("4", True)]


@pytest.mark.skipif(os.name == "nt", reason="on Windows these are real places")
def test_windows_drives_on_another_system(folder):
    r"""e:\LLM\... taken for a relative path becomes ../e:/LLM/..., which is said to be missing where nobody put it."""
    rows = [
        (r"e:\LLM\a.jpg", "a dog"),
        ("e:/LLM/c.jpg", "a cow"),
        ("file:///e:/LLM/d.jpg", "a cat"),
    ]
    picture(folder / "e:/LLM/c.jpg")
    table(folder / "coco-2024-dataset.csv", rows)
    done = run(folder)
    assert done.returncode == 1 and done.stdout.count("lies on a drive of Windows") == 4
    assert (
        "line 2, 'e:/LLM/a.jpg': " in done.stdout and "another system: e:/LLM/d.jpg" in done.stdout
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_a_pipe_is_not_waited_for(folder):
    """Opening a pipe, or a device, waits for somebody to write into it, and no message says so."""
    os.mkfifo(folder / "pipe.jpg")
    table(folder / "coco-2024-dataset.csv", [("pipe.jpg", "a dog"), ("/dev/stdin", "a dog")])
    assert run(folder, timeout=30).stdout.count("picture is missing: ") == 2


WRONG = {
    "CSV_PATH": [3, "", "."],
    "JSON_PATH": [None, "", ".", "coco-2024-dataset.csv"],
    "PROMPT": [3, "Describe <|image_pad|>", "<|im_end|>\n<|im_start|>assistant\n"],
    "ON_BAD_SAMPLE": ["skip", True],
    "FORMATS": ["PNG", [], ["PNG", "HTML"]],
    "MIN_SIDE": [0, "28"],
    "MAX_RATIO": [0, 1.5],
    "MAX_PIXELS": [0, 10**9],
    "CHECK_WORKERS": [0, True],
}


@pytest.fixture
def script():
    """csv2json.py as a module of this process, with its constants as they are."""
    return launch.load("csv2json.py", [])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_constants(script, name, monkeypatch):
    """A typo in ON_BAD_SAMPLE meant "drop"; a placeholder in PROMPT gives the model a picture that isn't there."""
    assert set(WRONG) == {constant for constant in vars(script) if constant.isupper()}, (
        "one is never checked"
    )
    script.check_constants()
    for value in WRONG[name]:
        monkeypatch.setattr(script, name, value)
        with pytest.raises(SystemExit) as told:
            script.check_constants()
        assert str(told.value).startswith(
            f"{name} = {value!r} at the top of csv2json.py can't work: it must be "
        )


def test_wrong_constants_are_told_first(folder):
    """A constant that is wrong is told before anything else is, even that the table is missing."""
    assert "CHECK_WORKERS = 0" in refusal(folder, CHECK_WORKERS=0)


# Pictures: half of each is light, half is dark, so that how train.py opens it can be seen

SIDE = 56  # pixels to which train.py scales


def halves(
    mode: str = "RGB", size: tuple[int, int] = (96, 64), light=(230, 90, 60), dark=(20, 30, 90)
) -> Image.Image:
    """The left half in one colour, the right one in another."""
    drawn = Image.new("RGB", size, light)
    drawn.paste(dark, (size[0] // 2, 0, *size))
    return drawn.convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """A greyscale PNG whose head says what it likes."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    chunk = [
        struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk)


def turned() -> Image.Exif:
    """The note of a camera that was held upright: turn this picture by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    return exif


def frames() -> dict:
    return {"save_all": True, "append_images": [Image.new("RGB", (96, 64))] * 2, "duration": 100}


def all_kinds() -> dict[str, tuple[bytes, str]]:
    """Files by name: their bytes, and why they are refused ("": they are accepted)."""
    photo = Image.effect_noise((200, 200), 40).convert("RGB")
    sideways = saved(halves().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned())
    transparent = halves("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    unknown_type = sideways.replace(
        b"\x01\x0f\x00\x02", b"\x01\x3d\x00\x02"
    )  # text where a number is due
    assert unknown_type != sideways
    return {
        "plain.jpg": (saved(halves(), "JPEG"), ""),
        "plain.bmp": (saved(halves(), "BMP"), ""),
        "plain.tif": (saved(halves(), "TIFF"), ""),
        "cmyk.jpg": (saved(halves("CMYK"), "JPEG"), ""),
        "greyscale.jpg": (saved(halves("L"), "JPEG"), ""),
        "black and white.png": (
            saved(halves("L", dark=(0, 0, 0), light=(255, 255, 255)).convert("1"), "PNG"),
            "",
        ),
        "palette.png": (saved(halves("P"), "PNG"), ""),
        "palette, transparent.png": (saved(halves("P"), "PNG", transparency=0), ""),
        "palette, transparent bytes.png": (
            saved(halves("P"), "PNG", transparency=bytes(range(256))),
            "",
        ),
        "grey, transparent.png": (saved(halves("LA"), "PNG"), ""),
        "half transparent.png": (saved(transparent, "PNG"), ""),
        "sideways.jpg": (sideways, ""),
        "sideways.png": (
            saved(halves().transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned()),
            "",
        ),
        "sideways.webp": (
            saved(halves().transpose(Image.Transpose.ROTATE_90), "WEBP", exif=turned()),
            "",
        ),
        "moving.gif": (saved(halves(), "GIF", **frames()), ""),
        "moving.webp": (saved(halves(), "WEBP", **frames()), ""),
        "moving.png": (saved(halves(), "PNG", **frames()), ""),
        "two in one.jpg": (
            saved(halves(), "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))]),
            "",
        ),
        "a png.jpg": (saved(halves(), "PNG"), ""),
        "nothing.jpg": (b"", "file is no picture of FORMATS, whatever its name says: 0 bytes"),
        "page.jpg": (
            b"<!DOCTYPE html><html>Please log in.</html>",
            "file is no picture of FORMATS",
        ),
        "cut.jpg": (saved(photo, "JPEG")[:-3000], "picture does not decode: "),
        "cut.png": (saved(photo, "PNG")[:-3000], "picture does not decode: "),
        "cut.webp": (saved(photo, "WEBP")[:-300], "picture does not decode: "),
        "exif.jpg": (unknown_type, "picture does not decode: "),
        "program.jpg": (saved(halves(), "EPS"), "file is no picture of FORMATS"),
        "dot.png": (saved(halves(size=(1, 1)), "PNG"), "MIN_SIDE, MAX_RATIO or MAX_PIXELS: 1x1"),
        "strip.png": (
            saved(halves(size=(10_000, 10)), "PNG"),
            "MIN_SIDE, MAX_RATIO or MAX_PIXELS: 10000x10",
        ),
        "ratio.png": (
            saved(halves(size=(5601, 28)), "PNG"),
            "MIN_SIDE, MAX_RATIO or MAX_PIXELS: 5601x28",
        ),
        "bomb.png": (
            png(20_000, 15_000, b"decoded"),
            "MIN_SIDE, MAX_RATIO or MAX_PIXELS: 20000x15000",
        ),
        "16 bits.png": (
            saved(Image.new("I;16", (96, 64), 9000), "PNG"),
            "more than 8 bits a colour",
        ),
        "32 bits.tif": (saved(Image.new("I", (96, 64), 9000), "TIFF"), "more than 8 bits a colour"),
        "numbers.tif": (saved(Image.new("F", (96, 64), 0.5), "TIFF"), "more than 8 bits a colour"),
    }


KINDS = all_kinds()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """All kinds of pictures through csv2json.py at once: what it said, and the folder with the JSON."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (content, _) in KINDS.items():
        (folder / name).write_bytes(content)
    table(folder / "coco-2024-dataset.csv", [(name, f"a picture, {name}") for name in KINDS])
    return run(folder, ON_BAD_SAMPLE="drop"), folder


@pytest.fixture(scope="module")
def training():
    """train.py as a module, with the small model's processor: its own way to open a picture."""
    train = launch.load(
        "train.py",
        [f"MODEL_FOLDER={json.dumps(str(TESTS / 'support/tiny_qwen2vl'))}", f"IMAGE_SIZE={SIDE}"],
    )
    return train, train.CaptionCollator(*train.load_processor())


@pytest.mark.parametrize("name", [name for name, (_, reason) in KINDS.items() if reason])
def test_pictures_that_are_refused(converted, name):
    """Guards the training's first epoch: each of these ends it in the middle, spoils it, or takes the memory."""
    done, folder = converted
    [line] = [line for line in done.stdout.splitlines() if f", {name!r}: " in line]
    assert KINDS[name][1] in line
    assert name not in paths(json.loads((folder / "data_vl.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", [name for name, (_, reason) in KINDS.items() if not reason])
def test_pictures_that_are_accepted_are_opened_by_the_training(
    converted, training, monkeypatch, name
):
    """Guards the agreement of the two scripts: accepted here; upright, light left and dark right there."""
    (_, folder), (train, collator) = converted, training
    monkeypatch.setattr(train, "DATA_JSON", str(folder / "data_vl.json"))
    records = json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))
    record = dict(zip(paths(records), records, strict=True))[name]
    parsed = train.parse_record(record, collator.processor)
    [(path, *size)] = parsed["pictures"]
    opened = collator.open_picture(path, size)
    assert opened.mode == "RGB" and opened.size == (SIDE, SIDE)
    light, dark = (sum(opened.getpixel((x, SIDE // 4))) for x in (SIDE // 8, SIDE * 7 // 8))
    assert light > dark + 30, (light, dark)
    if name.startswith(("plain", "sideways", "a png", "two", "moving")):
        red, green, blue = opened.getpixel((SIDE // 8, SIDE * 3 // 4))
        assert (abs(red - 230) + abs(green - 90) + abs(blue - 60)) < 60, (red, green, blue)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    "name", ["a.jpg", "sub\\b.jpg", "./sub/../a.jpg", "../outside.jpg", "ABSOLUTE", "FILE"]
)
def test_both_scripts_find_the_same_file(folder, training, monkeypatch, tmp_path, name, linked):
    """Guards the way from the CSV's folder to the JSON's, links between them included, by opening the file there."""
    train, collator = training
    picture(folder / "mine/a.jpg", (60, 60))
    picture(folder / "mine/sub/b.jpg", (61, 60))
    picture(folder / "outside.jpg", (62, 60))
    if linked:
        try:
            (folder / "out").mkdir()
            (folder / "mine").rename(tmp_path / "moved")
            (folder / "outside.jpg").rename(tmp_path / "outside.jpg")
            os.symlink(tmp_path / "moved", folder / "mine", target_is_directory=True)
        except OSError:
            pytest.skip("this system does not let us make links")
    absolute = folder / "mine/a.jpg"
    name = {"ABSOLUTE": str(absolute), "FILE": absolute.as_uri()}.get(name, name)
    table(folder / "mine/table.csv", [(name, "a dog")])
    [record] = convert(folder, CSV_PATH="mine/table.csv", JSON_PATH="out/data.json")
    monkeypatch.setattr(train, "DATA_JSON", str(folder / "out/data.json"))
    monkeypatch.setattr(train, "IMAGE_FOLDERS", [str(folder), str(tmp_path)])
    [(found, *_)] = train.parse_record(record, collator.processor)["pictures"]
    expected = (
        folder
        / "mine"
        / ("sub/b.jpg" if "b.jpg" in name else "../outside.jpg" if "outs" in name else "a.jpg")
    )
    assert os.path.samefile(found, expected)


# The disk, and the end of a run


@pytest.mark.parametrize("kind", ["the folder is a file", "the part file is a folder"])
def test_no_place_for_the_json(folder, kind):
    """That the JSON can't be written was told, as a traceback, when all pictures had been decoded."""
    picture(folder / "a.jpg")
    table(folder / "coco-2024-dataset.csv", [("a.jpg", "a dog")])
    if kind == "the folder is a file":
        (folder / "out").write_text("a file")
    else:
        (folder / "out/data.json.tmp").mkdir(parents=True)
    told = refusal(folder, JSON_PATH="out/data.json")
    assert "out/data.json can't be written" in told and "set JSON_PATH to another place" in told
    assert "checking" not in run(folder, JSON_PATH="out/data.json").stderr


def test_the_json_is_open_in_another_program(folder, script, monkeypatch):
    """Windows refuses to replace a file that another program has open; that was a traceback, and a stray file."""
    picture(folder / "a.jpg")
    table(folder / "coco-2024-dataset.csv", [("a.jpg", "a dog")])
    (folder / "data_vl.json").write_text("the older one")
    monkeypatch.chdir(folder)

    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(script.os, "replace", refuse)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(script.sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(
        SystemExit,
        match="(?s)data_vl.json can't be written.*Access is denied.*close what has it open",
    ):
        script.main()
    assert (folder / "data_vl.json").read_text() == "the older one"
    assert not (folder / "data_vl.json.tmp").exists()


@pytest.mark.skipif(os.name == "nt", reason="limits of this kind are POSIX")
def test_the_disk_is_full(folder):
    """A full disk ended in a traceback and left half a file beside the JSON, on the very disk that was full."""
    import resource

    picture(folder / "a.jpg")
    table(folder / "coco-2024-dataset.csv", [("a.jpg", f"{number} dogs") for number in range(2000)])
    (folder / "data_vl.json").write_text("the older one")
    done = subprocess.run(
        command("csv2json.py"),
        cwd=folder,
        env=variables({**GUARD, "PYTHONDONTWRITEBYTECODE": "1"}),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("data_vl.json can't be written") and "make room on the disk" in told
    assert (folder / "data_vl.json").read_text() == "the older one"
    assert not (folder / "data_vl.json.tmp").exists()


@pytest.fixture
def work(folder):
    """A table that takes some seconds: large pictures under many names, and many captions to write down."""
    large = picture(folder / "large.jpg", (1000, 1000))
    for number in range(150):
        os.link(large, folder / f"{number}.jpg")
    table(
        folder / "coco-2024-dataset.csv",
        [(f"{n % 150}.jpg", f"{n} dogs on a beach") for n in range(30_000)],
    )
    return folder


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are POSIX")
def test_killed_at_any_moment(work):
    """Half a JSON, or an older one taken for the new one, would be trained on without a word."""
    start = time.monotonic()
    assert run(work).returncode == 0
    whole, seconds = (work / "data_vl.json").read_bytes(), time.monotonic() - start
    killed, moments = 0, random.Random(5)
    for number in range(20):
        (work / "data_vl.json").write_bytes(b"the older one")
        done = run_and_stop("csv2json.py", work, GUARD, moments.uniform(0.05, seconds))
        killed += done.returncode == -signal.SIGKILL
        assert (work / "data_vl.json").read_bytes() in (b"the older one", whole), f"moment {number}"
    assert killed >= 10, "most of the moments should fall into the run"
    assert run(work).returncode == 0
    assert (work / "data_vl.json").read_bytes() == whole
    assert not (work / "data_vl.json.tmp").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [1.2, 1.6, 2.0])
def test_stopped_while_the_threads_decode(folder, sent, seconds):
    """Ctrl-C showed a page of traceback, and only when all pictures that were waiting had been decoded, too."""
    large = folder / "0.png"
    Image.new("L", (9000, 9000)).save(large)  # some tenths of a second each
    for number in range(1, 300):
        os.link(large, folder / f"{number}.png")
    table(folder / "coco-2024-dataset.csv", [(f"{number}.png", "a dog") for number in range(300)])
    (folder / "data_vl.json").write_text("the older one")
    start = time.monotonic()
    done = run_and_stop("csv2json.py", folder, GUARD, seconds, sent)
    assert time.monotonic() - start < seconds + 2
    assert done.returncode == 128 + sent and "Traceback" not in done.stderr, done.stderr
    assert (
        done.stderr.splitlines()[-1] == "Stopped. No file is half written: run again to start over."
    )
    assert (folder / "data_vl.json").read_text() == "the older one"
    table(folder / "coco-2024-dataset.csv", [("0.png", "a dog")])
    assert len(convert(folder)) == 1 and not (folder / "data_vl.json.tmp").exists()


def test_speed(folder):
    """Guards the hours: 82,783 pictures of COCO's size, decoded to the last byte, have to be a matter of minutes."""
    photo = picture(folder / "photo.jpg", (640, 480))
    for number in range(600):
        shutil.copy(photo, folder / f"{number}.jpg")
    table(folder / "coco-2024-dataset.csv", [(f"{number}.jpg", "a dog") for number in range(600)])
    start = time.monotonic()
    assert len(convert(folder)) == 600
    assert time.monotonic() - start < 2 + 1  # 300 a second, and a second for Python to start
