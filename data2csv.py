"""Step 1 of 4: download the COCO 2014 captions and the first 500 images, and list them in a CSV.

Reads   the caption table of the dataset modelscope/coco_2014_caption, which is downloaded once
        and kept, and the images that it names.
Writes  coco_2014_caption/IMAGE_ID.jpg, the images exactly as they are served; preview.jpg beside
        them, the first images with their captions; and coco-2024-dataset.csv, one row per caption
        with the columns image_path and caption, up to five rows per image.
Run     python data2csv.py
Takes   a few minutes for 500 images (80 MB) and at most 350 MB of memory. If interrupted, run it
        again to resume.
"""

import builtins
import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path, PureWindowsPath
from types import FrameType
from typing import IO, Annotated, Literal, NamedTuple, NoReturn, TypeVar, get_type_hints

import regex
import requests
import urllib3
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from requests.adapters import HTTPAdapter
from tqdm import tqdm

# The rules of the constants; a lambda, because the function stands below them
PathText = Annotated[str, AfterValidator(lambda path: check_path(path))]
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"]
ImageFormats = Annotated[list[Format], Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]")]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Pause = Annotated[float, Field(ge=0, le=3600)]
Threads = Annotated[int, Field(ge=1, le=256)]
PreviewPixels = Annotated[int, Field(ge=8, le=2000)]
Few = Annotated[int, Field(ge=1, le=200)]

# --------------------------------------------------------------------------------------------------
# Data
MAX_DATA_NUMBER: PositiveInt | None = 500  # the table's first images; None: all 82,783 (13.5 GB)
CAPTIONS_PER_IMAGE: PositiveInt = 5  # at most; COCO has five captions per image, seldom more
IMAGE_FORMATS: ImageFormats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow's names
IMAGE_BYTES: PositiveInt = 163_000  # size of an average image, for the estimate
MAX_FILE_BYTES: PositiveInt = 500_000_000  # longer downloads are given up; COCO's table: 240 MB
MAX_IMAGE_BYTES: PositiveInt = 50_000_000  # images with more are refused
# As in csv2json.py: against small files that unpack to gigabytes
MAX_FILE_PIXELS: Annotated[int, Field(ge=1, le=178_956_970)] = 89_478_485  # width x height

# Output
IMAGE_FOLDER: PathText = "coco_2014_caption"
CSV_PATH: PathText = "coco-2024-dataset.csv"
TABLE_FOLDER: PathText = ".cache/coco_2014_caption"  # keeps the table; delete it to update

# Preview
PREVIEW_IMAGES: Few = 24
PREVIEW_COLUMNS: Few = 6  # images side by side
PREVIEW_WIDTH: PreviewPixels = 256  # of an image
PREVIEW_HEIGHT: PreviewPixels = 192
PREVIEW_FONT_SIZE: PreviewPixels = 16
PREVIEW_LINES: Few = 3  # of a caption, which is cut after them
# For Chinese captions, the first that is installed: of Windows, macOS, Linux, Linux
FONTS: list[PathText] = ["msyh.ttc", "PingFang.ttc", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc"]

# Sources
MODELSCOPE_URL: Url = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
# Where the table was found before, newest first: if ModelScope doesn't say where it is
TABLE_URLS: Annotated[list[Url], Field(min_length=1)] = [
    "https://modelscope.oss-cn-beijing.aliyuncs.com/open_data/coco_2014_caption/train2014.csv.zip",
    "http://xingchen-data.oss-cn-zhangjiakou.aliyuncs.com/coco/2014/train.csv.zip",
]
COCO_URL: Url = "http://images.cocodataset.org"  # asked last: the same images and captions

# Network
DOWNLOAD_THREADS: Threads = 16  # images downloaded at the same time
CONNECT_TIMEOUT: Seconds = 10.0
READ_TIMEOUT: Seconds = 20.0  # without a single byte
MIN_SPEED: PositiveInt = 1000  # bytes per second, on average after READ_TIMEOUT
ROUNDS: PositiveInt = 2  # how often each source is tried
BACKOFF: Pause = 3.0  # seconds before the second round, twice as many before the third
HOST_FAILURES: PositiveInt = 8  # in a row; then the other host is tried first
MAX_FAILURES: PositiveInt = 32  # images in a row that no host has; then the script stops
# --------------------------------------------------------------------------------------------------

# The dataset's loader script names the table's address. It is read as text and never run.
LOADER = (
    "/api/v1/datasets/modelscope/coco_2014_caption/repo"
    "?Revision=master&FilePath=coco_2014_caption.py"
)
ANNOTATIONS = "annotations/captions_train2014.json"  # inside COCO's archive of 240 MB
# Not blanks and controls, nor what has no ink: zero-width space, Hangul filler, empty Braille cell
# (\p{C} as a whole would be wrong: emoji that are younger than the package count as unassigned)
VISIBLE = regex.compile(r"[^\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]")
# Kinds of proxies, and the port where an address names none
PROXY_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}
Content = TypeVar("Content")
Reader = Callable[[Path], Content]  # of a downloaded file; raises BadFile if it is damaged


