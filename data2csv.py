"""Step 1 of 4: fetch the COCO 2014 captions and the first 500 images, and list them in one CSV.

Reads   the caption table of the dataset modelscope/coco_2014_caption, fetched once and kept, and the images it names.
Writes  coco_2014_caption/IMAGE_ID.jpg    the images, bytes as served; and preview.jpg, the first with their captions
        coco-2024-dataset.csv             image_path,caption: one row a caption, up to 5 captions an image
Run     python data2csv.py
Takes   a few minutes for 500 images (80 MB); at most 350 MB of memory. Stopped and run again, it goes on where it was.
"""

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice, product
from pathlib import Path

import requests
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Data
MAX_DATA_NUMBER = 500  # images, the first ones of the table; None = all 82,783 (13.5 GB)
IMAGE_BYTES = 163_000  # an average image, for the estimate
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # what an image may be; COCO's are all JPEG
CAPTIONS_PER_IMAGE = 5  # captions kept of each image, at most; COCO has five, seldom more
# Output
IMAGE_FOLDER = "coco_2014_caption"  # the images go here
CSV_PATH = "coco-2024-dataset.csv"  # its paths are relative to its own folder: both on one drive
CACHE_FOLDER = ".cache/coco_2014_caption"  # keeps the table; delete it to fetch the table anew
PREVIEW_IMAGES, PREVIEW_COLUMNS = 24, 6  # images in preview.jpg, and how many side by side
PREVIEW_SIZE, PREVIEW_LETTERS, PREVIEW_LINES = (256, 192), 16, 3  # pixels an image and a letter; lines a caption
FONTS = ("msyh.ttc", "simhei.ttf", "PingFang.ttc", "STHeiti Medium.ttc", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc")
# Sources
MODELSCOPE_URL = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"  # the variable is ModelScope's own
LOADER_PATH = "/api/v1/datasets/modelscope/coco_2014_caption/repo?Revision=master&FilePath=coco_2014_caption.py"
TABLE_URLS = (  # asked after the address in that loader script: where the table was found before, newest first
    "https://modelscope.oss-cn-beijing.aliyuncs.com/open_data/coco_2014_caption/train2014.csv.zip",
    "http://xingchen-data.oss-cn-zhangjiakou.aliyuncs.com/coco/2014/train.csv.zip",
)
ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"  # asked last, 240 MB
OFFICIAL_IMAGE_URL = "http://images.cocodataset.org/train2014/COCO_train2014_{image_id:012d}.jpg"  # the second host
# Network
DOWNLOAD_THREADS = 16  # images fetched at once
BATCH = 1024  # images handed to these threads at a time
TIMEOUT = (10, 20)  # seconds to connect, and to wait for the next bytes
MIN_SPEED = 1000  # bytes a second, on average after the first TIMEOUT[1] seconds; a slower answer is given up
ROUNDS, BACKOFF = 2, 3.0  # times each source is asked; seconds of pause before the second time, twice that the third
HOST_FAILURES, MAX_FAILURES = 8, 32  # in a row: then a host is asked after the other one; then the script stops
# ----------------------------------------------------------------------------------------------------------------------
session = requests.Session()  # for all threads: it keeps connections open
failures = Counter()  # in a row: of each folder of a host, and of files that no host gives


def check_constants() -> None:
    """Refuse an impossible constant by its name, before anything is fetched."""
    rules = (  # the end of a name, a pattern for the value, the pattern in words
        ("MAX_DATA_NUMBER", r"[1-9]\d*|None", "a whole number, 1 or more, or None"),
        ("BACKOFF", r"\d+(\.\d+)?", "a number, 0 or more"),
        (("TIMEOUT", "SIZE"), r"\([1-9]\d*, [1-9]\d*\)", "two whole numbers, 1 or more, in brackets"),
        (("FOLDER", "PATH", "URL"), r"['\"][^\s'\"].*", "text in quotes"),
        (("FONTS", "URLS", "FORMATS"), r"\((['\"][^\s'\"][^'\"]*['\"],? ?)+\)", "texts in quotes, in brackets"),
        ("", r"[1-9]\d*", "a whole number, 1 or more"),
    )
    for name, value in [(name, repr(value)) for name, value in globals().items() if name.isupper()]:
        pattern, legal = next(rule for end, *rule in rules if name.endswith(end))
        if not re.fullmatch(pattern, value):
            raise SystemExit(f"{name} = {value} at the top of data2csv.py can't work: it must be {legal}.")


def stop(number: int, _) -> None:
    """Ctrl-C ends the script at once, without waiting for the downloads under way."""
    os.write(2, b"\nStopped. What is fetched stays: run again to go on.\n")
    os._exit(128 + number)


def download(url: str, path: Path, label: str | None) -> None:
    """Write what `url` gives to `path`, with a progress bar if there is a `label`; a mere trickle is given up."""
    with session.get(url, stream=True, timeout=TIMEOUT) as response, open(path, "wb") as file:
        response.raise_for_status()
        size, deadline = int(response.headers.get("Content-Length", 0)), time.monotonic() + TIMEOUT[1]
        with tqdm(desc=label, total=size, unit="B", unit_scale=True, disable=not label) as progress:
            while piece := response.raw.read1(1 << 16, decode_content=True):
                progress.update(file.write(piece))
                deadline += len(piece) / MIN_SPEED
                if time.monotonic() > deadline:
                    raise requests.Timeout(f"slower than {MIN_SPEED} bytes a second")


def fetch(path: Path, sources, read, label: str | None = None):
    """What `read` makes of `path`, which is fetched, unless it is there, from the first source that gives it whole."""
    with suppress(Exception):  # missing or damaged: it is fetched
        if content := read(path):
            return content
    part, reasons = path.with_suffix(".part"), []
    sources = sorted(dict.fromkeys(sources), key=lambda source: failures[os.path.dirname(source)] >= HOST_FAILURES)
    for turn, source in product(range(ROUNDS * (failures["in a row"] < MAX_FAILURES)), sources):
        time.sleep(turn * BACKOFF)
        try:
            download(source, part, label)
            if not (content := read(part)):
                raise ValueError("not whole, or nothing in it")
        except Exception as error:  # a garbled file can raise almost anything
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL is a garbled archive's
                raise  # a full disk and the like is no source's fault
            failures[os.path.dirname(source)] += 1
            reasons.append(f"{source}: {error}")
        else:
            os.replace(part, path)
            failures[os.path.dirname(source)] = failures["in a row"] = 0
            return content
    part.unlink(missing_ok=True)
    failures["in a row"] += 1
    tqdm.write("\n".join([f"{label or 'Image'} {path.stem}: no source gives it.", *reasons[-len(sources) :]]))


def table_urls():
    """The addresses in the dataset's loader script, which is read as text and never run, then those known before."""
    loader, url = Path(CACHE_FOLDER, "loader.py"), re.compile(r"http[^\"'\s]*train[^\"'\s]*\.csv\.zip")
    loader.unlink(missing_ok=True)
    yield from fetch(loader, [MODELSCOPE_URL + LOADER_PATH], lambda path: url.findall(path.read_text("utf-8"))) or []
    yield from TABLE_URLS


def read_table(path: Path) -> dict[int, tuple[list[str], list[str]]]:
    """image_id: (addresses, captions), in the table's order, from ModelScope's zipped CSV or COCO's annotations."""
    table, empty = {}, 0
    with zipfile.ZipFile(path) as archive:  # read where it lies, nothing is unpacked
        if (annotations := "annotations/captions_train2014.json") in archive.namelist():
            rows = json.loads(archive.read(annotations))["annotations"]
            print("This is COCO's own table, whose order differs: these will be other images than ModelScope's first.")
        else:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
            rows = csv.DictReader(io.TextIOWrapper(archive.open(largest), "utf-8-sig", newline=""), restval="")
            if missing := sorted({"image_id", "caption", "image"} - set(rows.fieldnames)):
                raise SystemExit(f"{path} has no column {missing}, only {rows.fieldnames}: captions are not guessed.")
        for row in rows:
            if not re.fullmatch(r"\d{1,12}", str(row["image_id"])):  # it becomes a file name
                raise SystemExit(f"{path} has the image_id {row['image_id']!r}: not a number.")
            if caption := " ".join(row["caption"].split()):
                image_id, official = int(row["image_id"]), OFFICIAL_IMAGE_URL.format(image_id=int(row["image_id"]))
                table.setdefault(image_id, ([row.get("image", official), official], []))[1].append(caption)
            empty += not caption
    print(f"The table has {len(table):,} images; {empty} empty captions dropped.")
    return table


def read_image(path: Path) -> bool:
    """Decode it to its last row; a JPEG at an eighth of its size, which finds the same faults in half the time."""
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        image.draft("L", (1, 1))
        image.load()
        return image.format != "JPEG" or b"\xff\xd9" in path.read_bytes()[-1024:]  # its end: zeros decode, too


def fetch_images(table: dict, wanted: int) -> list[int]:
    """Fetch the first `wanted` images that a host gives, and return their ids in the table's order."""
    candidates, chosen = iter(table), []
    with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool, tqdm(total=wanted, unit="image") as progress:
        while batch := list(islice(candidates, min(BATCH, wanted - len(chosen)))):
            futures = [pool.submit(fetch, Path(IMAGE_FOLDER, f"{key}.jpg"), table[key][0], read_image) for key in batch]
            for image_id, future in zip(batch, futures, strict=True):
                while not future.done():
                    time.sleep(0.02)  # on Windows Ctrl-C interrupts this, but no wait for a result
                if failures["in a row"] >= MAX_FAILURES or future.exception():
                    pool.shutdown(cancel_futures=True)
                    raise future.exception() or SystemExit(f"{MAX_FAILURES} images in a row failed. Run again later.")
                if future.result():
                    chosen.append(image_id)
                    progress.update()
    return chosen


def write_csv(table: dict, chosen: list[int]) -> int:
    """One row a caption; with slashes, on Windows too. Returns their number."""
    folder = Path(os.path.relpath(IMAGE_FOLDER, Path(CSV_PATH).parent)).as_posix()
    rows = ((f"{folder}/{key}.jpg", caption) for key in chosen for caption in table[key][1][:CAPTIONS_PER_IMAGE])
    with open(f"{CSV_PATH}.part", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(chain([("image_path", "caption")], rows))
    os.replace(f"{CSV_PATH}.part", CSV_PATH)
    return sum(len(table[key][1][:CAPTIONS_PER_IMAGE]) for key in chosen)


def write_preview(table: dict, chosen: list[int]) -> None:
    """The first images on one sheet, a caption beneath each."""
    shown = {image_id: table[image_id][1][0] for image_id in chosen[:PREVIEW_IMAGES]}
    (width, height), gap, font = PREVIEW_SIZE, PREVIEW_LETTERS, ImageFont.load_default(PREVIEW_LETTERS)
    if max(map(max, shown.values())) > "\u2e80":  # Chinese: Pillow's own font has no such letters
        for name in FONTS:
            with suppress(OSError):
                font = ImageFont.truetype(name, PREVIEW_LETTERS)
                break
        else:
            print("preview.jpg lacks Chinese letters: install Noto Sans CJK, or name a font of yours in FONTS.")
    across, down = width + gap, height + 2 * gap + PREVIEW_LINES * PREVIEW_LETTERS * 3 // 2
    sheet = Image.new("RGB", (gap + PREVIEW_COLUMNS * across, gap - len(shown) // -PREVIEW_COLUMNS * down), "white")
    for number, (image_id, caption) in enumerate(shown.items()):
        x, y = gap + number % PREVIEW_COLUMNS * across, gap + number // PREVIEW_COLUMNS * down
        with Image.open(Path(IMAGE_FOLDER, f"{image_id}.jpg")) as image:
            sheet.paste(ImageOps.pad(image.convert("RGB"), PREVIEW_SIZE, color="#eee"), (x, y))
        wraps = (textwrap.wrap(caption, size, max_lines=PREVIEW_LINES, placeholder="…") for size in range(99, 0, -1))
        lines = next(lines for lines in wraps if max(map(font.getlength, lines)) <= width)
        ImageDraw.Draw(sheet).multiline_text((x, y + height + gap // 2), "\n".join(lines), "black", font)
    sheet.save(f"{IMAGE_FOLDER}/preview.part", "JPEG", quality=90)
    os.replace(f"{IMAGE_FOLDER}/preview.part", f"{IMAGE_FOLDER}/preview.jpg")


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # not every console knows every character
    check_constants()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        for folder in (IMAGE_FOLDER, CACHE_FOLDER, Path(CSV_PATH).parent):
            Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(CACHE_FOLDER, "train_captions.zip")
        table = fetch(path, table_urls(), read_table, "table") or fetch(path, [ANNOTATIONS_URL], read_table, "table")
        if not table:
            raise SystemExit("None of the sources above gives the caption table. Check the network, then run again.")
        wanted = list(table)[:MAX_DATA_NUMBER]
        missing = sum(not Path(IMAGE_FOLDER, f"{image_id}.jpg").exists() for image_id in wanted)
        if len(wanted) < (MAX_DATA_NUMBER or 0):
            print(f"MAX_DATA_NUMBER is {MAX_DATA_NUMBER}, but the table has {len(table)} images: taking all of them.")
        print(f"{len(wanted):,} images, {missing:,} to be fetched: about {missing * IMAGE_BYTES / 1e6:,.0f} MB.")
        if missing * IMAGE_BYTES > shutil.disk_usage(IMAGE_FOLDER).free:
            raise SystemExit(f"The disk of {IMAGE_FOLDER} has less space: make room, or lower MAX_DATA_NUMBER.")
        chosen = fetch_images(table, len(wanted)) or sys.exit("Not one image could be fetched, so no CSV is written.")
        captions = write_csv(table, chosen)
        write_preview(table, chosen)
        for leftover in [*Path(IMAGE_FOLDER).glob("*.part"), *Path(CACHE_FOLDER).glob("*.part")]:
            leftover.unlink()
    except (OSError, ValueError) as error:  # ValueError: two drives of Windows
        raise SystemExit(f"{error}. Make room, close the file if Excel has it open, or change the path.") from None
    left_out = list(table).index(chosen[-1]) + 1 - len(chosen)
    print(f"{len(chosen):,} images, {left_out} replaced; {captions:,} captions in {CSV_PATH}.")


if __name__ == "__main__":
    main()
