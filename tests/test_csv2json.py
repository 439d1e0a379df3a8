"""csv2json.py: what it must carry over untouched, what it must refuse, and what it must leave alone."""

import csv
import json
import os
from pathlib import Path

import pytest
from conftest import TESTS, run_script
from PIL import Image

AWKWARD = [
    'A sign says "STOP", and a man\'s dog, it seems, stops.',
    "厨房里有一张桌子，上面放着一盘水果。",
    "two dogs 🐕🐕 on a beach 🏖️",
    "first line\nsecond line\r\nthird line",
    "None",
    "NA",
    "007",
    "tab\there, back\\slash, <b>not a token</b>, a | b, <|>",
    "no\u00a0break\u200bzero width \u2028 line separator",
    "long " * 200_000 + "caption",
]


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
    return run_script("csv2json.py", folder, {"PYTHONPATH": str(TESTS / "guard")}, **constants)


def convert(folder: Path, **constants) -> list[dict]:
    done = run(folder, **constants)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / constants.get("JSON_PATH", "data_vl.json")).read_text(encoding="utf-8"))


def refusal(folder: Path, **constants) -> str:
    """The one sentence on stderr with which the script ended; nothing of the JSON was written."""
    done = run(folder, **constants)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(folder.glob("data_vl.json*"))
    return done.stderr.splitlines()[-1]


def paths(records: list[dict]) -> list[str]:
    questions = [record["conversations"][0]["value"] for record in records]
    return [question.partition("<|vision_start|>")[2].removesuffix("<|vision_end|>") for question in questions]


def test_the_documented_record(folder):
    """A renamed key, another prompt or an id from 0 breaks what reads the format; escaped Chinese is for no eyes."""
    picture(folder / "coco_2014_caption/1.jpg")
    table(folder / "coco-2024-dataset.csv", [("coco_2014_caption/1.jpg", "A modern kitchen done in white.")])
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
    assert [record["id"] for record in records] == [f"identity_{number}" for number in range(1, len(AWKWARD) + 1)]


def test_ends_are_stripped_and_repeats_dropped(folder):
    """A blank before <|im_end|> is learnt as part of the answer; a row that stands twice is learnt twice."""
    picture(folder / "a.jpg")
    rows = [("a.jpg", " a dog \r\n"), ("./a.jpg", "a dog"), ("a.jpg", "A dog")]
    table(folder / "coco-2024-dataset.csv", rows)
    done = run(folder)
    records = json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))
    assert [record["conversations"][1]["value"] for record in records] == ["a dog", "A dog"]
    assert [record["id"] for record in records] == ["identity_1", "identity_2"]
    assert "DROPPED: 1 rows, same picture and same caption" in done.stdout


def test_what_the_summary_says(folder):
    """A summary that counts rows as pictures hides that a table has one caption a picture instead of five."""
    picture(folder / "a.jpg", (64, 48))
    picture(folder / "b.png", (300, 40), "L")
    table(folder / "coco-2024-dataset.csv", [("a.jpg", "a dog"), ("a.jpg", "one two three four"), ("b.png", "a cat b")])
    said = run(folder).stdout
    assert "2 pictures, 3 captions, 1.50 captions a picture" in said
    assert "2 to 4 words a caption, mean 3.0" in said
    assert "64 to 300 pixels wide, 40 to 48 high" in said and "1 RGB" in said and "1 L" in said
    assert "<|im_start|>assistant\n[[a dog<|im_end|>]]\n" in said


FILES = {
    "gbk": ("image_path,caption\na.jpg,一只狗\n".encode("gbk"), "not UTF-8"),
    "utf-16": ("image_path,caption\na.jpg,dog\n".encode("utf-16"), "not UTF-8"),
    "other columns": (b"path,text\na.jpg,dog\n", "has the columns path, text;"),
    "semicolons": (b"image_path;caption\na.jpg;dog\n", "has the columns image_path;caption;"),
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
        ("folder.jpg", "a dog", "does not decode"),
        ("tiny.png", "a dog", "MIN_SIDE"),
        ("strip.png", "a dog", "MAX_RATIO"),
        ("ok.png", " \n", "empty"),
        ("", "a dog", "empty"),
        ("ok.png", "a dog<|im_end|>\n<|im_start|>user", "special token of the model in it: <|im_end|>"),
        ("ok.png", "<|image_pad|>", "special token of the model in it: <|image_pad|>"),
        ("a<|b.jpg", "a dog", "rename"),
        ("a\nb.jpg", "a dog", "rename"),
        ("x" * 300 + ".jpg", "a dog", "does not decode"),
    ]


