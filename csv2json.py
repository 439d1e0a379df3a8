"""Step 2 of 4: turns the table of pictures and captions into the conversations that a training reads.

Reads   coco-2024-dataset.csv (from data2csv.py, or your own: two columns, `image_path` and `caption`, saved as UTF-8)
        and every picture that it names; relative paths count from the folder of the CSV.
Writes  data_vl.json: one conversation a row, "please describe this picture" and the caption as its answer.
Run     python csv2json.py
Takes   a second for 500 pictures, about 2 minutes for COCO's 82,783 (two cores); less than 1 GB of memory.

Bad data is cheapest to find here: half a picture or an empty caption would otherwise end a training hours later, or
quietly spoil it. So every picture is decoded to its last byte, and every row that can't be used is named.
"""

import contextlib
import csv
import functools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, TextIO
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# files
CSV_PATH = "coco-2024-dataset.csv"  # what data2csv.py wrote, or your own table
JSON_PATH = "data_vl.json"  # read by train.py; relative picture paths in it count from its own folder

# text
PROMPT = "请描述这张图片: "  # what the user says before the picture ("Please describe this picture: ")

# checks
ON_BAD_SAMPLE = "stop"  # "stop": name the bad rows and write nothing; "drop": name them and go on without them
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow's names; not EPS, it would start another program
MIN_SIDE = 28  # pixels: the model sees squares of 28x28, a thinner picture doesn't fill a single one
MAX_RATIO = 200  # long side / short side: Qwen2-VL's own preprocessing refuses more
MAX_PIXELS = 89_478_485  # width x height, against files that unpack to gigabytes; train.py opens twice as many
CHECK_WORKERS = 8  # threads: Pillow decodes outside Python's lock, so they use every core
# ----------------------------------------------------------------------------------------------------------------------

special_token = re.compile(r"<\|\w+\|>")  # the shape of the model's 14 special tokens, <|im_end|> and the like


class Row(NamedTuple):
    """A row of the CSV: the line where it ends, the picture's path as the JSON has it, what is wrong ("": nothing)."""

    line: int
    path: str
    caption: str
    fault: str


def check_constants() -> None:
    """Refuses constants that no run can work with, by their names, before anything is read."""
    Image.init()  # else Image.OPEN knows the five commonest formats only
    for names, is_legal, legal in (
        ("CSV_PATH JSON_PATH", lambda value: isinstance(value, str) and value and not os.path.isdir(value), "a file"),
        ("JSON_PATH", lambda value: os.path.abspath(value) != os.path.abspath(CSV_PATH), "another file than CSV_PATH"),
        ("PROMPT", lambda value: isinstance(value, str) and not special_token.search(value), "free of special tokens"),
        ("ON_BAD_SAMPLE", lambda value: value in ("stop", "drop"), '"stop" or "drop"'),
        ("FORMATS", lambda value: isinstance(value, list) and value and set(value) <= set(Image.OPEN), 'like ["PNG"]'),
        ("MIN_SIDE MAX_RATIO MAX_PIXELS CHECK_WORKERS", lambda value: type(value) is int and value > 0, "1 or more"),
        ("MAX_PIXELS", lambda value: value <= 178_956_970, "178956970 at most, Pillow opens no more in train.py"),
    ):
        for name in names.split():
            if not is_legal(value := globals()[name]):
                raise SystemExit(f"{name} = {value!r} at the top of csv2json.py can't work: it must be {legal}.")


def stop(number: int, _) -> None:
    """Ends the script at once on Ctrl-C or SIGTERM, whatever its threads are decoding."""
    os.write(2, b"\nStopped. No file is half written: run again to start over.\n")
    os._exit(128 + number)


