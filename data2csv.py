"""Step 1 of 4: fetch the COCO 2014 captions and the first 500 images, and list them in one CSV.

Reads   the caption table of the dataset modelscope/coco_2014_caption (a zipped CSV, 414,113 captions of 82,783 images,
        fetched once and kept) and each image from the address that the table gives.
Writes  coco_2014_caption/IMAGE_ID.jpg    the images, bytes as served
        coco-2024-dataset.csv             image_path,caption: one row a caption, up to 5 captions an image
Run     python data2csv.py
Takes   a few minutes for 500 images (80 MB) on a home line, 500 MB of memory. Stop it whenever you like: run again, it
        goes on where it was. With a larger MAX_DATA_NUMBER it fetches only what is missing.
"""

import ast
import io
import json
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import requests
import urllib3
from modelscope_hub.compat import dataset_file_download
from modelscope_hub.errors import HubError
from PIL import Image
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Data
MAX_DATA_NUMBER = 500  # images, the first ones of the table; None = all 82,783 (13.5 GB)
CAPTIONS_PER_IMAGE = 5  # captions kept of each image, at most; COCO has five, seldom more
# Output
IMAGE_FOLDER = "coco_2014_caption"  # the images go here
CSV_PATH = "coco-2024-dataset.csv"  # written last; its paths are relative to its own folder
CACHE_FOLDER = ".cache/coco_2014_caption"  # keeps the table; delete it to fetch the table anew
# Sources
DATASET_ID = "modelscope/coco_2014_caption"  # its loader script names the table's address
LOADER_SCRIPT = "coco_2014_caption.py"  # read as text, never executed
TABLE_URLS = (  # asked next: where the table was found before, newest first
    "https://modelscope.oss-cn-beijing.aliyuncs.com/open_data/coco_2014_caption/train2014.csv.zip",
    "http://xingchen-data.oss-cn-zhangjiakou.aliyuncs.com/coco/2014/train.csv.zip",
)
ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"  # asked last, 240 MB
OFFICIAL_IMAGE_URL = "http://images.cocodataset.org/train2014/COCO_train2014_{image_id:012d}.jpg"  # the second host
# Network
DOWNLOAD_THREADS = 16  # images fetched at once
TIMEOUT = (10, 20)  # seconds to connect, and to wait for the next bytes
RETRIES = 2  # further tries, after growing pauses, when a connection fails or the status is one of RETRY_STATUS
RETRY_STATUS = (429, 500, 502, 503, 504)  # HTTP statuses that may pass
BACKOFF = 1.0  # seconds, the factor of these pauses
ROUNDS = 2  # times each source is asked for a file that comes cut or garbled
HOST_FAILURES = 8  # failures in a row after which a host is asked only after the other one
MAX_FAILURES = 32  # images in a row that no host gives, after which the script stops
# Formats
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # what an image may be; COCO's are all JPEG
IMAGE_BYTES = 163_000  # an average image, for the estimate
BATCH = 1024  # images handed to the threads at a time
# ----------------------------------------------------------------------------------------------------------------------


def check_constants() -> None:
    for name in ("MAX_DATA_NUMBER", "CAPTIONS_PER_IMAGE", "DOWNLOAD_THREADS"):
        value = globals()[name]
        if (type(value) is not int or value < 1) and not (name == "MAX_DATA_NUMBER" and value is None):
            raise SystemExit(f"{name} = {value!r} at the top of data2csv.py: it must be a whole number, 1 or more.")


def stop(*_) -> None:
    """Ctrl-C ends the script at once, without waiting for the downloads under way."""
    os.write(2, b"\nStopped. What is fetched stays: run again to go on.\n")
    os._exit(130)


def open_session() -> requests.Session:
    """One session for all threads: it keeps connections open and asks again after failures that may pass."""
    retry = urllib3.Retry(RETRIES, backoff_factor=BACKOFF, status_forcelist=RETRY_STATUS, retry_after_max=TIMEOUT[1])
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=DOWNLOAD_THREADS, max_retries=retry))
    return session