class BadFile(Exception):
    """A file or an answer that can't be used; its text says why."""


class Entry(NamedTuple):
    """What the table knows about an image: where it may be found, and its captions."""

    urls: list[str]
    captions: list[str]


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


@functools.cache  # thousands of images come from the same few hosts
def check_proxy(url: str) -> str:
    """Return which variables set the proxy for an address, and stop if that proxy can't work.

    The proxy itself is never shown, because it may contain a password.
    """
    proxies = requests.utils.get_environ_proxies(url)
    proxy = requests.utils.select_proxy(url, proxies)
    if not proxy:
        return ""
    names = [name for name in os.environ if name.lower().endswith("_proxy")]
    names = sorted(name for name in names if os.environ[name] == proxy)
    place = " and ".join(names) or "the settings of your system"
    try:
        parts = urllib3.util.parse_url(proxy)
        port = PROXY_PORTS[parts.scheme or "http"]
        address = (parts.host.strip("[]"), parts.port or port)
        socket.create_connection(address, CONNECT_TIMEOUT).close()
    # All but OSError: no such kind, host or port
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "misspelt"
        raise SystemExit(
            f"The proxy in {place} can't be used ({reason}). Write it as http://HOST:PORT or "
            "socks5://HOST:PORT and start it, or delete the setting."
        ) from None
    return place


def shows_nothing(text: str) -> bool:
    """Tell whether text is empty or has only blanks and characters that nobody sees."""
    return not VISIBLE.search(text)


# ---- Download ------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the writes inside into one sentence: what, where, what to do."""
    try:
        yield
    except OSError as error:
        raise SystemExit(
            f"Can't write {Path(path).absolute()} ({error.strerror}). Free some space, or close "
            "the file if another program (such as Excel) has it open, and run again."
        ) from None


def host_of(url: str) -> str:
    """Return a URL without its file name: one server may hold several sources."""
    return url.rpartition("/")[0]


class Downloader:
    """Downloads files in many threads, first from the hosts that work."""

    def __init__(self) -> None:
        """Open a session that keeps one connection per thread."""
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=DOWNLOAD_THREADS))
        # Of each host, in a row. Threads may lose a count, which only delays the conclusion.
        self.failures = Counter()
        self.stopping = threading.Event()  # set when the script gives up: downloads end early

    def fetch(
        self, path: Path, urls: Iterable[str], read: Reader, label: str = ""
    ) -> Content | None:
        """Return read(path), downloading path first if need be; None if no URL has a good file.

        A label shows a progress bar.
        """
        with contextlib.suppress(BadFile):
            return read(path)
        unfinished = Path(f"{path}.tmp")
        problems = []
        try:
            for url in self.attempts(urls):
                if self.stopping.is_set():
                    return None
                try:
                    self.download(url, unfinished, label)
                    content = read(unfinished)
                # Every error of requests is an OSError; a full disk has become SystemExit
                except (OSError, urllib3.exceptions.HTTPError, BadFile) as error:
                    problems.append(f"{url}: {error}")
                    self.failures[host_of(url)] += 1
                else:
                    with explain_write_errors(path):
                        os.replace(unfinished, path)
                    self.failures[host_of(url)] = 0
                    return content
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
        if not self.stopping.is_set():
            tqdm.write("\n  ".join([f"{path} could not be downloaded:", *problems]))
        return None

    def attempts(self, urls: Iterable[str]) -> Iterator[str]:
        """Yield the URLs once per round, those of failing hosts last."""
        urls = dict.fromkeys(urls)  # without duplicates
        failing_last = sorted(urls, key=lambda url: self.failures[host_of(url)] >= HOST_FAILURES)
        for number in range(ROUNDS):
            self.stopping.wait(number * BACKOFF)
            yield from failing_last

    def download(self, url: str, path: Path, label: str) -> None:
        """Write to path what a URL gives, exactly as it is served, unless it is large or slow."""
        check_proxy(host_of(url))
        try:
            timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
            response = self.session.get(url, stream=True, timeout=timeout)
        except ValueError as error:  # what requests raises for a redirect to a malformed address
            raise BadFile(error) from error
        with response:
            response.raise_for_status()
            # urllib3's reading of Content-Length: None if it is missing or nonsense
            size = response.raw.length_remaining
            progress = tqdm(desc=label, total=size, unit="B", unit_scale=True, disable=not label)
            start = time.monotonic()
            with progress, explain_write_errors(path), open(path, "wb") as file:
                # read1 returns what has arrived; read would wait for all 64 KB of a trickle
                while piece := response.raw.read1(1 << 16, decode_content=True):
                    file.write(piece)
                    progress.update(len(piece))
                    received = file.tell()
                    if received > MAX_FILE_BYTES:
                        raise BadFile(f"larger than MAX_FILE_BYTES, {MAX_FILE_BYTES:,} bytes")
                    if time.monotonic() - start > READ_TIMEOUT + received / MIN_SPEED:
                        raise BadFile(f"slower than MIN_SPEED, {MIN_SPEED:,} bytes per second")
                    if self.stopping.is_set():
                        raise BadFile("stopped")