def read_rows() -> list[Row]:
    """All rows of the CSV in their order; exits with one sentence where the file is not such a table."""
    csv.field_size_limit(2**31 - 1)  # the most that a C long holds on Windows; Python's default is 128 KiB a caption
    try:
        with open(CSV_PATH, encoding="utf-8-sig", newline="") as file:  # -sig: with or without a byte order mark
            reader = csv.DictReader(file, restkey="surplus", restval="", strict=True)
            if not {"image_path", "caption"} <= set(reader.fieldnames or []):
                found = reader.fieldnames or "(none, it is empty)"
                raise SystemExit(f"{CSV_PATH} has the columns {found}; image_path and caption must be among them.")
            rows = [make_row(reader.line_num, fields) for fields in reader]
    except OSError as error:
        hint = "run data2csv.py first, or set CSV_PATH to your own table"
        raise SystemExit(f"{CSV_PATH} can't be read ({error.strerror}): {hint}.") from None
    except UnicodeDecodeError:
        raise SystemExit(f"{CSV_PATH} is not UTF-8 but perhaps GBK: save it again as 'CSV UTF-8' (Excel).") from None
    except csv.Error as error:
        raise SystemExit(f"{CSV_PATH}, line {reader.line_num}: {error}; is a quote without its partner?") from None
    if not rows:
        raise SystemExit(f"{CSV_PATH} has no row below its header: there is nothing to convert.")
    return rows


def make_row(line: int, fields: dict) -> Row:
    """Strips the ends of both fields: white space before <|im_end|> is nothing that a model should learn to say."""
    path, caption = path_in_json(fields["image_path"].strip()), fields["caption"].strip()
    fault = ""
    if "surplus" in fields:
        fault = "more fields than columns: a caption with a comma in it wants double quotes around it"
    elif not fields["image_path"].strip() or not caption:
        fault = "image_path or caption is empty"
    elif "\0" in path + caption:
        fault = "NUL character in image_path or caption: the file is damaged, or no text"
    elif "<|" in path or len(path.splitlines()) > 1 or path != path.strip():
        fault = "image_path has '<|', a line break or a blank at its end in it: rename the file"
    elif path.startswith("//"):  # Windows would log in there with the user's name, whoever wrote the table
        fault = "image_path leads to another computer: copy the picture to this one"
    elif "://" in path or path.startswith("data:"):
        fault = "image_path is an address on the web or the like: download the picture first, and name its file"
    elif token := special_token.search(caption):  # it would forge a turn or a picture in the conversation
        fault = f"caption has a special token of the model in it: {token[0]}"
    return Row(line, fields["image_path"] if fault else path, caption, fault)


def path_in_json(path: str) -> str:
    """A relative path, which counts from the CSV, as it counts from the JSON; all others as they stand."""
    if path.startswith("file:///"):  # of file:///c:/ the third slash goes, too
        path = re.sub("^/(?=[A-Za-z]:)", "", unquote(path.removeprefix("file://")))
    path = path if "://" in path else path.replace("\\", "/")  # which Windows understands as well
    if "://" in path or path.startswith(("/", "data:")) or PureWindowsPath(path).is_absolute():
        return path
    file = folder_of(CSV_PATH) / path
    try:
        return Path(os.path.relpath(file, folder_of(JSON_PATH))).as_posix()
    except ValueError:  # Windows: the CSV and the JSON lie on different drives
        return file.as_posix()


@functools.cache
def folder_of(path: str) -> Path:
    """The real folder of a file, links resolved, so that ".." leads from it to where the system says it leads."""
    return Path(path).parent.resolve()


def check_picture(path: str) -> str:
    """What is wrong with a picture; does all that train.py will do, for only the last byte tells half a download."""
    file = folder_of(JSON_PATH) / path  # the folder falls away where the path is absolute
    if os.name != "nt" and PureWindowsPath(path).is_absolute():
        return f"picture lies on a drive of Windows, and this is another system: {path}"
    if not os.path.isfile(file):  # a folder or device is none; and opening a pipe would wait for ever
        return f"picture is missing: {file}"
    try:
        with Image.open(file, formats=FORMATS) as picture:
            small, large = sorted(picture.size)  # read from the head of the file, nothing is decoded yet
            if small < MIN_SIDE or large > MAX_RATIO * small or small * large > MAX_PIXELS:
                return f"picture's size breaks MIN_SIDE, MAX_RATIO or MAX_PIXELS: {picture.width}x{picture.height}"
            if picture.mode[0] in "IF":  # 16 or 32 bits a pixel; in RGB whatever is above 255 becomes white
                return f"picture has more than 8 bits a colour, save it with 8: its mode is {picture.mode}"
            ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        return f"file is no picture of FORMATS, whatever its name says: {os.path.getsize(file)} bytes"
    except Exception as error:  # Pillow raises a dozen kinds of error on damaged files; each one is named with its row
        return f"picture does not decode: {error}"
    return ""