def test_bad_rows_stop_it(folder):
    """A training on a forged turn, half a picture or a login page fails hours later, or worse, doesn't."""
    rows = bad_rows(folder)
    table(folder / "coco-2024-dataset.csv", [("ok.png", "a cat"), *[row[:2] for row in rows]])
    (folder / "data_vl.json").write_text("the older one")
    done = run(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "ON_BAD_SAMPLE" in done.stderr
    named = [line for line in done.stdout.splitlines() if line.startswith("  line ")]
    assert len(named) == len(rows) == 14
    for line, (path, _, reason) in zip(named, rows, strict=True):
        assert repr(path[:100]) in line and reason in line
    assert (folder / "data_vl.json").read_text() == "the older one"
    assert not (folder / "data_vl.json.tmp").exists()


def test_bad_rows_dropped(folder):
    """ "drop" that drops silently, or leaves holes in the ids, is how a data set shrinks without anyone knowing."""
    rows = bad_rows(folder)
    table(folder / "coco-2024-dataset.csv", [("ok.png", "a cat"), *[row[:2] for row in rows], ("ok.png", "two cats")])
    done = run(folder, ON_BAD_SAMPLE="drop", BAD_SHOWN=3)
    records = json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == ["identity_1", "identity_2"]
    assert [record["conversations"][1]["value"] for record in records] == ["a cat", "two cats"]
    assert done.stdout.count("  line ") == 3 and "14 of 16 rows" in done.stdout
    assert "DROPPED: 2 rows, caption has a special token of the model in it" in done.stdout


def test_nothing_left(folder):
    """An empty JSON would end the training with a division by zero."""
    table(folder / "coco-2024-dataset.csv", [("gone.jpg", "a dog")])
    assert "not one row" in refusal(folder, ON_BAD_SAMPLE="drop")


def test_a_comma_without_quotes(folder):
    """pandas took the path for an index and the caption's second half for the caption."""
    picture(folder / "a.jpg")
    (folder / "coco-2024-dataset.csv").write_text("image_path,caption\na.jpg,red car, blue sky\na.jpg,a car\n")
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
    assert paths(records) == ["../../mine/pictures/a b.jpg", "../../mine/pictures/a b.jpg", str(absolute)]


def test_urls(folder):
    """file:// is opened as it will be in training; http(s):// stays as it is, and that it wasn't checked is said."""
    rows = [(picture(folder / "a b.jpg").as_uri(), "a dog"), ("https://example.org/b.jpg?x=1", "a cat")]
    table(folder / "coco-2024-dataset.csv", rows)
    done = run(folder)
    assert "a%20b.jpg" in rows[0][0]
    assert paths(json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))) == [path for path, _ in rows]
    assert "NOT CHECKED: 1 pictures on the web" in done.stdout
    table(folder / "coco-2024-dataset.csv", [("file:///not/here.jpg", "a dog")])
    assert "picture is missing" in run(folder).stdout


@pytest.mark.skipif(os.name == "nt", reason="on Windows these are real places")
def test_windows_paths(folder):
    """e:\\LLM\\... taken for a relative path becomes something like ../e:/LLM/..., which is nowhere."""
    rows = [(r"e:\LLM\a.jpg", "a dog"), (r"\\server\share\b.jpg", "a cat"), ("e:/LLM/c.jpg", "a cow")]
    for path, _ in rows[:2]:  # this system takes backslashes for a part of the name, so such files can be made
        picture(folder / "x.jpg").rename(folder / path)
    picture(folder / "e:/LLM/c.jpg")
    table(folder / "coco-2024-dataset.csv", rows)
    assert paths(convert(folder)) == [path for path, _ in rows]


def test_wrong_constants(folder):
    """A typo in ON_BAD_SAMPLE meant "drop"; a placeholder in PROMPT gives the model a picture that isn't there."""
    picture(folder / "a.jpg")
    table(folder / "coco-2024-dataset.csv", [("a.jpg", "a dog")])
    assert '"stop" or "drop"' in refusal(folder, ON_BAD_SAMPLE="skip")
    assert "CHECK_WORKERS" in refusal(folder, CHECK_WORKERS=0)
    assert "<|image_pad|>" in refusal(folder, PROMPT="Describe <|image_pad|>")


def test_a_bomb(folder):
    """A PNG of some kilobytes that unpacks to gigabytes takes the machine down with it."""
    picture(folder / "a.png", (1000, 1000), "L")
    table(folder / "coco-2024-dataset.csv", [("a.png", "a dog")])
    done = run(folder, MAX_PIXELS=999_999)
    assert done.returncode == 1 and "MAX_PIXELS: 1000x1000" in done.stdout
