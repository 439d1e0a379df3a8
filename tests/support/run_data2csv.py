"""What the tests of data2csv.py share: the hub's addresses, a run, and what it leaves behind."""

import subprocess
from pathlib import Path

from support.fork_runner import shared_runner
from support.hub import TABLE_FOLDER, Hub

TABLE = f"{TABLE_FOLDER}/train2014.csv.zip"
FIRST_HOST = f"{TABLE_FOLDER}/train2014/"  # the images where the table says they are
OFFICIAL_HOST = "/train2014/"
LOADER = "/api/v1/datasets/"
# Constants with which a fault costs a second
QUICK = {"CONNECT_TIMEOUT": 1, "READ_TIMEOUT": 1, "BACKOFF": 0}


def data2csv(
    hub: Hub,
    folder: Path,
    fallbacks: bool = False,
    env: dict[str, str] | None = None,
    **constants,
) -> subprocess.CompletedProcess:
    """Run the script in `folder`; with `fallbacks`, the hub is also all sources but ModelScope."""
    if fallbacks:
        constants = {**hub.constants("data2csv.py"), "BACKOFF": 0, **constants}
    environment = {**hub.environment(), **(env or {})}
    return shared_runner("data2csv.py")(folder, environment, **constants)


def refusal(run: subprocess.CompletedProcess) -> str:
    """The sentence with which a run ended that could not do its work."""
    assert run.returncode not in (0, None) and "Traceback" not in run.stderr, run.stderr
    return run.stderr.strip().splitlines()[-1]


def image_requests(hub: Hub) -> list[str]:
    return [path for path in hub.requests if path.endswith(".jpg")]


def images(folder: Path) -> list[Path]:
    """The images, without the preview."""
    return sorted((folder / "coco_2014_caption").glob("[0-9]*.jpg"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything the script left, but for its cache."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }
