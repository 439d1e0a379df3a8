"""Step 2 of 4: turns the table of pictures and captions into the conversations that a training reads.

Reads   coco-2024-dataset.csv (from data2csv.py, or your own: two columns, `image_path` and `caption`, saved as UTF-8)
        and every picture that it names; relative paths count from the folder of the CSV.
Writes  data_vl.json: one conversation a row, "please describe this picture" and the caption as its answer.
Run     python csv2json.py
Takes   a second for 500 pictures, about 2 minutes for COCO's 82,783 (two cores); less than 1 GB of memory.

Bad data is cheapest to find here: half a picture or an empty caption would otherwise end a training hours later, or
quietly spoil it. So every picture is decoded to its last byte, and every row that can't be used is named.
"""

import csv
import functools
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from urllib.request import url2pathname

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# files
CSV_PATH = "coco-2024-dataset.csv"  # what data2csv.py wrote, or your own table
JSON_PATH = "data_vl.json"  # read by train.py; relative picture paths in it count from its own folder

# text
PROMPT = "请描述这张图片: "  # what the user says before the picture ("Please describe this picture: ")
SPECIAL_TOKEN = r"<\|\w+\|>"  # regular expression: the shape of the model's 14 special tokens, <|im_end|> and the like

# checks
ON_BAD_SAMPLE = "stop"  # "stop": name the bad rows and write nothing; "drop": name them and go on without them
BAD_SHOWN = 20  # rows: so many bad ones are named, the rest is counted
MIN_SIDE = 28  # pixels: the model sees squares of 28x28, a thinner picture doesn't fill a single one
MAX_RATIO = 200  # long side / short side: Qwen2-VL's own preprocessing refuses more
MAX_PIXELS = 89_478_485  # width x height: Pillow's own limit, against files that unpack to gigabytes
CHECK_WORKERS = 8  # threads: Pillow decodes outside Python's lock, so they use every core
# ----------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the CSV: the line where it ends, the picture's path as the JSON has it, what is wrong ("": nothing)."""

    line: int
    path: str
    caption: str
    fault: str


class Picture(NamedTuple):
    """What decoding a picture told: its size in pixels, Pillow's mode (L, RGB ...), what is wrong ("": nothing)."""

    width: int = 0
    height: int = 0
    mode: str = ""
    fault: str = ""


def check_constants() -> None:
    """Refuses constants that no run can work with."""
    if ON_BAD_SAMPLE not in ("stop", "drop"):
        raise SystemExit(f'ON_BAD_SAMPLE is {ON_BAD_SAMPLE!r}: set it to "stop" or "drop".')
    if CHECK_WORKERS < 1:
        raise SystemExit(f"CHECK_WORKERS is {CHECK_WORKERS}: set it to 1 or more threads.")
    if token := re.search(SPECIAL_TOKEN, PROMPT):
        raise SystemExit(f"PROMPT contains the special token {token[0]}: remove it, the chat template sets those.")


def read_rows() -> list[Row]:
    """All rows of the CSV in their order; exits with one sentence where the file is not such a table."""
    csv.field_size_limit(2**31 - 1)  # the most that a C long holds on Windows; Python's default is 128 KiB a caption
    try:
        with open(CSV_PATH, encoding="utf-8-sig", newline="") as file:  # -sig: with or without a byte order mark
            reader = csv.DictReader(file, restkey="surplus", restval="", strict=True)
            if not {"image_path", "caption"} <= set(reader.fieldnames or []):
                found = ", ".join(reader.fieldnames or ["none, it is empty"])
                raise SystemExit(f"{CSV_PATH} has the columns {found}; image_path and caption must be among them.")
            rows = [make_row(reader.line_num, fields) for fields in reader]
    except FileNotFoundError:
        raise SystemExit(f"{CSV_PATH} is missing: run data2csv.py first, or set CSV_PATH to your own table.") from None
    except UnicodeDecodeError:
        raise SystemExit(f"{CSV_PATH} is not UTF-8 but perhaps GBK: save it again as 'CSV UTF-8' (Excel).") from None
    except csv.Error as error:
        raise SystemExit(f"{CSV_PATH}, line {reader.line_num}: {error}; is a quote without its partner?") from None
    if not rows:
        raise SystemExit(f"{CSV_PATH} has no row below its header: there is nothing to convert.")
    return rows


def make_row(line: int, fields: dict) -> Row:
    """Strips the ends of both fields: white space before <|im_end|> is nothing that a model should learn to say."""
    path, caption = fields["image_path"].strip(), fields["caption"].strip()
    fault = ""
    if "surplus" in fields:
        fault = "more fields than columns: a caption with a comma in it wants double quotes around it"
    elif not path or not caption:
        fault = "image_path or caption is empty"
    elif "<|" in path or len(path.splitlines()) > 1:
        fault = "image_path has '<|' or a line break in it: rename the file"
    elif token := re.search(SPECIAL_TOKEN, caption):  # it would forge a turn or a picture in the conversation
        fault = f"caption has a special token of the model in it: {token[0]}"
    return Row(line, path if fault else path_in_json(path), caption, fault)


def path_in_json(path: str) -> str:
    """An absolute path or URL as it stands; a relative one from the JSON's folder, with forward slashes."""
    if "://" in path or path.startswith("/") or PureWindowsPath(path).is_absolute():
        return path
    file = folder_of(CSV_PATH) / path.replace("\\", "/")
    try:
        return Path(os.path.relpath(file, folder_of(JSON_PATH))).as_posix()
    except ValueError:  # Windows: the CSV and the JSON lie on different drives
        return file.as_posix()