# ---- Table ---------------------------------------------------------------------------------------


def fetch_table(downloader: Downloader) -> dict[int, Entry]:
    """Return the caption table, from the first source that has it."""
    path = Path(TABLE_FOLDER, "train_captions.zip")
    annotations = f"{COCO_URL}/annotations/annotations_trainval2014.zip"
    # COCO's own comes last: all others get their second round before it
    for urls in (find_table_urls(downloader), [annotations]):
        table = downloader.fetch(path, urls, read_table, "table")
        if table:
            return table
    raise SystemExit(
        "The caption table could not be downloaded from any source above. "
        "Check your network and run again."
    )


def find_table_urls(downloader: Downloader) -> Iterator[str]:
    """Yield the addresses in the dataset's loader script, then those known before.

    A generator asks nobody anything before its first value is used: not if the table is there.
    """
    loader = Path(TABLE_FOLDER, "loader.py")
    with contextlib.suppress(OSError):
        loader.unlink()  # it may have changed
    yield from downloader.fetch(loader, [MODELSCOPE_URL.rstrip("/") + LOADER], read_loader) or []
    yield from TABLE_URLS


def read_loader(path: Path) -> list[str]:
    """Return the addresses of the table in the loader script."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    urls = re.findall(r"https?://[^\"'\s]*train[^\"'\s]*\.csv\.zip", text)
    if not urls:
        raise BadFile("it names no table; is this network behind a login page?")
    return urls


def read_table(path: Path) -> dict[int, Entry]:
    """Return the images of the table by their ids, in the table's order.

    The captions of an image stand far apart. All are kept, as the image costs a download only once.
    """
    table = {}
    empty = 0
    try:
        for row in read_records(*unpack(path)):
            image_id = str(row["image_id"])
            if not re.fullmatch(r"[0-9]{1,12}", image_id):  # it becomes a file name
                raise SystemExit(f"{path} has the image_id {image_id!r}, which is not a number.")
            image_id = int(image_id)
            caption = clean_caption(row["caption"])
            if not caption:
                empty += 1
                continue
            if image_id not in table:
                official = f"{COCO_URL}/train2014/COCO_train2014_{image_id:012d}.jpg"
                table[image_id] = Entry([row.get("image") or official, official], [])
            table[image_id].captions.append(caption)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise BadFile(f"{type(error).__name__}: {error}") from error
    if not table:
        raise BadFile("it holds no captions")
    print(f"The table has {len(table):,} images; {empty} empty captions dropped.")
    return table


def unpack(path: Path) -> tuple[str, bytes]:
    """Return name and content of the table in an archive, whose checksum is verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = max(archive.infolist(), key=lambda member: member.file_size).filename
            if ANNOTATIONS in archive.namelist():
                name = ANNOTATIONS
            return name, archive.read(name)
    # zipfile raises a dozen kinds of errors on damaged archives. No other code is inside the try.
    except Exception as error:
        raise BadFile(f"{type(error).__name__}: {error}") from error