def addresses_in_loader() -> list[str]:
    """The train table's addresses in the dataset's loader script, which is parsed as text: its code never runs."""
    Path(CACHE_FOLDER, LOADER_SCRIPT).unlink(missing_ok=True)  # the client would not ask for it again
    try:
        script = dataset_file_download(DATASET_ID, LOADER_SCRIPT, local_dir=CACHE_FOLDER, cache_dir=CACHE_FOLDER)
        nodes = ast.walk(ast.parse(Path(script).read_text(encoding="utf-8")))
    except (HubError, OSError, SyntaxError, ValueError) as error:
        print(f"ModelScope does not give the loader script, so the known addresses are tried ({error}).")
        return []
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    return [text for text in texts if text.startswith("http") and "train" in text and text.endswith(".csv.zip")]


def fetch_table(session: requests.Session) -> pd.DataFrame:
    """The caption table, from the cache or else from the first source that has it; see `read_table`."""
    table = Path(CACHE_FOLDER, "train_captions.zip")
    if table.exists():
        return read_table(table, str(table))
    table.parent.mkdir(parents=True, exist_ok=True)
    part = table.with_suffix(".part")
    for url in dict.fromkeys([*addresses_in_loader(), *TABLE_URLS, ANNOTATIONS_URL]):
        try:
            with session.get(url, stream=True, timeout=TIMEOUT) as response, open(part, "wb") as file:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(file, "write", total=size, desc="caption table") as progress:
                    shutil.copyfileobj(response.raw, progress)
            rows = read_table(part, url)
        except (OSError, urllib3.exceptions.HTTPError, zipfile.BadZipFile, zlib.error, ValueError, KeyError) as error:
            print(f"No caption table from {url}: {error}")
            continue
        os.replace(part, table)
        if url == ANNOTATIONS_URL:
            print("This is COCO's own table, whose order differs: these will be other images than ModelScope's first.")
        return rows
    raise SystemExit("None of the sources named above gives the caption table. Check the network, then run again.")


def read_table(path: Path, source: str) -> pd.DataFrame:
    """Columns image_id (int), caption (one line), image (URL), from ModelScope's zipped CSV or COCO's annotations."""
    columns = ["image_id", "caption", "image"]
    annotations = "annotations/captions_train2014.json"
    with zipfile.ZipFile(path) as archive:
        if annotations in archive.namelist():
            rows = pd.DataFrame(json.loads(archive.read(annotations))["annotations"])
            rows["image"] = [OFFICIAL_IMAGE_URL.format(image_id=image_id) for image_id in rows["image_id"]]
        else:
            rows = pd.read_csv(path, compression="zip", dtype=str, keep_default_na=False)
    if missing := [name for name in columns if name not in rows]:
        raise SystemExit(f"The table {source} has no column {missing}, only {list(rows)}: captions are not guessed.")
    numeric = rows["image_id"].astype(str).str.fullmatch("[0-9]{1,12}")  # it becomes a file name
    if not numeric.all():
        raise SystemExit(f"The table {source} has the image_id {rows['image_id'][~numeric].iloc[0]!r}: not a number.")
    rows["image_id"] = rows["image_id"].astype("int64")
    rows["caption"] = rows["caption"].str.strip().str.replace(r"\s*[\r\n]\s*", " ", regex=True)
    return rows[columns]


