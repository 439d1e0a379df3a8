"""csv2json.py: what it carries over untouched, what it refuses, and what it leaves alone."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import TESTS, command, posix, variables
from PIL import Image
from support import launch
from support.fork_runner import shared_runner

GUARD = {"PYTHONPATH": str(TESTS / "support/guard")}
CSV = "coco-2024-dataset.csv"
JSON = "data_vl.json"
PROMPT = "请描述这张图片: "


def save_image(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Path:
    """Save noise, so that no two images have the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 40).convert(mode).save(path)
    return path


def write_table(path: Path, rows: list[tuple], encoding: str = "utf-8") -> Path:
    """Write a CSV whose rows have an image_path, a caption and perhaps a question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["image_path", "caption", "question"][: len(rows[0])]
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def run(folder: Path, **constants) -> subprocess.CompletedProcess:
    return shared_runner("csv2json.py")(folder, GUARD, **constants)


def convert(folder: Path, **constants) -> list[dict]:
    """Run the script, and return the records of the JSON."""
    done = run(folder, **constants)
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / constants.get("DATA_JSON", JSON)
    return json.loads(path.read_text(encoding="utf-8"))


def refusal(folder: Path, **constants) -> str:
    """Return the one sentence on stderr with which the script ended without writing a JSON."""
    done = run(folder, **constants)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(folder.glob(f"{JSON}*"))
    return done.stderr.splitlines()[-1]


def reason(folder: Path, path: str, caption: str = "a dog", question: str = "") -> str:
    """Return why the only row of a table is refused."""
    write_table(folder / CSV, [(path, caption, question)])
    done = run(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    [listed] = listed_rows(done.stdout)
    return listed.partition("': ")[2] or listed.partition('": ')[2]


def listed_rows(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("  line ")]


def captions(records: list[dict]) -> list[str]:
    return [record["conversations"][1]["value"] for record in records]


def questions(records: list[dict]) -> list[str]:
    """Return what the user says before the image."""
    asked = [record["conversations"][0]["value"] for record in records]
    return [text.partition("<|vision_start|>")[0] for text in asked]


def paths(records: list[dict]) -> list[str]:
    asked = [record["conversations"][0]["value"] for record in records]
    marked = [text.partition("<|vision_start|>")[2] for text in asked]
    return [text.removesuffix("<|vision_end|>") for text in marked]


@pytest.fixture
def script():
    """csv2json.py as a module of this process, with its constants as they are."""
    return launch.load("csv2json.py", [])


@pytest.fixture
def run_here(script, folder, monkeypatch) -> Callable[[], None]:
    """main() of `script` in `folder`, which leaves this process's signals alone."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    return script.main


# ---- What is written

AWKWARD = [
    'A sign says "STOP", and a man\'s dog, it seems, stops.',
    "厨房里有一张桌子，上面放着一盘水果。",
    "two dogs 🐕🐕 on a beach 🏖️",
    "first line\nsecond line\r\nthird line\n\nfifth\nsixth\nseventh",
    "None",
    "NA",
    "nan",
    "null",
    "007",
    "tab\there, back\\slash, <b>not a token</b>, a | b, <|>",
    "no\u00a0break\u200bzero width \u2028 line separator",
    "\ufeffa byte order mark and a zero-width space\u200b",
    "“smart quotes” and ‘single’ ones; a semicolon",
    "\ue000",
    "\U0001fae8",
    "/" * 1_000_000,
]


def test_the_documented_record(folder):
    """The JSON has the documented form. Otherwise no other program can read it."""
    save_image(folder / "coco_2014_caption/1.jpg")
    answer = "A modern kitchen done in white."
    write_table(folder / CSV, [("coco_2014_caption/1.jpg", answer)])
    question = "请描述这张图片: <|vision_start|>coco_2014_caption/1.jpg<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    assert convert(folder) == [{"id": "identity_1", "conversations": turns}]
    written = (folder / JSON).read_bytes().decode("utf-8")
    assert written.startswith('[\n  {\n    "id": "identity_1",\n') and "\r" not in written
    assert "请描述这张图片" in written, "readable, not escaped"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_survive(folder, encoding):
    r"""Captions arrive letter for letter. Otherwise "None" goes missing and "007" becomes 7."""
    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", caption) for caption in AWKWARD], encoding)
    records = convert(folder)
    assert captions(records) == AWKWARD
    numbers = range(1, len(AWKWARD) + 1)
    assert [record["id"] for record in records] == [f"identity_{number}" for number in numbers]


def test_ends_are_stripped_and_repeats_dropped(folder):
    """Blanks at the ends go, and repeats with them. Otherwise a model learns to say them."""
    save_image(folder / "a.jpg")
    rows = [("a.jpg", " a dog \r\n"), ("./a.jpg ", "a dog"), ("a.jpg", "A dog")]
    write_table(folder / CSV, rows)
    done = run(folder)
    records = json.loads((folder / JSON).read_text(encoding="utf-8"))
    assert captions(records) == ["a dog", "A dog"]
    assert [record["id"] for record in records] == ["identity_1", "identity_2"]
    assert "Rows not used: 1 (same image, question and caption" in done.stdout


def test_a_question_takes_the_place_of_the_prompt(folder):
    """A row may ask its own question; with equal image and caption it is another row then."""
    save_image(folder / "a.jpg")
    rows = [
        ("a.jpg", "red", "What colour, is it? "),
        ("a.jpg", "red", ""),
        ("a.jpg", "red", " \u200b"),
        ("a.jpg", "red", "它是什么颜色？"),
        ("a.jpg", "red", "What colour, is it?"),
        ("a.jpg", "blue", "None"),
    ]
    write_table(folder / CSV, rows)
    done = run(folder)
    records = json.loads((folder / JSON).read_text(encoding="utf-8"))
    assert questions(records) == ["What colour, is it?", PROMPT, "它是什么颜色？", "None"]
    assert captions(records) == ["red", "red", "red", "blue"] and set(paths(records)) == {"a.jpg"}
    assert "Rows not used: 2 (same image, question and caption" in done.stdout
    assert "Questions other than PROMPT: 3" in done.stdout