def read_records(name: str, content: bytes) -> Iterator[dict]:
    """Yield the rows of ModelScope's CSV or of COCO's JSON."""
    if name == ANNOTATIONS:
        print("This is COCO's own table, in another order: other images come first.")
        yield from json.loads(content).get("annotations", [])
        return
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, restval="")
    missing = sorted({"image_id", "caption", "image"}.difference(rows.fieldnames or []))
    if rows.fieldnames and missing:
        raise SystemExit(f"The table {name} has no column {missing}, only {rows.fieldnames}.")
    yield from rows


def clean_caption(text: str) -> str:
    """Return a caption with single spaces, or "" if nothing of it can be seen."""
    text = text.encode("utf-8", "ignore").decode("utf-8")  # half a surrogate pair fits in no file
    return "" if shows_nothing(text) else " ".join(text.split())


# ---- Images --------------------------------------------------------------------------------------


def image_path(image_id: int) -> Path:
    """Return where an image is kept."""
    return Path(IMAGE_FOLDER, f"{image_id}.jpg")


def count_wanted(table: dict[int, Entry]) -> int:
    """Return how many images to take; stop if the disk has no room for those that are missing."""
    wanted = list(table)[:MAX_DATA_NUMBER]
    if len(wanted) < (MAX_DATA_NUMBER or 0):
        print(f"MAX_DATA_NUMBER is {MAX_DATA_NUMBER}, but the table has only {len(wanted)} images.")
    missing = sum(not image_path(image_id).exists() for image_id in wanted)
    size = missing * IMAGE_BYTES
    print(f"{len(wanted):,} images, {missing:,} to be downloaded: about {size / 1e6:,.0f} MB.")
    free = shutil.disk_usage(IMAGE_FOLDER).free
    if size > free:
        raise SystemExit(
            f"The disk of IMAGE_FOLDER = {IMAGE_FOLDER!r} has only {free / 1e6:,.0f} MB left. "
            "Free some space, or lower MAX_DATA_NUMBER."
        )
    return len(wanted)


def fetch_images(downloader: Downloader, table: dict[int, Entry], wanted: int) -> list[int]:
    """Download the first images that any host has, and return their ids in the table's order."""
    candidates = iter(table)
    running = {}  # future: image_id
    fetched = set()
    skipped = failures = 0
    with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool, tqdm(total=wanted, unit="image") as progress:
        try:
            while True:
                # A failed image leaves room for the next of the table
                room = min(4 * DOWNLOAD_THREADS, wanted - len(fetched)) - len(running)
                for image_id in islice(candidates, room):
                    path, urls = image_path(image_id), table[image_id].urls
                    running[pool.submit(downloader.fetch, path, urls, read_image)] = image_id
                if not running:
                    break
                # On Windows a signal waits as long as this does
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    image_id = running.pop(future)
                    if future.result():
                        fetched.add(image_id)
                        failures = 0
                        progress.update()
                    else:
                        skipped += 1
                        failures += 1
                if failures >= MAX_FAILURES:
                    raise SystemExit(
                        f"{MAX_FAILURES} images in a row could not be downloaded. "
                        "Check your network and run again."
                    )
        except BaseException:  # else the pool waits until everything is downloaded
            downloader.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"{len(fetched):,} images are there, {skipped:,} skipped.")
    return [image_id for image_id in table if image_id in fetched]


def read_image(path: Path) -> bool:
    """Return True if an image can be decoded to its last row.

    A JPEG is decoded at an eighth of its size, which finds the same faults in half the time.
    """
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size:,} bytes are more than MAX_IMAGE_BYTES")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_FILE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels exceed MAX_FILE_PIXELS")
            is_jpeg = image.format == "JPEG"
            image.draft("L", (1, 1))
            image.load()
        with open(path, "rb") as file:
            file.seek(max(0, size - 1024))
            # Half a JPEG followed by zeros decodes as well: only its end mark shows it is whole
            if is_jpeg and b"\xff\xd9" not in file.read():
                raise ValueError("its end is missing")
    # Pillow raises a dozen kinds of errors on damaged files
    except Exception as error:
        raise BadFile(f"{type(error).__name__}: {error}") from error
    return True


# ---- CSV and preview -----------------------------------------------------------------------------


