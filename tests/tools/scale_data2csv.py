"""data2csv.py on a table as large as the real one: images per second and memory, killed once.

    python tests/tools/scale_data2csv.py [IMAGES]

makes up a table of 82,783 images and 414,113 captions and an image of 60 KB for each, serves them
from a process of its own, and runs data2csv.py for the first IMAGES in a temporary folder: killed
after a while, run to the end, and run once more when all is there. Without a number it takes all
of them: 5 GB of disk, some minutes. POSIX only.
"""

import csv
import io
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from conftest import command, read_csv, run_and_stop, variables
from support.hub import IMAGE_PATH, TABLE_FOLDER, Hub, official_name

IMAGES, CAPTIONS = 82_783, 414_113  # of the real table
KILLED_AFTER = 20  # seconds


class BigHub(Hub):
    """A hub that makes up its table, and gives the same few images for all addresses."""

    def __init__(self, size: tuple[int, int] = (640, 480)):
        super().__init__(Path(__file__).parent)  # a folder that is there: nothing in it is served
        self.samples = [made_up_image(size) for _ in range(8)]

    def _index(self) -> dict:
        return {}

    def find(self, path: str, query: dict) -> Path | bytes | None:
        if match := IMAGE_PATH.fullmatch(path):
            return self.samples[int(match[1][-6:-4]) % len(self.samples)]
        return super().find(path, query)

    def _write_table(self, file: io.TextIOBase) -> None:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["uniq_id", "image_id", "caption", "image"])
        for number in range(CAPTIONS):
            image_id = number % IMAGES * 7 + 9
            url = f"{self.url}{TABLE_FOLDER}/train2014/{official_name(image_id)}"
            rows.writerow(
                [
                    number,
                    image_id,
                    f"Caption {number}: a man and a dog on a long table in a small red room.",
                    url,
                ]
            )


def made_up_image(size: tuple[int, int]) -> bytes:
    """A JPEG of coarse noise: at 640x480 it has about 60 KB."""
    file = io.BytesIO()
    Image.effect_noise((size[0] // 4, size[1] // 4), 22).resize(size).convert("RGB").save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


# A process starts with the peak memory of the one that forked it, and pytest with torch is large:
# so a small one forks.
FORK = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
FORK += "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"


def measure(folder: Path, environment: dict[str, str], **constants) -> tuple[float, float]:
    """Run data2csv.py to its end. Returns the seconds it took and its largest memory in MB."""
    start = time.monotonic()
    line = [sys.executable, "-c", FORK, *command("data2csv.py", **constants)]
    done = subprocess.run(
        line, cwd=folder, env=variables(environment), stdout=subprocess.PIPE, text=True, check=True
    )
    code, peak = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0
    return time.monotonic() - start, peak / (1e6 if sys.platform == "darwin" else 1e3)


def serve(connection) -> None:
    with BigHub() as hub:
        connection.send(hub.environment())
        connection.recv()


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) == 2 else IMAGES
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=[theirs], daemon=True)
    server.start()
    environment = ours.recv()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "coco_2014_caption"
        run_and_stop("data2csv.py", folder, environment, KILLED_AFTER, MAX_DATA_NUMBER=wanted)
        there = len(list(images.glob("*.jpg"))) if images.exists() else 0
        seconds, memory = measure(folder, environment, MAX_DATA_NUMBER=wanted)
        left = wanted - there
        print(f"Killed after {KILLED_AFTER} s with {there:,} images. The other {left:,}, and the")
        print(f"check of those: {seconds:.0f} s, {left / seconds:.0f} per second, {memory:.0f} MB")
        seconds, memory = measure(folder, environment, MAX_DATA_NUMBER=wanted)
        print(f"All there: {seconds:.0f} s, {wanted / seconds:.0f} per second, {memory:.0f} MB")
        paths = {row["image_path"] for row in read_csv(folder / "coco-2024-dataset.csv")}
        assert (
            len(paths) == wanted == len([path for path in images.iterdir() if path.stem.isdigit()])
        )
        assert not list(folder.rglob("*.tmp"))
    ours.send("done")
    server.join()


if __name__ == "__main__":
    main()