def test_what_the_summary_says(folder):
    """The numbers count images and captions apart, and a Chinese character as a word."""
    save_image(folder / "a.jpg")
    save_image(folder / "b.png")
    rows = [("a.jpg", "a dog"), ("a.jpg", "one, two, three four!"), ("b.png", "一只猫")]
    write_table(folder / CSV, rows)
    printed = run(folder).stdout
    assert f"Rows of {CSV}: 3, distinct images: 2" in printed
    assert "Images: 2, 1 of them with only one caption" in printed
    assert "Captions: 3, 1.50 per image" in printed
    assert "Words per caption: 2 to 4, mean 3.0" in printed
    assert f"Conversations written to {JSON}: 3" in printed
    assert "several names" not in printed and "Questions" not in printed


@pytest.mark.parametrize("kind", ["copy", "hard link", "symbolic link"])
def test_one_image_under_two_names(folder, kind):
    """Two names of one image are reported. Otherwise their captions would be learnt twice."""
    original, other = save_image(folder / "x.jpg"), folder / "x (1).jpg"
    save_image(folder / "different.jpg")
    make = {"copy": shutil.copy, "hard link": os.link, "symbolic link": os.symlink}[kind]
    try:
        make(original, other)
    except OSError:
        pytest.skip("this system does not let us make links")
    rows = [("x.jpg", "a dog"), (other.name, "a dog"), (other.name, "a cat")]
    write_table(folder / CSV, [*rows, ("different.jpg", "a dog")])
    done = run(folder)
    records = json.loads((folder / JSON).read_text(encoding="utf-8"))
    assert list(zip(paths(records), captions(records), strict=True)) == [
        ("x.jpg", "a dog"),
        ("x (1).jpg", "a cat"),
        ("different.jpg", "a dog"),
    ]
    assert "Rows not used: 1 (same image" in done.stdout
    assert "Images under several names: 1, such as 'x.jpg' and 'x (1).jpg'." in done.stdout
    assert "Images: 2, 1 of them with only one caption" in done.stdout


# ---- The table

REFUSED_TABLES = {
    "gbk": ("image_path,caption\na.jpg,一只狗\n".encode("gbk"), "perhaps GBK"),
    "utf-16": ("image_path,caption\na.jpg,dog\n".encode("utf-16"), "UTF-16"),
    "utf-16 unmarked": ("image_path,caption\na.jpg,dog\n".encode("utf-16-le"), "UTF-16"),
    "workbook": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\x00", "an Excel workbook"),
    "other columns": (b"path,text\na.jpg,dog\n", "has the columns ['path', 'text']"),
    "sep=": (b"sep=;\nimage_path;caption\na.jpg;dog\n", "has the columns ['sep=', '']"),
    "several captions": (
        b"image_path,caption,caption,caption\na.jpg,a dog,a cat,a cow\n",
        "has the columns ['image_path', 'caption', 'caption', 'caption']. There must be",
    ),
    "two spellings": (b"image_path,caption,Caption\na.jpg,dog,dog\n", "one caption per row"),
    "capital": (b"image_path,Caption\na.jpg,dog\n", "columns ['image_path', 'Caption']"),
    "blank": (b"image_path, caption\na.jpg,dog\n", "columns ['image_path', ' caption']"),
    "path with a blank": (b"Image Path,caption\na.jpg,dog\n", "columns ['Image Path', 'cap"),
    "zero width": (
        "image_path,\u200bcaption\na.jpg,dog\n".encode(),
        r"columns ['image_path', '\u200bcaption']",
    ),
    "question": (b"image_path,caption,Question\na.jpg,dog,\n", "'caption', 'Question']"),
    "only a header": (b"image_path,caption\n", "no row below its header"),
    "empty": (b"", "has the columns []"),
    "empty line first": (b"\nimage_path,caption\na.jpg,dog\n", "has the columns []"),
    "lost quote": (
        b'image_path,caption\na.jpg,cow\na.jpg,"dog\na.jpg,cat\n',
        "in the row that begins on line 3: ",
    ),
    "quote inside": (
        b'image_path,caption\na.jpg,"a "red" dog"\n',
        "Is a quote missing its partner?",
    ),
    "missing": (None, "is missing. Run data2csv.py first"),
}