def write_csv(table: dict[int, Entry], chosen: list[int]) -> None:
    """Write one row per caption, with the path of its image as seen from the CSV's folder."""
    # "link/.." leads to the parent of what link points to: follow links before counting ".."
    folder = Path(IMAGE_FOLDER).parent.resolve() / Path(IMAGE_FOLDER).name
    with contextlib.suppress(ValueError):  # Windows: no relative path leads to another drive
        folder = Path(os.path.relpath(folder, Path(CSV_PATH).parent.resolve()))
    count = 0
    with explain_write_errors(CSV_PATH), write_atomically(CSV_PATH) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image_path", "caption"])
        for image_id in chosen:
            captions = table[image_id].captions[:CAPTIONS_PER_IMAGE]
            rows.writerows([f"{folder.as_posix()}/{image_id}.jpg", text] for text in captions)
            count += len(captions)
    print(f"{count:,} captions are in {CSV_PATH}.")


def write_preview(table: dict[int, Entry], chosen: list[int]) -> None:
    """Write preview.jpg, which is only for looking: without it, the run is still complete."""
    captions = {image_id: table[image_id].captions[0] for image_id in chosen[:PREVIEW_IMAGES]}
    path = Path(IMAGE_FOLDER, "preview.jpg")
    try:
        sheet = draw_preview(captions)
        with write_atomically(path, "wb") as file:
            sheet.save(file, "JPEG", quality=90)
    # Pillow raises a dozen kinds of errors, here on a damaged note of how the camera was held
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        print(f"{path} was not written ({reason}). All else is complete.")


def draw_preview(captions: dict[int, str]) -> Image.Image:
    """Draw the images on a sheet, each above its caption."""
    font = find_font("".join(captions.values()))
    gap = PREVIEW_FONT_SIZE
    text_height = PREVIEW_LINES * PREVIEW_FONT_SIZE * 3 // 2
    column_width = PREVIEW_WIDTH + gap
    row_height = PREVIEW_HEIGHT + text_height + 2 * gap
    rows = math.ceil(len(captions) / PREVIEW_COLUMNS)
    size = (gap + PREVIEW_COLUMNS * column_width, gap + rows * row_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image_id, caption) in enumerate(captions.items()):
        row, column = divmod(number, PREVIEW_COLUMNS)
        x = gap + column * column_width
        y = gap + row * row_height
        with Image.open(image_path(image_id), formats=IMAGE_FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # what is clear is seen as white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        sheet.paste(ImageOps.pad(image, (PREVIEW_WIDTH, PREVIEW_HEIGHT), color="#eee"), (x, y))
        text = "\n".join(wrap_caption(caption, font))
        draw.multiline_text((x, y + PREVIEW_HEIGHT + gap // 2), text, "black", font)
    return sheet


def find_font(text: str) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, or one of FONTS if there is Chinese in the text."""
    # Chinese, Japanese and Korean characters and their punctuation
    if re.search("[\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef]", text):
        for name in FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, PREVIEW_FONT_SIZE)
        print("preview.jpg lacks Chinese letters. Install Noto Sans CJK, or add a font to FONTS.")
    return ImageFont.load_default(PREVIEW_FONT_SIZE)


def wrap_caption(caption: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a caption into lines as wide as an image at most."""
    # The narrowest letters are a quarter as wide as the font's size; others need shorter lines
    for letters in range(1 + 4 * PREVIEW_WIDTH // PREVIEW_FONT_SIZE, 0, -1):
        lines = textwrap.wrap(caption, letters, max_lines=PREVIEW_LINES, placeholder="…")
        if max(map(font.getlength, lines)) <= PREVIEW_WIDTH:
            break
    return lines


def main() -> None:
    """Go from the table to its images, the CSV and the preview."""
    prepare_console()
    handle_stop_signals(stop)
    check_constants()
    if os.path.isdir(CSV_PATH) or CSV_PATH.endswith(("/", os.sep)):
        raise SystemExit(f"CSV_PATH = {CSV_PATH!r} is a folder. Add a file name to it.")
    for folder in (IMAGE_FOLDER, TABLE_FOLDER, Path(CSV_PATH).parent):
        check_writable(folder)
    for leftover in Path(IMAGE_FOLDER).glob("[0-9]*.jpg.tmp"):  # of runs that were killed
        with contextlib.suppress(OSError):
            leftover.unlink()
    downloader = Downloader()
    table = fetch_table(downloader)
    wanted = count_wanted(table)
    chosen = fetch_images(downloader, table, wanted)
    if not chosen:
        raise SystemExit("Not one image could be downloaded, so no CSV was written.")
    write_csv(table, chosen)
    write_preview(table, chosen)


if __name__ == "__main__":
    main()
