"""Remake the images that README shows, in .github/assets.

    python tests/tools/make_assets.py            demo.png, preview.png, dashboard.png, report.png
    python tests/tools/make_assets.py PHOTOS     coco.jpg and ATTRIBUTION.md

The first runs the CPU demo as tests/demo.py does, a minute on 2 cores, and takes screenshots of
what it leaves, for which it needs Chromium or Chrome. The second draws a row of photos: PHOTOS
holds captions.csv (image_path, caption) and ATTRIBUTION.csv (image_path, license_url, flickr_url,
coco_url).
"""

import contextlib
import csv
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from demo import CONSTANTS, SCENES, rehearse
from support.scenes import all_scenes, write_folder

ASSETS = Path(__file__).resolve().parents[2] / ".github/assets"
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
)
DASHBOARD_SIZE = (1440, 905)  # pixels of the browser's window
REPORT_SIZE = (1460, 1510)
WIDTH, COLOURS = 1200, 200  # of a PNG, at most: they keep each below 300 KB
PHOTOS = ("000000000285", "000000012667", "000000215245", "000000427034")
CELL = 290  # pixels of an image in a row of images
GAP = 12
LETTERS = 17  # pixels of a letter


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(browser: str, address: str, *options: str) -> str:
    """Open an address in a headless browser; return what it prints.

    Its scripts get 30 seconds of their own clock.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        line = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--lang=en",
            f"--user-data-dir={profile}",
        ]
        line += ["--virtual-time-budget=30000", *options, address]
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # its sandbox refuses to run as root
            line.insert(1, "--no-sandbox")
        return subprocess.run(
            line, capture_output=True, encoding="utf-8", timeout=120, check=True
        ).stdout


@contextlib.contextmanager
def dashboard(log_folder: Path) -> Iterator[str]:
    """Run `swanlab watch` on a folder; yield the address of its first run's charts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    line = [sys.executable, "-m", "swanlab", "watch", str(log_folder), "--port", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10):
                break
            if server.poll() is not None:
                raise SystemExit(
                    f"`{' '.join(line)}` ended by itself with code {server.returncode}."
                )
            time.sleep(0.1)
        yield f"{address}/experiment/1/chart"
    finally:
        server.terminate()
        server.wait()


def shrink(source: Path, target: Path) -> None:
    """Save an image as a small PNG, in one rename."""
    with Image.open(source) as image:
        image = image.convert("RGB")
        if image.width > WIDTH:
            image = ImageOps.contain(image, (WIDTH, image.height))
        palette = image.quantize(COLOURS, dither=Image.Dither.NONE)
        palette.save(f"{target}.tmp", "PNG", optimize=True)
    os.replace(f"{target}.tmp", target)
    print(f"{target}: {palette.width} x {palette.height}, {target.stat().st_size / 1000:.0f} KB")


def photograph(browser: str, address: str, size: tuple[int, int], target: Path) -> None:
    """Save what a browser's window of this size shows of an address."""
    with tempfile.TemporaryDirectory() as folder:
        screenshot = Path(folder, "screenshot.png")
        browse(browser, address, f"--screenshot={screenshot}", f"--window-size={size[0]},{size[1]}")
        shrink(screenshot, target)


class Cell(NamedTuple):
    """An image with lines of text below it; words outside `known`, if given, are marked."""

    image: Image.Image
    lines: list[str]
    known: set[str] | None = None