def check_pictures(rows: list[Row]) -> dict[str, str]:
    """What is wrong with each distinct picture."""
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS takes its place: checked before decoding, and it tells the reason
    paths = {row.path: None for row in rows if not row.fault}
    with ThreadPoolExecutor(CHECK_WORKERS) as pool:
        checks = tqdm(pool.map(check_picture, paths), total=len(paths), desc="checking", unit="picture")
        return dict(zip(paths, checks, strict=True))


def sort_out(rows: list[Row], pictures: dict[str, str]) -> list[Row]:
    """The rows to train on, each once; names the others with the reason, counts them, and may stop there."""
    good, bad, reasons = {}, [], Counter()
    for row in rows:
        if fault := row.fault or pictures.get(row.path):
            bad.append(f"  line {row.line}, {row.path[:100]!r}: {fault}")
            reasons[fault.partition(":")[0]] += 1
        elif (row.path, row.caption) in good:
            reasons["same picture and same caption as a row before"] += 1
        else:
            good[row.path, row.caption] = row
    if bad:
        print(f"{len(bad)} of {len(rows)} rows of {CSV_PATH} can't be used:", *bad, sep="\n")
    for reason, count in reasons.most_common():
        print(f"NOT USED: {count} rows, {reason}")
    if bad and ON_BAD_SAMPLE == "stop":
        raise SystemExit(f'{JSON_PATH} is as it was: mend the {len(bad)} rows above, or set ON_BAD_SAMPLE to "drop".')
    if not good:
        raise SystemExit(f"{JSON_PATH} is as it was: not one row of {CSV_PATH} can be used.")
    return list(good.values())


def make_record(number: int, row: Row) -> dict:
    """The conversation of a row."""
    question = f"{PROMPT}<|vision_start|>{row.path}<|vision_end|>"
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": row.caption}]
    return {"id": f"identity_{number}", "conversations": turns}


@contextlib.contextmanager
def new_json() -> Iterator[TextIO]:
    """A file beside JSON_PATH that takes its place once it is whole; until then an old JSON stays as it is."""
    part = Path(f"{JSON_PATH}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(part, JSON_PATH)
    except OSError as error:
        hint = "close what has it open, make room on the disk, or set JSON_PATH to another place"
        raise SystemExit(f"{JSON_PATH} can't be written ({error}), an old one is as it was: {hint}.") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            part.unlink()


def print_summary(rows: list[Row]) -> None:
    """What the training will see, in numbers."""
    paths = {row.path for row in rows}
    words = [len(row.caption.split()) for row in rows]
    print(f"{len(paths)} pictures, {len(rows)} captions, {len(rows) / len(paths):.2f} captions a picture")
    print(f"{min(words)} to {max(words)} words a caption, mean {sum(words) / len(words):.1f}")
    files = (Path(os.path.abspath(folder_of(JSON_PATH) / path)) for path in paths)
    if outside := sorted({file.parent.as_posix() for file in files if not file.is_relative_to(folder_of(JSON_PATH))}):
        print(f"IMAGE_FOLDERS in train.py has to name these, too ({len(outside)} in all), or one above: {outside[:3]}")


def main() -> None:
    """Reads the table, checks every row and picture, writes the conversations and says what is in them."""
    sys.stdout.reconfigure(errors="replace")  # not every Windows console knows every character of a caption
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, stop)
    check_constants()
    rows = read_rows()
    with new_json() as file:  # opened here: that it can't be written is told before the pictures are decoded
        rows = sort_out(rows, check_pictures(rows))
        records = [make_record(number, row) for number, row in enumerate(rows, start=1)]
        json.dump(records, file, ensure_ascii=False, indent=2)
    print_summary(rows)
    print(f"{len(rows)} conversations written to {JSON_PATH}")


if __name__ == "__main__":
    main()
