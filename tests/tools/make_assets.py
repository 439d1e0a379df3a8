"""Remake the pictures that README shows, from generated scenes: .github/assets/{preview,dashboard,report}.png.

    python tests/tools/make_assets.py

It rehearses the four scripts as tests/demo.py does, about 2 minutes on 2 cores, then photographs what they leave:
the contact sheet of data2csv.py, the run in `swanlab watch`, and report.html. It needs Chromium or Chrome.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

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
DASHBOARD_SIZE, REPORT_SIZE = (1200, 1330), (1200, 1400)  # pixels of the browser's window
WIDTH, COLOURS = 1200, 200  # of a PNG, at most: they keep each below 300 KB


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(browser: str, address: str, *options: str) -> str:
    """Open an address in a headless browser, give its scripts 30 seconds of their own clock; returns what it prints."""
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
    """`swanlab watch` on a folder, for as long as the context lasts: the address of its first run's charts."""
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


def shrink(picture: Path, target: Path) -> None:
    """Save a picture as a small PNG, in one rename."""
    with Image.open(picture) as image:
        image = (
            ImageOps.contain(image.convert("RGB"), (WIDTH, image.height))
            if image.width > WIDTH
            else image
        )
        palette = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        palette.save(f"{target}.tmp", "PNG", optimize=True)
    os.replace(f"{target}.tmp", target)
    print(f"{target}: {palette.width} x {palette.height}, {target.stat().st_size / 1000:.0f} KB")


def photograph(browser: str, address: str, size: tuple[int, int], target: Path) -> None:
    """Save what a browser's window of this size shows of an address."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.png")
        browse(browser, address, f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}")
        shrink(picture, target)


def main() -> None:
    if not (browser := find_browser()):
        raise SystemExit(
            "The screenshots need Chromium or Chrome: install one (apt install chromium), then run again."
        )
    with tempfile.TemporaryDirectory(prefix="assets_") as place:
        folder = Path(place)
        write_folder(folder / "scenes", random.Random(0).sample(all_scenes(), SCENES))
        rehearse(
            folder / "scenes",
            folder,
            {script: dict(values) for script, values in CONSTANTS.items()},
        )
        ASSETS.mkdir(parents=True, exist_ok=True)
        shrink(folder / "coco_2014_caption/preview.jpg", ASSETS / "preview.png")
        with dashboard(folder / "swanlog") as address:
            photograph(browser, address, DASHBOARD_SIZE, ASSETS / "dashboard.png")
        report = (folder / "output/Qwen2-VL-2B/report.html").as_uri()
        photograph(browser, report, REPORT_SIZE, ASSETS / "report.png")


if __name__ == "__main__":
    main()