def is_whole(file: Path | io.BytesIO) -> bool:
    """Whether `file` is an image that decodes to its last row."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def fetch_image(session: requests.Session, failures: Counter, image_id: int, url: str) -> bool:
    """Fetch one image, unless it is there and whole. False if no host gives it.

    `failures` counts failures in a row of each host (one that is down is asked last) and of images, for all threads.
    """
    target = Path(IMAGE_FOLDER, f"{image_id}.jpg")
    if is_whole(target):
        return True
    if failures["images"] >= MAX_FAILURES:
        raise SystemExit(f"{MAX_FAILURES} images in a row failed. What is fetched stays: run again later.")
    hosts = {source: urlsplit(source).netloc for source in (url, OFFICIAL_IMAGE_URL.format(image_id=image_id))}
    for source in ROUNDS * sorted(hosts, key=lambda source: failures[hosts[source]] >= HOST_FAILURES):
        try:
            response = session.get(source, timeout=TIMEOUT)
            response.raise_for_status()
            if not is_whole(io.BytesIO(response.content)):
                raise ValueError("not a whole image")
        except (requests.RequestException, ValueError) as error:
            failures[hosts[source]] += 1
            reason = f"{source}: {error}"
            continue
        part = target.with_suffix(".part")
        part.write_bytes(response.content)
        os.replace(part, target)
        failures[hosts[source]] = failures["images"] = 0
        return True
    failures.update(["images", "left out"])
    tqdm.write(f"Image {image_id} is left out for the table's next one ({reason}).")
    return False


def fetch_images(session: requests.Session, images: pd.DataFrame, wanted: int) -> tuple[list[int], int]:
    """Fetch the first `wanted` of `images` that a host gives: their ids in table order, and how many no host gave."""
    candidates = zip(images["image_id"].tolist(), images["image"], strict=True)
    failures = Counter()
    chosen = []
    with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool, tqdm(total=wanted, unit="image") as progress:
        while batch := list(islice(candidates, min(BATCH, wanted - len(chosen)))):
            fetched = pool.map(lambda image: fetch_image(session, failures, *image), batch)
            for (image_id, _), success in zip(batch, fetched, strict=True):
                if success:
                    chosen.append(image_id)
                    progress.update()
    return chosen, failures["left out"]


def write_csv(table: pd.DataFrame, chosen: list[int]) -> pd.DataFrame:
    """Write the first captions of the images `chosen`, image by image, and return these rows of `table`."""
    path = Path(CSV_PATH)
    folder = Path(os.path.relpath(IMAGE_FOLDER, path.parent)).as_posix()  # forward slashes on Windows too
    rows = table.set_index("image_id").loc[chosen, ["caption"]].groupby(level=0, sort=False).head(CAPTIONS_PER_IMAGE)
    rows.insert(0, "image_path", [f"{folder}/{image_id}.jpg" for image_id in rows.index])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows.to_csv(part, index=False, encoding="utf-8", lineterminator="\n")
    os.replace(part, path)
    return rows


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # not every console knows every character of an error message
    check_constants()
    signal.signal(signal.SIGINT, stop)
    start = time.monotonic()
    session = open_session()
    table = fetch_table(session)
    empty = table["caption"] == ""
    images = table[~empty].drop_duplicates("image_id")
    wanted = min(MAX_DATA_NUMBER or len(images), len(images))
    if MAX_DATA_NUMBER and MAX_DATA_NUMBER > wanted:
        print(f"MAX_DATA_NUMBER is {MAX_DATA_NUMBER}, but the table has {wanted} images: taking all of them.")
    print(f"{wanted:,} images, about {wanted * IMAGE_BYTES / 1e6:,.0f} MB; what {IMAGE_FOLDER}/ lacks is fetched.")
    Path(IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    chosen, left_out = fetch_images(session, images, wanted)
    if not chosen:
        raise SystemExit("No image could be fetched, so no CSV is written. Check the network, then run again.")
    rows = write_csv(table[~empty], chosen)
    size = sum(Path(IMAGE_FOLDER, f"{image_id}.jpg").stat().st_size for image_id in chosen)
    words = rows["caption"].str.split().str.len()
    print(f"{len(chosen):,} images, {size / 1e6:,.1f} MB, {left_out} replaced; {empty.sum()} empty captions dropped.")
    print(f"{len(rows):,} captions of {words.min()} to {words.max()} words, mean {words.mean():.1f}, in {CSV_PATH}.")
    print(f"Done in {time.monotonic() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