def draw_row(cells: list[Cell], title: str = "") -> Image.Image:
    """Draw cells side by side, and a title above all."""
    font = ImageFont.load_default(LETTERS)
    line_height = LETTERS * 3 // 2
    top = GAP + (line_height + GAP if title else 0)
    wrapped = []
    for cell in cells:
        wrapped.append([part for line in cell.lines for part in wrap(line, font)])
    height = top + CELL + GAP + max(map(len, wrapped)) * line_height + GAP
    sheet = Image.new("RGB", (GAP + len(cells) * (CELL + GAP), height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, "#555", font)
    for number, cell in enumerate(cells):
        left = GAP + number * (CELL + GAP)
        sheet.paste(ImageOps.fit(cell.image.convert("RGB"), (CELL, CELL)), (left, top))
        for row, text in enumerate(wrapped[number]):
            place = (left, top + CELL + GAP + row * line_height)
            write_line(pen, place, text, cell.known, font)
    return sheet


def write_line(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    known: set[str] | None,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Write a line; words that are not known are red, and what stands in brackets is grey."""
    left, top = place
    for word in text.split(" "):
        colour = "black"
        if word.startswith("("):
            colour = "#777"
        elif known is not None and word.lower().strip(".,") not in known:
            colour = "#c03020"
        pen.text((left, top), word, colour, font)
        left += font.getlength(word + " ")


def wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text into lines that are no wider than an image."""
    for letters in range(60, 10, -1):
        lines = textwrap.wrap(text, letters)
        if max(map(font.getlength, lines)) <= CELL:
            return lines
    raise ValueError(f"a word of {text!r} is wider than an image")


def draw_demo(results: dict, target: Path) -> None:
    """Draw what the small model says of four held-out scenes, before and after."""
    cells = []
    for row in results["captions"][:4]:
        image = Image.open(row["images"][0]["path"])
        known = set(" ".join(row["references"]).replace(",", "").split())
        lines = ["(before)", row["base"]["text"], "(after)", row["fine_tuned"]["text"]]
        cells.append(Cell(image, lines, known))
    title = (
        "CPU demo: a Qwen2-VL of 1.3 million parameters, on generated shapes it was not trained "
        "on. Red: words in none of the reference captions."
    )
    with tempfile.TemporaryDirectory() as folder:
        strip = Path(folder, "strip.png")
        draw_row(cells, title).save(strip)
        shrink(strip, target)


def draw_photos(folder: Path) -> None:
    """Draw coco.jpg, four photos with a human caption each, and list their sources."""
    captions = {row["image_path"]: row["caption"] for row in reversed(read_csv(folder, "captions"))}
    cells, sources = [], []
    for row in read_csv(folder, "ATTRIBUTION"):
        path = row["image_path"]
        if Path(path).stem not in PHOTOS:
            continue
        cells.append(Cell(Image.open(folder / path), [captions[path]]))
        sources.append(
            f"* [COCO {Path(path).stem}]({row['coco_url']}): [photo]({row['flickr_url']}), "
            f"[CC BY 2.0]({row['license_url']}), cropped and resized"
        )
    target = ASSETS / "coco.jpg"
    draw_row(cells).save(target, quality=88, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} KB")
    heading = (
        "# The photos of coco.jpg\n\nFrom COCO val2017, left to right. The captions: CC BY 4.0.\n\n"
    )
    (ASSETS / "ATTRIBUTION.md").write_text(heading + "\n".join(sources) + "\n", encoding="utf-8")


def read_csv(folder: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def take_screenshots() -> None:
    """Run the CPU demo and take screenshots of what it leaves."""
    browser = find_browser()
    if not browser:
        raise SystemExit("The screenshots need Chromium or Chrome. Install one and run again.")
    with tempfile.TemporaryDirectory(prefix="assets_") as place:
        folder = Path(place)
        write_folder(folder / "scenes", random.Random(0).sample(all_scenes(), SCENES))
        constants = {script: dict(values) for script, values in CONSTANTS.items()}
        results = rehearse(folder / "scenes", folder, constants)
        draw_demo(results, ASSETS / "demo.png")
        shrink(folder / "coco_2014_caption/preview.jpg", ASSETS / "preview.png")
        with dashboard(folder / "swanlog") as address:
            photograph(browser, address, DASHBOARD_SIZE, ASSETS / "dashboard.png")
        report = (folder / "output/Qwen2-VL-2B/report.html").as_uri()
        photograph(browser, report, REPORT_SIZE, ASSETS / "report.png")


def main() -> None:
    ASSETS.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 2:
        draw_photos(Path(sys.argv[1]))
    else:
        take_screenshots()


if __name__ == "__main__":
    main()
