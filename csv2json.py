"""Step 2 of 4: turn the table of images and captions into the conversations that train.py reads.

Reads   coco-2024-dataset.csv (from data2csv.py, or your own) and every image it names.
        The table is UTF-8 and has the columns image_path and caption, and perhaps question:
        what to ask instead of PROMPT. Relative paths count from the folder of the CSV.
Writes  data_vl.json: one conversation per row, with the question and the caption as its answer.
Run     python csv2json.py
Takes   a second for 500 images, 2 minutes for COCO's 82,783 (2 cores, under 1 GB of memory).

Every image is decoded to its last byte, and every row that can't be used is listed with the reason:
half an image or an empty caption would stop a training hours later, or quietly spoil it.
"""

import builtins
import contextlib
import csv
import difflib
import functools
import hashlib
import json
import os
import re
import signal
import stat
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from types import FrameType
from typing import IO, Annotated, Literal, NamedTuple, NoReturn, get_type_hints
from urllib.parse import unquote

import regex
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from tqdm import tqdm

# The rules of the constants; the lambdas, because the functions stand below them
PathText = Annotated[str, AfterValidator(lambda path: check_path(path))]
Prompt = Annotated[str, AfterValidator(lambda text: check_prompt(text))]
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"]
ImageFormats = Annotated[list[Format], Field(min_length=1)]

# --------------------------------------------------------------------------------------------------
# Files
CSV_PATH: PathText = "coco-2024-dataset.csv"  # written by data2csv.py, or your own table
# Relative image paths in the JSON count from its own folder
DATA_JSON: PathText = "data_vl.json"  # read by train.py

# Text
# In English: "Please describe this image: ". A row's own question takes its place.
PROMPT: Prompt = "请描述这张图片: "  # what the user says before the image

# Checks
ON_BAD_SAMPLE: Literal["stop", "drop"] = "stop"  # "stop" writes nothing, "drop" leaves bad rows out
IMAGE_FORMATS: ImageFormats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow's names
MIN_SIDE: PositiveInt = 28  # pixels; the model sees squares of 28 x 28
MAX_RATIO: Annotated[int, Field(ge=1, le=200)] = 200  # long side / short side; Qwen2-VL's own limit
# Against small files that unpack to gigabytes; Pillow opens at most 178,956,970 pixels in train.py
MAX_FILE_PIXELS: Annotated[int, Field(ge=1, le=178_956_970)] = 89_478_485  # width x height
CHECK_THREADS: Annotated[int, Field(ge=1, le=64)] = 8  # images decoded at a time, on all cores
# --------------------------------------------------------------------------------------------------

# Not blanks and controls, nor what has no ink: zero-width space, Hangul filler, empty Braille cell
# (\p{C} as a whole would be wrong: emoji that are younger than the package count as unassigned)
VISIBLE = regex.compile(r"[^\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]")
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")  # <|im_end|> and the like; the model has 14


class Row(NamedTuple):
    """A row of the table."""

    line: int  # of the CSV, where the row ends
    image: str  # path as it stands in the JSON; in a bad row as it stands in the CSV
    question: str
    caption: str
    fault: str  # what is wrong with the row; "" if nothing is


class ImageCheck(NamedTuple):
    """What decoding an image has shown."""

    fault: str  # "" if train.py can use the image
    content: bytes = b""  # hash of the file, the same for copies of it


# ---- Shared with the other scripts ---------------------------------------------------------------


def check_path(path: str) -> str:
    """Expand ~ in a path constant, and refuse text that can't be a path here."""
    # "e:\new" is a line break between "e:" and "ew": Python reads \n as one character
    if not path.strip() or any(ord(character) < 32 for character in path):
        raise ValueError(r'it should be a path, such as "e:/LLM/new" or r"e:\LLM\new"')
    if os.name != "nt" and PureWindowsPath(path).drive:
        raise ValueError("it should be a path of this system, which has no drives")
    return os.path.expanduser(path)