@pytest.mark.parametrize("name", REFUSED_TABLES)
def test_not_such_a_table(folder, name):
    """One sentence says what is wrong. Otherwise a traceback, or a JSON without a usable record."""
    content, expected = REFUSED_TABLES[name]
    if content is not None:
        (folder / CSV).write_bytes(content)
    assert expected in refusal(folder)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators(folder, separator):
    """Excel's tables of countries with a decimal comma are read, and tables copied from it."""
    save_image(folder / "a.jpg")
    with open(folder / CSV, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        rows = [("image_path", "caption"), ("a.jpg", "red, white; blue"), ("a.jpg", "a\tb")]
        writer.writerows(rows)
    assert captions(convert(folder)) == ["red, white; blue", "a\tb"]


def test_a_comma_without_quotes(folder):
    """A row with a field too many is refused. Otherwise half of its caption would be lost."""
    save_image(folder / "a.jpg")
    table = "image_path,caption\na.jpg,red car, blue sky\na.jpg,“red car, blue sky”\na.jpg,a car\n"
    (folder / CSV).write_text(table, encoding="utf-8")
    done = run(folder)
    assert done.returncode == 1 and "line 2, 'a.jpg': more fields than columns" in done.stdout
    assert "line 3, 'a.jpg': more fields than columns" in done.stdout
    assert 'straight double quotes (")' in done.stdout


def test_extra_columns_are_ignored(folder):
    """A table may have more columns, in any order and with any name."""
    save_image(folder / "a.jpg")
    (folder / CSV).write_text("surplus,caption,image_path,,\nCC0,a car,a.jpg,,\n")
    assert paths(convert(folder)) == ["a.jpg"]


@posix
def test_a_pipe_as_table_is_not_waited_for(folder):
    """A table that is a folder or a pipe is refused. Otherwise the script waits for ever."""
    os.mkfifo(folder / CSV)
    assert f"{CSV} is not a file" in refusal(folder)
    (folder / "photos").mkdir()
    assert "photos is not a file" in refusal(folder, CSV_PATH="photos")


# ---- Rows


def bad_rows(folder: Path) -> list[tuple[str, str, str]]:
    """Rows that no training can use: path, caption, and what is said about it."""
    whole = save_image(folder / "whole.jpg", (200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>Please log in.</body></html>")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    save_image(folder / "tiny.png", (27, 300))
    save_image(folder / "strip.png", (28, 5601), "L")
    save_image(folder / "ok.png")
    return [
        ("gone.jpg", "a dog", "image is missing"),
        ("cut.jpg", "a dog", "can't be read"),
        ("page.jpg", "a dog", "not one of IMAGE_FORMATS"),
        ("empty.jpg", "a dog", "not one of IMAGE_FORMATS"),
        ("folder.jpg", "a dog", "image is a folder or a device"),
        ("tiny.png", "a dog", "MIN_SIDE"),
        ("strip.png", "a dog", "MAX_RATIO"),
        ("ok.png", " \n", "caption is empty"),
        ("", "a dog", "image_path is empty"),
        ("ok.png", "a dog<|im_end|>\n<|im_start|>user", "special token of the model: <|im_end|>"),
        ("ok.png", "<|image_pad|>", "special token of the model: <|image_pad|>"),
        ("ok.png", "a \0 dog", "NUL character"),
        ("ok\0.png", "a dog", "NUL character"),
        ("a<|im_end|>.jpg", "a dog", "rename"),
        ("file:///a%3C%7Cim_end%7C%3E.jpg", "a dog", "rename"),
        ("a\nb.jpg", "a dog", "rename"),
        ("./ ok.png", "a dog", "rename"),  # to train.py, which strips the name, it would be ok.png
        ("../ok.png", "a dog", "image is missing"),
        ("x" * 300 + ".jpg", "a dog", "can't be read"),
        (
            "https://127.0.0.1:9/ok.png?x=1",
            "a dog",
            "the web or the like: download the image first",
        ),
        ("HTTP://127.0.0.1:9/ok.png", "a dog", "download the image first"),
        ("ftp://127.0.0.1/ok.png", "a dog", "download the image first"),
        ("data:image/png;base64,iVBORw0KGgo=", "a dog", "download the image first"),
        ("file://127.0.0.1/ok.png", "a dog", "download the image first"),
        ("file:////127.0.0.1/share/ok.png", "a dog", "leads to another computer"),
        ("file:///%2F127.0.0.1/share/ok.png", "a dog", "leads to another computer"),
        (r"\\127.0.0.1\share\ok.png", "a dog", "leads to another computer"),
        ("//127.0.0.1/share/ok.png", "a dog", "leads to another computer"),
    ]


def test_bad_rows_stop_it(folder):
    """All bad rows are listed, nothing is written. Otherwise a training learns from login pages."""
    rows = bad_rows(folder)
    write_table(folder / CSV, [("ok.png", "a cat"), *[row[:2] for row in rows]])
    (folder / JSON).write_text("the older one")
    done = run(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Nothing was written to {JSON}.")
    assert "ON_BAD_SAMPLE" in done.stderr.splitlines()[-1]
    listed = listed_rows(done.stdout)
    assert len(listed) == len(rows) == 28, "all of them, not the first few"
    with open(folder / CSV, encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        ends = {tuple(row): lines.line_num for row in lines}
    for line, (path, caption, expected) in zip(listed, rows, strict=True):
        assert f"line {ends[path, caption]}, " in line and expected in line
        assert repr(path[:100]) in line or "image is missing" in expected
    assert (folder / JSON).read_text() == "the older one"
    assert not (folder / f"{JSON}.tmp").exists()


def test_bad_rows_dropped(folder):
    """ "drop" lists what it drops and numbers the rest. Otherwise data shrinks without a word."""
    rows = [row[:2] for row in bad_rows(folder)]
    write_table(folder / CSV, [("ok.png", "a cat"), *rows, ("ok.png", "two cats")])
    done = run(folder, ON_BAD_SAMPLE="drop")
    records = json.loads((folder / JSON).read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == ["identity_1", "identity_2"]
    assert captions(records) == ["a cat", "two cats"]
    assert len(listed_rows(done.stdout)) == 28 and "28 of 30 rows" in done.stdout
    assert "Rows not used: 2 (caption contains a special token of the model)" in done.stdout


def test_nothing_left(folder):
    """No JSON is written without a record. Otherwise the training ends in a division by zero."""
    write_table(folder / CSV, [("gone.jpg", "a dog")])
    assert "no row" in refusal(folder, ON_BAD_SAMPLE="drop")


INVISIBLE = [
    *[" ", "\u3000", "\u200b", "\ufeff", "\u200d\u2060", "\x07", "\u202e \u00ad", "\u2028"],
    # Hangul fillers, an empty Braille cell, a joiner, a variation selector without its character
    *["\u3164", "\uffa0", "\u115f\u1160", "\u2800", "\u034f", "\ufe0f"],
]


def test_captions_that_show_nothing(folder):
    """A caption of blanks and characters that nobody sees is empty, and so is such a path."""
    save_image(folder / "a.jpg")
    rows = [("a.jpg", text) for text in INVISIBLE]
    write_table(folder / CSV, [("a.jpg", "a dog"), *rows, ("\u200b", "a cat")])
    done = run(folder, ON_BAD_SAMPLE="drop")
    assert f"Rows not used: {len(INVISIBLE)} (caption is empty)" in done.stdout
    assert "Rows not used: 1 (image_path is empty)" in done.stdout


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (
            "<|image_pad|> What is it?",
            "question contains a special token of the model: <|image_pad",
        ),
        ("What \0 is it?", "question contains a NUL character"),
    ],
)
def test_questions_are_checked_like_captions(folder, question, expected):
    """A question can't forge a turn or an image. Otherwise the model sees one that isn't there."""
    save_image(folder / "a.jpg")
    assert reason(folder, "a.jpg", "a dog", question).startswith(expected)


# ---- Paths


def test_other_folders(folder):
    """Relative paths count from the CSV in the CSV and from the JSON in the JSON."""
    save_image(folder / "mine/images/a b.jpg")
    absolute = save_image(folder / "elsewhere/c.jpg")
    rows = [("images/a b.jpg", "a dog"), (r"images\a b.jpg", "a cat"), (str(absolute), "a cow")]
    write_table(folder / "mine/table.csv", rows)
    records = convert(folder, CSV_PATH="mine/table.csv", DATA_JSON="out/deep/data.json")
    relative = "../../mine/images/a b.jpg"
    assert paths(records) == [relative, relative, str(absolute)]


def test_the_home_folder(folder, monkeypatch):
    """~ stands for the home folder in every path constant, as in a terminal."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))
    save_image(folder / "home/images/a.jpg")
    write_table(folder / "home/table.csv", [("images/a.jpg", "a dog")])
    done = run(folder, CSV_PATH="~/table.csv", DATA_JSON="~/out/data.json")
    assert done.returncode == 0, done.stderr
    records = json.loads((folder / "home/out/data.json").read_text(encoding="utf-8"))
    assert paths(records) == ["../images/a.jpg"]


def test_file_addresses(folder):
    """file:/// is a path like any other, with its %20."""
    inside = save_image(folder / "a b.jpg")
    write_table(folder / CSV, [(inside.as_uri(), "a dog")])
    assert "a%20b.jpg" in inside.as_uri()
    assert paths(convert(folder)) == [inside.as_posix()]
    assert reason(folder, "file:///not/here.jpg") == "image is missing: /not/here.jpg"


@pytest.mark.skipif(os.name == "nt", reason="on Windows these are real places")
def test_windows_drives_on_another_system(folder):
    r"""e:\LLM\a.jpg is refused as what it is. Otherwise it is called missing in ./e:/LLM."""
    rows = [
        (r"e:\LLM\a.jpg", "a dog"),
        ("e:/LLM/c.jpg", "a cow"),
        ("file:///e:/LLM/d.jpg", "a cat"),
    ]
    save_image(folder / "e:/LLM/c.jpg")
    write_table(folder / CSV, rows)
    done = run(folder)
    assert done.returncode == 1
    listed = listed_rows(done.stdout)
    assert all("image lies on a Windows drive" in line for line in listed) and len(listed) == 3
    assert listed[0].startswith("  line 2, 'e:/LLM/a.jpg': ")
    assert listed[2].endswith("another system: e:/LLM/d.jpg")


@posix
def test_a_pipe_is_not_waited_for(folder):
    """A pipe or a device is not opened. Otherwise the script waits for ever for its content."""
    os.mkfifo(folder / "pipe.jpg")
    write_table(folder / CSV, [("pipe.jpg", "a dog"), ("/dev/zero", "a dog")])
    done = run(folder)
    assert done.stdout.count("image is a folder or a device, not a file: ") == 2


@posix
def test_links_that_lead_nowhere(folder):
    """A broken link and a ring of links are called what they are, not a missing image."""
    os.symlink("nowhere.jpg", folder / "broken.jpg")
    os.symlink("ring.jpg", folder / "ring.jpg")
    expected = f"image is a link to a file that is missing: {folder}/broken.jpg"
    assert reason(folder, "broken.jpg") == expected
    assert reason(folder, "ring.jpg").startswith("image can't be read: ")


NEARLY = {
    "the letters' case": ("Images/Kitchen.JPG", "images/kitchen.jpg"),
    "the folder": ("imges/kitchen.jpg", "images/kitchen.jpg"),
    "folder and file": ("imges/kitchn 12.jpg", "images/kitchen 12.jpg"),
    "the extension": ("images/kitchen.jpeg", "images/kitchen.jpg"),
    "a trailing blank in the folder": ("images /kitchen.jpg", "images/kitchen.jpg"),
    "a zero-width space": ("images/\u200bkitchen.jpg", "images/kitchen.jpg"),
}


@pytest.mark.parametrize("name", NEARLY)
def test_a_name_that_is_nearly_right(folder, name):
    """The file that was perhaps meant is named. Otherwise nobody sees the difference."""
    written, real = NEARLY[name]
    save_image(folder / real)
    save_image(folder / "images/bedroom.jpg")
    if (folder / written).exists():
        pytest.skip("to this system both are one name")
    expected = f"image is missing: {folder / written}. Did you mean {folder / real}?"
    assert reason(folder, written) == expected


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_two_forms(folder, form):
    """é as one character and as two is explained. Otherwise both names look the same."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    real = folder / unicodedata.normalize(form, "café é.jpg")
    written = unicodedata.normalize(other, "café é.jpg")
    save_image(real)
    if (folder / written).exists():
        pytest.skip("to this system both are one name")
    printed = reason(folder, written)
    assert printed.startswith(
        f"image is missing: {folder / written}. Did you mean {real}? (it looks"
    )


@pytest.mark.parametrize(
    "written", ["11195.jpg", "a/b/c.jpg", "kitchen.jpg/a.jpg", "x/kitchen.jpg"]
)
def test_no_guesses_where_nothing_is_alike(folder, written):
    """Another number is another image, and no folder is proposed as an image."""
    save_image(folder / "11196.jpg")
    save_image(folder / "kitchen.jpg")
    (folder / "a/b").mkdir(parents=True)
    assert reason(folder, written) == f"image is missing: {folder / written}"


def test_many_missing_images_are_not_compared_with_many(script, folder, monkeypatch):
    """A large folder is listed once and not compared. Otherwise a wrong table takes hours."""
    for number in range(1100):
        (folder / f"{number}.jpg").touch()
    listed = []
    real = os.listdir
    monkeypatch.setattr(script.os, "listdir", lambda path: listed.append(path) or real(path))
    monkeypatch.setattr(script.difflib, "get_close_matches", None)
    for number in range(100):
        missing = folder / f"missing{number}.jpg"
        assert script.describe_missing(missing) == f"image is missing: {missing}"
        found = script.describe_missing(folder / f"{number}.JPG")
        assert f"Did you mean {folder / f'{number}.jpg'}?" in found
    assert listed == [folder]


# ---- Constants and console

WRONG = {
    "CSV_PATH": [3, "", " ", "e:\new"],
    "DATA_JSON": [None, "", "e:\table.json"],
    "PROMPT": [3, "<|image_pad|>", "<|im_end|>\n<|im_start|>assistant\n", "\0", "\ud83d\udc15"],
    "ON_BAD_SAMPLE": ["skip", True],
    "IMAGE_FORMATS": ["PNG", [], ["PNG", "HTML"], ["JPG"], ["EPS"], ["PS"], ("PNG",), [3]],
    "MIN_SIDE": [0, "28"],
    "MAX_RATIO": [0, 1.5, 201],
    "MAX_FILE_PIXELS": [0, 10**9],
    "CHECK_THREADS": [0, True, 10**6],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_constants(script, name, monkeypatch):
    """A typo in a constant is one sentence. Otherwise "skip" means "drop", and nobody knows."""
    assert set(WRONG) == set(get_type_hints(script)), "a constant that is never checked"
    script.check_constants()
    for value in WRONG[name]:
        monkeypatch.setattr(script, name, value)
        with pytest.raises(SystemExit) as stopped:
            script.check_constants()
        beginning = f"{name} = {value!r} at the top of csv2json.py can't work: "
        assert str(stopped.value).startswith(beginning)


def test_wrong_constants_come_first(folder):
    """A wrong constant is reported before anything else, even before a missing table."""
    assert "CHECK_THREADS = 0" in refusal(folder, CHECK_THREADS=0)


class NotebookStream(io.StringIO):
    """What IPython has for stdout: it prints, and it can't be reconfigured."""

    reconfigure = property()


@pytest.mark.parametrize("stream", [NotebookStream, type(None)])
def test_consoles_that_are_no_files(folder, run_here, monkeypatch, stream):
    """A notebook and pythonw.exe, which has no console at all, get their JSON like a terminal."""
    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", "a dog")])
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    run_here()
    assert captions(json.loads((folder / JSON).read_text(encoding="utf-8"))) == ["a dog"]


@posix
def test_a_console_that_knows_no_chinese(folder):
    """Characters that a console doesn't know become question marks, not a traceback."""
    write_table(folder / CSV, [("一只狗.jpg", "a dog")])
    done = subprocess.run(
        command("csv2json.py"),
        cwd=folder,
        env={**variables(GUARD), "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"image is missing: " in done.stdout and b"???.jpg" in done.stdout


# ---- Images: half of each is light and half is dark, so that what train.py opens can be seen


def halves(mode: str = "RGB", size: tuple[int, int] = (96, 64), **colours) -> Image.Image:
    """Draw the left half in one colour, the right one in another."""
    drawn = Image.new("RGB", size, colours.get("light", (230, 90, 60)))
    drawn.paste(colours.get("dark", (20, 30, 90)), (size[0] // 2, 0, *size))
    return drawn.convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """Return a greyscale PNG whose head says what it likes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        file += struct.pack(">I", len(content)) + name + content + checksum
    return file


def turned() -> Image.Exif:
    """Return the note of a camera that was held upright: turn this image by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    return exif


def sideways(kind: str) -> bytes:
    return saved(halves().transpose(Image.Transpose.ROTATE_90), kind, exif=turned())


def moving(kind: str) -> bytes:
    more = [Image.new("RGB", (96, 64))] * 2
    return saved(halves(), kind, save_all=True, append_images=more, duration=100)


def transparent(mode: str) -> Image.Image:
    drawn = halves(mode)
    drawn.putalpha(Image.linear_gradient("L").resize(drawn.size))
    return drawn


def accepted_images() -> dict[str, bytes]:
    black_and_white = halves("L", dark=(0, 0, 0), light=(255, 255, 255)).convert("1")
    two_in_one = {"save_all": True, "append_images": [Image.new("RGB", (96, 64))]}
    return {
        "plain.jpg": saved(halves(), "JPEG"),
        "plain.bmp": saved(halves(), "BMP"),
        "plain.tif": saved(halves(), "TIFF"),
        "cmyk.jpg": saved(halves("CMYK"), "JPEG"),
        "greyscale.jpg": saved(halves("L"), "JPEG"),
        "black and white.png": saved(black_and_white, "PNG"),
        "palette.png": saved(halves("P"), "PNG"),
        "palette, transparent.png": saved(halves("P"), "PNG", transparency=0),
        "palette, many.png": saved(halves("P"), "PNG", transparency=bytes(range(256))),
        "palette, transparent.gif": saved(halves("P"), "GIF", transparency=0),
        "grey, transparent.png": saved(transparent("L"), "PNG"),
        "grey, one transparent.png": saved(halves("L"), "PNG", transparency=7),
        "rgb, one transparent.png": saved(halves(), "PNG", transparency=(1, 2, 3)),
        "half transparent.png": saved(transparent("RGB"), "PNG"),
        "half transparent.tif": saved(transparent("RGB"), "TIFF"),
        "half transparent.webp": saved(transparent("RGB"), "WEBP"),
        "sideways.jpg": sideways("JPEG"),
        "sideways.png": sideways("PNG"),
        "sideways.webp": sideways("WEBP"),
        "sideways.tif": sideways("TIFF"),
        "moving.gif": moving("GIF"),
        "moving.webp": moving("WEBP"),
        "moving.png": moving("PNG"),
        "two in one.jpg": saved(halves(), "MPO", **two_in_one),
        "a png.jpg": saved(halves(), "PNG"),
    }


def refused_images() -> dict[str, tuple[bytes, str]]:
    """Return files by name: their bytes, and why they are refused."""
    photo = Image.effect_noise((200, 200), 40).convert("RGB")
    # Text where a number is due
    unknown_type = sideways("JPEG").replace(b"\x01\x0f\x00\x02", b"\x01\x3d\x00\x02")
    assert unknown_type != sideways("JPEG")
    short, long = (
        "shorter than MIN_SIDE = 28: ",
        "more than MAX_RATIO = 200 times as long as wide: ",
    )
    many = "more pixels than MAX_FILE_PIXELS = 89,478,485: "
    deep = "more than 8 bits per colour, save it with 8: mode "
    return {
        "nothing.jpg": (b"", "file is damaged, or not one of IMAGE_FORMATS: it has 0 bytes"),
        "page.jpg": (
            b"<!DOCTYPE html><html>Please log in.</html>",
            "not one of IMAGE_FORMATS",
        ),
        "cut.jpg": (saved(photo, "JPEG")[:-3000], "image can't be read: "),
        "cut.png": (saved(photo, "PNG")[:-3000], "image can't be read: "),
        "cut.webp": (saved(photo, "WEBP")[:-300], "image can't be read: "),
        "exif.jpg": (unknown_type, "image can't be read: "),
        "program.jpg": (saved(halves(), "EPS"), "not one of IMAGE_FORMATS"),
        "dot.png": (saved(halves(size=(1, 1)), "PNG"), short + "1x1"),
        "strip.png": (saved(halves(size=(10_000, 10)), "PNG"), short + "10000x10"),
        "ratio.png": (saved(halves(size=(5601, 28)), "PNG"), long + "5601x28"),
        "bomb.png": (png(20_000, 15_000, b"decoded"), many + "300,000,000"),
        "16 bits.png": (saved(Image.new("I;16", (96, 64), 9000), "PNG"), deep + "I;16"),
        "32 bits.tif": (saved(Image.new("I", (96, 64), 9000), "TIFF"), deep + "I"),
        "numbers.tif": (saved(Image.new("F", (96, 64), 0.5), "TIFF"), deep + "F"),
    }


ACCEPTED = accepted_images()
REFUSED = refused_images()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """All kinds of images through csv2json.py at once: the run, and the folder with the JSON."""
    folder = tmp_path_factory.mktemp("kinds")
    contents = {**ACCEPTED, **{name: content for name, (content, _) in REFUSED.items()}}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write_table(folder / CSV, [(name, f"an image, {name}") for name in contents])
    return run(folder, ON_BAD_SAMPLE="drop"), folder


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_are_refused(converted, name):
    """Each is refused for its reason. Otherwise it ends, spoils or overloads a training."""
    done, folder = converted
    [line] = [line for line in listed_rows(done.stdout) if f", {name!r}: " in line]
    assert REFUSED[name][1] in line
    assert name not in paths(json.loads((folder / JSON).read_text(encoding="utf-8")))


def test_images_that_are_accepted(converted):
    """All others are in the JSON, and nothing but the progress bar is on stderr."""
    done, folder = converted
    assert done.returncode == 0
    records = json.loads((folder / JSON).read_text(encoding="utf-8"))
    assert paths(records) == list(ACCEPTED)
    noise = [line for line in re.split("[\r\n]+", done.stderr) if "Checking images: " not in line]
    assert not any(noise), noise


@pytest.mark.slow
def test_images_of_2_gigabytes(folder):
    """A file whose size fits in no 32 bits is checked as any other."""
    (folder / "whole.jpg").write_bytes(saved(halves(), "JPEG"))
    (folder / "zeros.jpg").write_bytes(b"")
    for name in ("whole.jpg", "zeros.jpg"):
        os.truncate(folder / name, 2**31 + 1)
    write_table(folder / CSV, [("whole.jpg", "a dog"), ("zeros.jpg", "a dog")])
    done = run(folder, ON_BAD_SAMPLE="drop")
    assert paths(json.loads((folder / JSON).read_text(encoding="utf-8"))) == ["whole.jpg"]
    [line] = listed_rows(done.stdout)
    assert "not one of IMAGE_FORMATS: it has 2147483649 bytes" in line


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_upright_image(folder, kind):
    """A size is reported as every viewer shows it, whatever the format does to turn an image."""
    strip = Image.effect_noise((300, 20), 40).convert("RGB")
    (folder / "strip.jpg").write_bytes(saved(strip, kind, exif=turned()))
    assert reason(folder, "strip.jpg").endswith("MIN_SIDE = 28: 20x300")


def test_each_image_is_decoded_once_and_several_at_a_time(script, folder, monkeypatch):
    """Five captions cost one look, on all cores. Otherwise COCO takes an hour, not minutes."""
    monkeypatch.chdir(folder)
    # Broken, and with it all waiting threads, if the images come one after the other
    together = threading.Barrier(script.CHECK_THREADS, timeout=60)
    decoded = []

    def decode(file: Path) -> str:
        together.wait()
        decoded.append(file.name)
        return ""

    monkeypatch.setattr(script, "find_image_fault", decode)
    names = [f"{number}.jpg" for number in range(4 * script.CHECK_THREADS)]
    for name in names:
        (folder / name).write_text(name)
    rows = [(name, f"{number} dogs") for number in range(5) for name in names]
    write_table(folder / CSV, rows)
    checks = script.check_images(script.read_rows())
    assert not any(check.fault for check in checks.values())
    assert sorted(decoded) == sorted(names)


# ---- The disk, and the end of a run


def without_place(folder: Path, kind: str) -> str:
    """Take the place of out/data.json in one of several ways, return the value of DATA_JSON."""
    if kind == "the folder is a file":
        (folder / "out").write_text("a file")
    elif kind == "the file is a folder":
        (folder / "out/data.json").mkdir(parents=True)
    elif kind == "the temporary file is a folder":
        (folder / "out/data.json.tmp").mkdir(parents=True)
    elif kind == "the name is too long":
        return f"out/{'x' * 300}.json"
    elif kind == "the name of a folder":
        return "out/"
    elif kind == "a device":
        return os.devnull
    return "out/data.json"


@pytest.mark.parametrize(
    "kind",
    [
        "the folder is a file",
        "the file is a folder",
        "the temporary file is a folder",
        "the name is too long",
        "the name of a folder",
        "a device",
    ],
)
def test_no_place_for_the_json(folder, kind):
    """One sentence before the first image is decoded. Otherwise the work of minutes is lost."""
    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", "a dog")])
    done = run(folder, DATA_JSON=without_place(folder, kind))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("Can't write ") and "Checking" not in done.stderr
    assert not os.path.isfile(os.devnull), "this system has lost a device"


@posix
@pytest.mark.parametrize("locked", ["out", f"out/{JSON}"])
def test_a_place_that_is_read_only(folder, locked):
    """Permissions are found out before the first image is decoded."""
    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", "a dog")])
    (folder / "out").mkdir()
    (folder / f"out/{JSON}").write_text("the older one")
    (folder / locked).chmod(0o500)
    # Root may write everywhere, unless it gives up its privileges
    as_user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if as_user and not shutil.which("setpriv"):
        pytest.skip("permissions don't stop root")
    done = subprocess.run(
        [*as_user, *command("csv2json.py", DATA_JSON=f"out/{JSON}")],
        cwd=folder,
        env=variables(GUARD),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    (folder / locked).chmod(0o700)
    assert done.returncode == 1 and done.stderr.startswith("Can't write "), done.stderr
    assert "Checking" not in done.stderr
    assert (folder / f"out/{JSON}").read_text() == "the older one"


@pytest.mark.parametrize("name", [CSV, f"./{CSV}", f"out/../{CSV}", "link.csv", "hard.csv"])
def test_the_table_is_never_overwritten(folder, name):
    """CSV_PATH and DATA_JSON may not be one file, whatever it is called. Otherwise it is lost."""
    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", "a dog")])
    table = (folder / CSV).read_bytes()
    (folder / "out").mkdir()
    try:
        os.symlink(CSV, folder / "link.csv")
        os.link(folder / CSV, folder / "hard.csv")
    except OSError:
        pytest.skip("this system does not let us make links")
    assert refusal(folder, DATA_JSON=name).startswith(f"Can't write {name} (it is CSV_PATH)")
    assert (folder / CSV).read_bytes() == table


def test_the_table_has_the_temporary_name(folder):
    """A table that is called like the unfinished JSON is not overwritten either."""
    table = write_table(folder / "mine.json.tmp", [("a.jpg", "a dog")])
    save_image(folder / "a.jpg")
    sentence = refusal(folder, CSV_PATH="mine.json.tmp", DATA_JSON="mine.json")
    assert sentence.startswith("Can't write mine.json.tmp (it is CSV_PATH)") and table.exists()


def test_the_json_is_open_in_another_program(folder, script, run_here, monkeypatch):
    """One sentence, and the old JSON stays, when Windows refuses to replace an open file."""
    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", "a dog")])
    (folder / JSON).write_text("the older one")

    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(script.os, "replace", refuse)
    with pytest.raises(SystemExit, match=f"Can't write {JSON} .*Access is denied.*close"):
        run_here()
    assert (folder / JSON).read_text() == "the older one"
    assert not (folder / f"{JSON}.tmp").exists()


@posix
def test_the_disk_is_full(folder):
    """One sentence, and the old JSON stays. Otherwise half a JSON lies on the full disk."""
    import resource

    save_image(folder / "a.jpg")
    write_table(folder / CSV, [("a.jpg", f"{number} dogs") for number in range(2000)])
    (folder / JSON).write_text("the older one")
    done = subprocess.run(
        command("csv2json.py"),
        cwd=folder,
        env=variables({**GUARD, "PYTHONDONTWRITEBYTECODE": "1"}),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith(f"Can't write {JSON} ") and "Free some space" in sentence
    assert (folder / JSON).read_text() == "the older one"
    assert not (folder / f"{JSON}.tmp").exists()


def start(folder: Path, **constants) -> subprocess.Popen:
    """Start the script in a process group of its own, to which signals can be sent."""
    return subprocess.Popen(
        command("csv2json.py", **constants),
        cwd=folder,
        env=variables(GUARD),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_bar(process: subprocess.Popen, percent: int) -> None:
    """Read the progress bar until so many percent of the images are checked."""
    shown = b""
    while character := process.stderr.read(1):
        shown += character
        done = re.findall(rb"(\d+)%\|", shown)
        if done and int(done[-1]) >= percent:
            return
    raise AssertionError(f"the bar never came to {percent} %: {shown.decode()}")


def wait_for_bytes(process: subprocess.Popen, path: Path, size: int) -> None:
    """Wait until a file has this size, or the process is done with it."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size >= size:
                return
        time.sleep(0.001)


def end(process: subprocess.Popen, sent: signal.Signals) -> str:
    """Send a signal, wait for the end of the process, return the rest of its stderr."""
    if process.poll() is None:
        os.killpg(process.pid, sent)
    try:
        return process.communicate(timeout=100)[1].decode()
    finally:
        process.kill()


@posix
@pytest.mark.slow
def test_killed_at_any_moment(folder):
    """The JSON is the old one or the new one, never half of it or a mixture."""
    large = save_image(folder / "large.jpg", (1000, 1000))
    for number in range(60):
        os.link(large, folder / f"{number}.jpg")
    rows = [(f"{number % 60}.jpg", f"{number} dogs on a beach") for number in range(10_000)]
    write_table(folder / CSV, rows)
    assert run(folder).returncode == 0
    whole = (folder / JSON).read_bytes()
    moments = random.Random(5)
    killed_while_writing = 0
    for number in range(10):
        (folder / JSON).write_bytes(b"the older one")
        process = start(folder)
        if number % 2:
            wait_for_bar(process, moments.randrange(100))
        else:
            size = moments.randrange(len(whole))
            wait_for_bytes(process, folder / f"{JSON}.tmp", size)
        end(process, signal.SIGKILL)
        assert process.returncode in (-signal.SIGKILL, 0)
        killed_while_writing += not number % 2 and process.returncode != 0
        assert (folder / JSON).read_bytes() in (b"the older one", whole), f"moment {number}"
    assert killed_while_writing
    assert run(folder).returncode == 0
    assert (folder / JSON).read_bytes() == whole
    assert not (folder / f"{JSON}.tmp").exists()


@pytest.mark.slow
@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_while_the_threads_decode(folder, sent):
    """A signal ends it with one sentence. Otherwise Ctrl-C waits for thousands of images."""
    large = folder / "0.png"
    Image.new("L", (9000, 9000)).save(large)  # some tenths of a second each, minutes in all
    for number in range(1, 3000):
        os.link(large, folder / f"{number}.png")
    write_table(folder / CSV, [(f"{number}.png", "a dog") for number in range(3000)])
    (folder / JSON).write_text("the older one")
    process = start(folder, CHECK_THREADS=4)
    wait_for_bar(process, 0)
    printed = end(process, sent)
    assert process.returncode == 128 + sent and "Traceback" not in printed, printed
    assert printed.splitlines()[-1].startswith("Stopped. ")
    assert (folder / JSON).read_text() == "the older one"
    write_table(folder / CSV, [("0.png", "a dog")])
    assert len(convert(folder)) == 1 and not (folder / f"{JSON}.tmp").exists()


# ---- Both scripts agree: csv2json.py beside train.py

SIDE = 56  # pixels to which train.py scales here


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_images_are_opened_by_the_training(converted, train, base, name):
    """What csv2json.py accepts, train.py opens upright: light on the left, dark on the right."""
    _, folder = converted
    records = json.loads((folder / JSON).read_text(encoding="utf-8"))
    record = dict(zip(paths(records), records, strict=True))[name]
    [turn] = train.read_turns(record)
    [marked] = train.IMAGE_MARKER.findall(turn.question)
    path = train.locate_image(marked, folder)
    assert train.inspect_image(path, base.side).problem == ""
    opened = train.open_image(path, SIDE, SIDE)
    assert opened.mode == "RGB" and opened.size == (SIDE, SIDE)
    light, dark = (sum(opened.getpixel((x, SIDE // 4))) for x in (SIDE // 8, SIDE * 7 // 8))
    assert light > dark + 30, (light, dark)
    if name.startswith(("plain", "sideways", "a png", "two", "moving")):
        red, green, blue = opened.getpixel((SIDE // 8, SIDE * 3 // 4))
        assert abs(red - 230) + abs(green - 90) + abs(blue - 60) < 60, (red, green, blue)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_images_end_no_training(converted, train, base, name):
    """What csv2json.py refuses, train.py refuses by a reason, or, where only small, sees whole.

    Otherwise a JSON from elsewhere would end a training with a traceback.
    """
    _, folder = converted
    image = train.inspect_image(str(folder / name), base.side)
    if not image.problem:
        with contextlib.suppress(ValueError):
            pixels, grid = train.prepare_pixels(image, base)
            assert len(pixels) == grid.prod()
            assert REFUSED[name][1].startswith(("shorter than", "more than MAX_RATIO"))


NAMES = {
    "beside the table": ("a.jpg", "mine/a.jpg"),
    "with backslashes": ("sub\\b.jpg", "mine/sub/b.jpg"),
    "with dots": ("./sub/../a.jpg", "mine/a.jpg"),
    "outside": ("../outside.jpg", "mine/../outside.jpg"),
    "absolute": ("{folder}/mine/a.jpg", "mine/a.jpg"),
    "an address": ("file://{folder}/mine/a.jpg", "mine/a.jpg"),
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_both_scripts_find_the_same_file(folder, train, base, tmp_path, name, linked):
    """A path leads to the same file from the CSV and from the JSON, links between included."""
    save_image(folder / "mine/a.jpg", (60, 60))
    save_image(folder / "mine/sub/b.jpg", (61, 60))
    save_image(folder / "outside.jpg", (62, 60))
    if linked:
        try:
            (folder / "out").mkdir()
            (folder / "mine").rename(tmp_path / "moved")
            (folder / "outside.jpg").rename(tmp_path / "outside.jpg")
            os.symlink(tmp_path / "moved", folder / "mine", target_is_directory=True)
        except OSError:
            pytest.skip("this system does not let us make links")
    written, expected = NAMES[name]
    home = folder.as_posix() if os.name != "nt" else f"/{folder.as_posix()}"
    path = written.format(folder=home if name == "an address" else folder)
    write_table(folder / "mine/table.csv", [(path, "a dog")])
    assert len(convert(folder, CSV_PATH="mine/table.csv", DATA_JSON="out/data.json")) == 1
    [example] = train.read_examples(str(folder / "out/data.json"), base)
    assert os.path.samefile(example.images[0].path, folder / expected)