@functools.cache
def folder_of(path: str) -> Path:
    """The real folder of a file, links resolved, so that ".." leads from it to where the system says it leads."""
    return Path(path).parent.resolve()


def check_picture(path: str) -> Picture:
    """Opens what train.py will open and decodes it to the last byte: only that finds a download that broke off."""
    place = url2pathname(path.removeprefix("file://")) if path.startswith("file://") else path
    file = os.path.normpath(folder_of(JSON_PATH) / place)  # the folder falls away where the place is absolute
    try:
        with Image.open(file) as picture:
            width, height = picture.size  # read from the head of the file, nothing is decoded yet
            small, large = sorted(picture.size)
            if small < MIN_SIDE or large > MAX_RATIO * small or small * large > MAX_PIXELS:
                return Picture(fault=f"picture's size breaks MIN_SIDE, MAX_RATIO or MAX_PIXELS: {width}x{height}")
            picture.load()
            return Picture(width, height, picture.mode)
    except FileNotFoundError:
        return Picture(fault=f"picture is missing: {file}")
    except UnidentifiedImageError:
        return Picture(fault=f"file is no picture, whatever its name says: {os.path.getsize(file)} bytes")
    except Exception as error:  # Pillow raises a dozen kinds of error on damaged files; each one is named with its row
        return Picture(fault=f"picture does not decode: {error}")


def check_pictures(rows: list[Row]) -> dict[str, Picture]:
    """What each distinct picture on this disk is, by its path; those on the web are left to the training."""
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS takes its place: checked before decoding, and it tells the reason
    paths = {row.path: None for row in rows if not row.fault and not row.path.startswith(("http://", "https://"))}
    with ThreadPoolExecutor(CHECK_WORKERS) as pool:
        checks = tqdm(pool.map(check_picture, paths), total=len(paths), desc="checking", unit="picture")
        return dict(zip(paths, checks, strict=True))


def sort_out(rows: list[Row], pictures: dict[str, Picture]) -> tuple[list[Row], Counter[str]]:
    """The rows to train on, each once, and the number left out by reason; names the bad ones, and may stop there."""
    good, bad, dropped = {}, [], Counter()
    for row in rows:
        if fault := row.fault or pictures.get(row.path, Picture()).fault:
            bad.append(f"  line {row.line}, {row.path[:100]!r}: {fault}")
            dropped[fault.partition(":")[0]] += 1
        elif (row.path, row.caption) in good:
            dropped["same picture and same caption as a row before"] += 1
        else:
            good[row.path, row.caption] = row
    if bad:
        print(f"{len(bad)} of {len(rows)} rows of {CSV_PATH} can't be used, the first of them:")
        print(*bad[:BAD_SHOWN], sep="\n")
    if bad and ON_BAD_SAMPLE == "stop":
        raise SystemExit(f'{JSON_PATH} is as it was: mend the {len(bad)} rows above, or set ON_BAD_SAMPLE to "drop".')
    if not good:
        raise SystemExit(f"{JSON_PATH} is as it was: not one row of {CSV_PATH} can be used.")
    return list(good.values()), dropped


def make_record(number: int, row: Row) -> dict:
    """The conversation of a row."""
    question = f"{PROMPT}<|vision_start|>{row.path}<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": row.caption}]
    return {"id": f"identity_{number}", "conversations": turns}


def write_json(records: list[dict]) -> None:
    """Writes beside the old file, then renames: killed at any moment, the old file or the new one is there, whole."""
    Path(JSON_PATH).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{JSON_PATH}.tmp", "w", encoding="utf-8", newline="\n") as file:
        json.dump(records, file, ensure_ascii=False, indent=2)
    os.replace(f"{JSON_PATH}.tmp", JSON_PATH)


def print_summary(rows: list[Row], pictures: dict[str, Picture], dropped: Counter[str]) -> None:
    """What the training will see, in numbers."""
    paths = {row.path for row in rows}
    seen = [pictures[path] for path in paths if path in pictures]
    words = [len(row.caption.split()) for row in rows]
    print(f"{len(paths)} pictures, {len(rows)} captions, {len(rows) / len(paths):.2f} captions a picture")
    print(f"{min(words)} to {max(words)} words a caption, mean {sum(words) / len(words):.1f}")
    if seen:
        widths, heights, modes, _ = zip(*seen, strict=True)
        kinds = ", ".join(f"{count} {mode}" for mode, count in Counter(modes).most_common())
        print(f"{min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high; colours: {kinds}")
    if len(seen) < len(paths):
        print(f"NOT CHECKED: {len(paths) - len(seen)} pictures on the web (http): train.py fetches them, if it may")
    for reason, count in dropped.most_common():
        print(f"DROPPED: {count} rows, {reason}")


def print_as_trained(record: dict) -> None:
    """A conversation in the model's chat format; the path stands where the model will see the picture."""
    question, answer = [turn["value"] for turn in record["conversations"]]
    print(f"{record['id']} as it will be trained, only what stands in [[ ]] is learnt:")
    print("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    print(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n[[{answer}<|im_end|>]]")


def main() -> None:
    """Reads the table, checks every row and picture, writes the conversations and says what is in them."""
    sys.stdout.reconfigure(errors="replace")  # not every Windows console knows every character of a caption
    check_constants()
    rows = read_rows()
    pictures = check_pictures(rows)
    rows, dropped = sort_out(rows, pictures)
    records = [make_record(number, row) for number, row in enumerate(rows, start=1)]
    write_json(records)
    print_summary(rows, pictures, dropped)
    print_as_trained(records[0])
    print(f"{len(records)} conversations written to {JSON_PATH}")


if __name__ == "__main__":
    main()