def check_constants() -> None:
    """Stop with one sentence if a constant at the top has an impossible value."""
    script = sys.modules[__name__]
    for name, rule in get_type_hints(script, include_extras=True).items():
        value = getattr(script, name)
        try:
            checked = TypeAdapter(rule, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
            reason = re.sub(r"\b(Input|String|List) should", "it should", " or ".join(reasons))
            raise SystemExit(
                f"{name} = {value!r} at the top of {Path(__file__).name} can't work: {reason}."
            ) from None
        setattr(script, name, checked)  # a path with ~ expanded, all else as it was


def prepare_console() -> None:
    """Let print and progress bars work on every console: code pages, notebooks, pythonw."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # pythonw.exe has no console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            # Line by line, or what was printed to a log file is lost when the script is stopped
            stream.reconfigure(errors="replace", line_buffering=True)


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call handler on Ctrl-C, kill, a closed terminal, and Ctrl-Break on Windows."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)  # Windows lacks SIGHUP, the others SIGBREAK
        # nohup ignores SIGHUP on purpose: leave it ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End the script at once, without waiting for its threads."""
    if number == signal.SIGINT and "get_ipython" in dir(builtins):
        raise KeyboardInterrupt  # ends a notebook's cell, and not the notebook
    with contextlib.suppress(OSError):  # pythonw.exe and a closed terminal take no text
        os.write(2, b"\nStopped. Finished files are kept. Run again to continue.\n")
    os._exit(128 + number)


def check_writable(folder: str | Path) -> None:
    """Make a folder, and stop with one sentence if nothing can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise SystemExit(
            f"Can't write to {Path(folder).absolute()} ({reason}). "
            f"Choose another folder at the top of {Path(__file__).name}."
        ) from None


@contextlib.contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that replaces path once it is whole and on the disk."""
    unfinished = Path(f"{path}.tmp")
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else "\n"
    try:
        with open(unfinished, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave an empty file under the new name
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


# ---- Constants and files -------------------------------------------------------------------------


def check_prompt(text: str) -> str:
    """Refuse a prompt that the model must not see."""
    fault = find_text_fault(text)
    if fault:
        raise ValueError(f"it contains a {fault}")
    return text


def check_files() -> None:
    """Stop before the long work if the table isn't there, or the JSON can't be written."""
    if not os.path.isfile(CSV_PATH):
        problem = "is not a file" if os.path.exists(CSV_PATH) else "is missing"
        raise SystemExit(
            f"{os.path.abspath(CSV_PATH)} {problem}. Run data2csv.py first, "
            f"or set CSV_PATH to your own table."
        )
    check_writable(os.path.dirname(DATA_JSON) or ".")
    for path in (DATA_JSON, f"{DATA_JSON}.tmp"):
        problem = ""
        try:
            # Neither makes nor changes a file, but fails if its name is too long or it is locked
            with open(path, "r+b") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    problem = "it is not a file"
                if os.path.samefile(path, CSV_PATH):
                    problem = "it is CSV_PATH"
        except FileNotFoundError:
            pass
        except OSError as error:
            problem = error.strerror
        if problem:
            raise SystemExit(f"Can't write {path} ({problem}): set DATA_JSON to another file.")


# ---- The table -----------------------------------------------------------------------------------


def read_rows() -> list[Row]:
    """Return all rows of the CSV in order, or stop with one sentence if it isn't such a table."""
    # The largest C long on Windows; Python's default is 128 KiB per caption
    csv.field_size_limit(2**31 - 1)
    try:
        # -sig: with or without a byte order mark
        with open(CSV_PATH, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            # UTF-16 without a mark is UTF-8 with a NUL behind each letter
            if "\0" in header:
                raise UnicodeError
            # Excel writes semicolons where the comma is the decimal sign
            separator = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, restval="", delimiter=separator, strict=True)
            check_columns(list(reader.fieldnames or []))
            rows = [make_row(reader.line_num, fields) for fields in reader]
    except OSError as error:
        raise SystemExit(f"{CSV_PATH} can't be read ({error.strerror}).") from None
    except UnicodeError:
        raise SystemExit(
            f"{CSV_PATH} is not UTF-8 text, but perhaps GBK, UTF-16 or an Excel workbook. "
            f"In Excel, save it as 'CSV UTF-8'."
        ) from None
    except csv.Error as error:
        raise SystemExit(
            f"{CSV_PATH}, in the row that begins on line {reader.line_num + 1}: {error}. "
            f"Is a quote missing its partner?"
        ) from None
    if not rows:
        raise SystemExit(f"{CSV_PATH} has no row below its header: there is nothing to convert.")
    return rows


def check_columns(names: list[str]) -> None:
    """Stop with one sentence if the columns aren't called as they must be."""
    for column in ("image_path", "caption", "question"):
        # Without case, blanks, underscores and characters that nobody sees
        letters = column.replace("_", "")
        alike = [name for name in names if "".join(filter(str.isalnum, name)).lower() == letters]
        if alike == [column] or (not alike and column == "question"):
            continue
        raise SystemExit(
            f"{CSV_PATH} has the columns {names}. There must be one image_path and one caption, "
            f"and perhaps one question, written exactly so: one caption per row."
        )


def make_row(line: int, fields: dict) -> Row:
    """Clean and check what a line of the CSV says.

    White space at the ends goes: in front of <|im_end|> the model would learn to say it.
    """
    image_path = fields["image_path"].strip()
    image = "" if shows_nothing(image_path) else path_in_json(image_path)
    question = fields.get("question", "").strip()
    caption = fields["caption"].strip()
    if None in fields:
        fault = 'more fields than columns: put text with commas in straight double quotes (")'
    else:
        fault = find_row_fault(image, question, caption)
    if fault:
        image = fields["image_path"]
    if shows_nothing(question):
        question = PROMPT
    return Row(line, image, question, caption, fault)


def shows_nothing(text: str) -> bool:
    """Tell whether text is empty or has only blanks and characters that nobody sees."""
    return not VISIBLE.search(text)


def path_in_json(path: str) -> str:
    """Return a path of the CSV as the JSON has it.

    Relative paths count from the CSV there and from the JSON here. All others stay as they are.
    """
    if path.startswith("file:///"):
        path = unquote(path.removeprefix("file://"))
        path = re.sub("^/(?=[A-Za-z]:)", "", path)  # file:///c:/ is c:/
    if "://" not in path:
        path = path.replace("\\", "/")  # which Windows understands as well
    if "://" in path or path.startswith(("/", "data:")) or PureWindowsPath(path).is_absolute():
        return path
    file = folder_of(CSV_PATH) / path
    try:
        return Path(os.path.relpath(file, folder_of(DATA_JSON))).as_posix()
    except ValueError:  # Windows: the CSV and the JSON lie on different drives
        return file.as_posix()


@functools.cache
def folder_of(path: str) -> Path:
    """Return the real folder of a file: with links resolved, ".." leads where the system goes."""
    return Path(path).parent.resolve()


def find_row_fault(image: str, question: str, caption: str) -> str:
    """Return why train.py can't use a row, or ""."""
    if shows_nothing(caption):
        return "caption is empty"
    if not image:
        return "image_path is empty"
    # train.py finds a path between two special tokens, and strips it
    if "<|" in image or len(image.splitlines()) > 1 or image != image.strip():
        return "image_path contains '<|', a line break or a blank at its end: rename the file"
    # Windows would log in there with the user's name, whoever wrote the table
    if image.startswith("//"):
        return "image_path leads to another computer: copy the image to this one"
    if "://" in image or image.startswith("data:"):
        return "image_path is an address on the web or the like: download the image first"
    for column, text in (("image_path", image), ("question", question), ("caption", caption)):
        fault = find_text_fault(text)
        if fault:
            return f"{column} contains a {fault}"
    return ""


def find_text_fault(text: str) -> str:
    """Return what the model must not see in a text, or ""."""
    # "\ud83d\udc15" is a dog in JSON; copied to Python, it is the two halves of one
    if re.search("[\0\ud800-\udfff]", text):
        return "NUL character or a lone surrogate: write the character itself"
    token = SPECIAL_TOKEN.search(text)
    # It would forge a turn or an image in the conversation
    return f"special token of the model: {token[0]}" if token else ""


# ---- The images ----------------------------------------------------------------------------------


def check_images(rows: list[Row]) -> dict[str, ImageCheck]:
    """Check each distinct image once, in threads: Pillow decodes outside of Python's lock."""
    paths = list(dict.fromkeys(row.image for row in rows if not row.fault))
    print(f"Rows of {CSV_PATH}: {len(rows)}, distinct images: {len(paths)}")
    Image.MAX_IMAGE_PIXELS = None  # MAX_FILE_PIXELS takes its place, and names the reason
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        checks = pool.map(check_image, paths)
        bar = tqdm(checks, total=len(paths), desc="Checking images", unit=" images")
        return dict(zip(paths, bar, strict=True))


def check_image(path: str) -> ImageCheck:
    """Do all that train.py will do with an image, and hash its file."""
    if os.name != "nt" and PureWindowsPath(path).is_absolute():
        return ImageCheck(f"image lies on a Windows drive, and this is another system: {path}")
    # An absolute path overrides the folder
    file = Path(os.path.abspath(folder_of(DATA_JSON) / path))
    try:
        # Opening a named pipe or a device could wait forever
        if not stat.S_ISREG(file.stat().st_mode):
            return ImageCheck(f"image is a folder or a device, not a file: {file}")
        fault = find_image_fault(file)
        with open(file, "rb") as stream:
            return ImageCheck(fault, hashlib.file_digest(stream, "sha256").digest())
    except (FileNotFoundError, NotADirectoryError):
        return ImageCheck(describe_missing(file))
    except UnidentifiedImageError:
        size = file.stat().st_size
        return ImageCheck(f"file is damaged, or not one of IMAGE_FORMATS: it has {size} bytes")
    # Pillow raises a dozen kinds of errors on damaged files
    except Exception as error:
        return ImageCheck(f"image can't be read: {str(error) or type(error).__name__}")


def find_image_fault(file: Path) -> str:
    """Decode an image to its last byte, and return what is wrong with it or ""."""
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        # Both are in the head of the file: nothing is decoded yet
        pixels = image.width * image.height
        if pixels > MAX_FILE_PIXELS:
            return f"image has more pixels than MAX_FILE_PIXELS = {MAX_FILE_PIXELS:,}: {pixels:,}"
        # 16 or 32 bits; made RGB, all values above 255 would be white
        if image.mode.startswith(("I", "F")):
            return f"image has more than 8 bits per colour, save it with 8: mode {image.mode}"
        # Only the last byte shows a download that broke off
        ImageOps.exif_transpose(image, in_place=True)
        image.convert("RGBA" if image.has_transparency_data else "RGB")
        width, height = image.size  # upright, as train.py and everybody else sees it
    if min(width, height) < MIN_SIDE:
        return f"image has a side shorter than MIN_SIDE = {MIN_SIDE}: {width}x{height}"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"image is more than MAX_RATIO = {MAX_RATIO} times as long as wide: {width}x{height}"
    return ""


def describe_missing(file: Path) -> str:
    """Return the reason for an image that isn't there, with the file that was perhaps meant."""
    if file.is_symlink():
        return f"image is a link to a file that is missing: {file}"
    found = Path(file.anchor)
    for name in file.parts[1:]:
        if not os.path.exists(found / name):
            name = find_similar(found, name)
        found /= name
    if not found.is_file():
        return f"image is missing: {file}"
    same = unicodedata.normalize("NFC", str(file)) == unicodedata.normalize("NFC", str(found))
    hint = " (it looks the same, but its accents are other Unicode characters)" if same else ""
    return f"image is missing: {file}. Did you mean {found}?{hint}"


@functools.cache
def find_similar(folder: Path, name: str) -> str:
    """Return the name in a folder that was perhaps meant; without one, the name as it is."""
    names = list_folder(folder)
    spelling = plain_spelling(name)
    # Comparing each with each would take hours in a large folder
    if spelling in names or len(names) > 1000:
        return names.get(spelling, name)
    # 2.jpg is another image than 1.jpg, not a misspelling
    digits = re.findall(r"\d", name)
    candidates = [other for other in names if re.findall(r"\d", other) == digits]
    similar = difflib.get_close_matches(spelling, candidates, n=1, cutoff=0.9)
    return names[similar[0]] if similar else name


@functools.cache
def list_folder(folder: Path) -> dict[str, str]:
    """Return the names in a folder by their plain spelling."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {plain_spelling(name): name for name in names}


def plain_spelling(name: str) -> str:
    """Return a name in lower case and in one Unicode form: macOS takes é apart, e and an accent."""
    return unicodedata.normalize("NFC", name).casefold()


# ---- The result ----------------------------------------------------------------------------------


def sort_out(rows: list[Row], checks: dict[str, ImageCheck]) -> list[Row]:
    """Return the rows to train on, each once; list the others, and maybe stop there."""
    good, bad, reasons = {}, [], Counter()
    for row in rows:
        fault = row.fault or checks[row.image].fault
        if fault:
            bad.append(f"  line {row.line}, {row.image[:100]!r}: {fault}")
            reasons[fault.partition(":")[0]] += 1
            continue
        # By content: the same image may have two names
        key = (checks[row.image].content, row.question, row.caption)
        if key in good:
            reasons["same image, question and caption as an earlier row"] += 1
        else:
            good[key] = row
    if bad:
        print(f"{len(bad)} of {len(rows)} rows of {CSV_PATH} can't be used:", *bad, sep="\n")
    for reason, count in reasons.most_common():
        print(f"Rows not used: {count} ({reason})")
    if bad and ON_BAD_SAMPLE == "stop":
        raise SystemExit(
            f"Nothing was written to {DATA_JSON}. Fix the rows above (there are {len(bad)}), "
            f'or set ON_BAD_SAMPLE = "drop" to leave them out.'
        )
    if not good:
        raise SystemExit(f"Nothing was written to {DATA_JSON}: no row of {CSV_PATH} can be used.")
    return list(good.values())


def write_json(rows: list[Row]) -> None:
    """Write the conversations; until all are on the disk, an old JSON stays as it is."""
    records = []
    for number, row in enumerate(rows, start=1):
        question = f"{row.question}<|vision_start|>{row.image}<|vision_end|>"
        turns = [{"from": "user", "value": question}, {"from": "assistant", "value": row.caption}]
        records.append({"id": f"identity_{number}", "conversations": turns})
    try:
        with write_atomically(DATA_JSON) as file:
            json.dump(records, file, ensure_ascii=False, indent=2)
    except OSError as error:
        raise SystemExit(
            f"Can't write {DATA_JSON} ({error.strerror}), an old one is unchanged. "
            f"Free some space or close the programs that have it open, and run again."
        ) from None


def print_summary(rows: list[Row], checks: dict[str, ImageCheck]) -> None:
    """Print what the training will see, in numbers."""
    captions = Counter(checks[row.image].content for row in rows)
    single = list(captions.values()).count(1)
    # A Chinese character counts as one word
    word = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
    words = [len(word.findall(row.caption)) for row in rows]
    print(f"Images: {len(captions)}, {single} of them with only one caption")
    print(f"Captions: {len(rows)}, {len(rows) / len(captions):.2f} per image")
    print(f"Words per caption: {min(words)} to {max(words)}, mean {sum(words) / len(words):.1f}")
    own_questions = sum(row.question != PROMPT for row in rows)
    if own_questions:
        print(f"Questions other than PROMPT: {own_questions}")
    names = defaultdict(list)
    for path, check in checks.items():
        if not check.fault:
            names[check.content].append(path)
    copies = [paths for paths in names.values() if len(paths) > 1]
    if copies:
        print(
            f"Images under several names: {len(copies)}, such as {copies[0][0]!r} and "
            f"{copies[0][1]!r}. train.py keeps all names of an image on one side of its split."
        )


def main() -> None:
    """Read the table, check every row and image, write the conversations."""
    prepare_console()
    handle_stop_signals(stop)
    check_constants()
    check_files()
    rows = read_rows()
    checks = check_images(rows)
    rows = sort_out(rows, checks)
    write_json(rows)
    print_summary(rows, checks)
    print(f"Conversations written to {DATA_JSON}: {len(rows)}")


if __name__ == "__main__":
    main()
