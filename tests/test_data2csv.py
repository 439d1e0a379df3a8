"""data2csv.py against the stand-in hub: which images and captions are taken, and what happens when a source fails."""

import hashlib
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import CAPTIONS, command, read_csv, run_script, variables, write_pictures
from support.hub import ANNOTATIONS, OLD_TABLE, TABLE_FOLDER, Hub, cut_short, html, status

TABLE = f"{TABLE_FOLDER}/train2014.csv.zip"
FIRST_HOST = f"{TABLE_FOLDER}/train2014/"  # the pictures where the table says they are
OFFICIAL_HOST = "/train2014/"
LOADER = "/api/v1/datasets/"


def data2csv(
    hub: Hub, folder: Path, fallbacks: bool = False, **constants
) -> subprocess.CompletedProcess:
    """Run it in `folder`, unmodified but for `constants` and, where a test needs them, the fallbacks' addresses."""
    if fallbacks:
        constants = {**hub.constants("data2csv.py"), "BACKOFF": 0, **constants}
    return run_script("data2csv.py", folder, hub.environment(), **constants)


def picture_requests(hub: Hub) -> list[str]:
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


def test_images_and_captions_in_table_order(hub, folder):
    """An image's further captions stand further down the table: they belong to it, behind its first, cleaned."""
    run = data2csv(hub, folder, MAX_DATA_NUMBER=3, CAPTIONS_PER_IMAGE=2)
    assert run.returncode == 0, run.stderr
    assert [tuple(row.values()) for row in read_csv(folder / "coco-2024-dataset.csv")] == [
        ("coco_2014_caption/57870.jpg", "A restaurant has modern wooden tables and chairs."),
        ("coco_2014_caption/57870.jpg", "A long restaurant table with rattan rounded back chairs."),
        (
            "coco_2014_caption/384029.jpg",
            "A man preparing desserts in a kitchen covered in frosting.",
        ),
        ("coco_2014_caption/384029.jpg", 'A chef says "done", wipes a plate, and smiles.'),
        ("coco_2014_caption/222016.jpg", "a big red telephone booth that a man is standing in"),
    ]
    assert sorted(path.name for path in (folder / "coco_2014_caption").iterdir()) == [
        "222016.jpg",
        "384029.jpg",
        "57870.jpg",
        "preview.jpg",
    ]
    assert "3 images" in run.stdout and "5 captions" in run.stdout


def test_bytes_as_served(hub, folder, pictures):
    """A decoded and re-encoded picture loses quality; every file must equal what the host served."""
    assert data2csv(hub, folder).returncode == 0
    for file in images(folder):
        served = (pictures / "images" / file.name).read_bytes()
        assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(served).digest()
    assert (
        (folder / "coco-2024-dataset.csv")
        .read_bytes()
        .startswith(b"image_path,caption\ncoco_2014_caption/")
    )


def test_more_images_asked_than_there_are(hub, folder):
    """It must take all of them and say so, not wait, fail or repeat some."""
    run = data2csv(hub, folder)
    assert (
        run.returncode == 0 and "MAX_DATA_NUMBER is 500, but the table has 6 images" in run.stdout
    )
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)


def test_second_run_fetches_nothing_and_a_larger_one_only_what_is_missing(hub, folder):
    """The table and each whole picture are kept: a second run asks the network for nothing at all."""
    data2csv(hub, folder, MAX_DATA_NUMBER=4)
    first = files(folder)
    hub.requests.clear()
    assert data2csv(hub, folder, MAX_DATA_NUMBER=4).returncode == 0
    assert hub.requests == [] and files(folder) == first
    data2csv(hub, folder, MAX_DATA_NUMBER=6)
    assert [path.rpartition("_")[2] for path in sorted(hub.requests)] == [
        "000000069675.jpg",
        "000000547471.jpg",
    ]


def test_table_columns_missing(hub, folder):
    """Forks wrote "Image 1 from COCO dataset" where the caption column was missing: no caption is ever guessed."""
    with zipfile.ZipFile(hub.temporary / "train2014.csv.zip", "w") as archive:
        archive.writestr(
            "train2014.csv", "uniq_id,image_id,text,image\n0,1,hello,http://127.0.0.1/1.jpg\n"
        )
    run = data2csv(hub, folder)
    assert run.returncode != 0 and "has no column ['caption']" in run.stderr
    assert "Traceback" not in run.stderr and files(folder) == {}


def test_image_id_that_is_a_path(hub, folder, tmp_path):
    """The image_id becomes a file name: ../../x must not be written two folders up."""
    with zipfile.ZipFile(hub.temporary / "train2014.csv.zip", "w") as archive:
        archive.writestr(
            "t.csv",
            f"image_id,caption,image\n../../x,hello,{hub.url}{FIRST_HOST}{57870:012d}.jpg\n",
        )
    before = set(tmp_path.rglob("*.jpg"))
    run = data2csv(hub, folder)
    assert run.returncode != 0 and "'../../x'" in run.stderr and "Traceback" not in run.stderr
    assert set(tmp_path.rglob("*.jpg")) == before


def test_truncated_file_of_an_earlier_kill(hub, folder, pictures):
    """A picture cut in the middle opens, and only its last rows are grey: it must be found and fetched again."""
    data2csv(hub, folder)
    damaged = folder / "coco_2014_caption" / "69675.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    hub.requests.clear()
    data2csv(hub, folder)
    assert len(hub.requests) == 1
    assert damaged.read_bytes() == (pictures / "images" / "69675.jpg").read_bytes()


def test_folder_alone_means_nothing(hub, folder):
    """MsDataset.load took an existing ./coco_2014_caption for the data set and never asked the hub."""
    (folder / "coco_2014_caption").mkdir()
    (folder / "coco_2014_caption" / "57870.jpg").write_bytes(b"")
    assert data2csv(hub, folder).returncode == 0
    assert len(picture_requests(hub)) == 6
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)


@pytest.mark.parametrize(
    "fault", [status(403), status(500), html, cut_short], ids=["403", "500", "html", "cut"]
)
def test_first_host_fails(hub, folder, pictures, fault):
    """With the table's host refusing, or giving a login page with status 200, the official host serves the pictures."""
    hub.faults[FIRST_HOST] = fault
    run = data2csv(hub, folder, fallbacks=True)
    assert run.returncode == 0 and "0 replaced" in run.stdout
    for file in images(folder):
        assert file.read_bytes() == (pictures / "images" / file.name).read_bytes()
    assert len(images(folder)) == 6


def test_picture_cut_once(hub, folder):
    """A picture whose first transfer breaks off is asked for again before another one takes its place."""
    path = f"{FIRST_HOST}COCO_train2014_{57870:012d}.jpg"

    def cut_once(handler):
        del hub.faults[path]
        cut_short(handler)

    hub.faults[path] = cut_once
    run = data2csv(hub, folder, OFFICIAL_IMAGE_URL=hub.url + "/nothing/{image_id}")
    assert run.returncode == 0 and "0 replaced" in run.stdout
    assert hub.requests.count(path) == 2


def test_picture_that_nobody_has(hub, folder):
    """It is named and the table's next one takes its place, in table order; no row points to a missing file."""
    for host in (FIRST_HOST, OFFICIAL_HOST):
        hub.faults[f"{host}COCO_train2014_{384029:012d}.jpg"] = status(404)
    run = data2csv(hub, folder, fallbacks=True, MAX_DATA_NUMBER=3, CAPTIONS_PER_IMAGE=1)
    assert (
        run.returncode == 0
        and "1 replaced" in run.stdout
        and "Image 384029" in run.stdout + run.stderr
    )
    paths = [row["image_path"] for row in read_csv(folder / "coco-2024-dataset.csv")]
    assert paths == [f"coco_2014_caption/{number}.jpg" for number in (57870, 222016, 520950)]
    assert [file.name for file in images(folder)] == sorted(Path(path).name for path in paths)


def test_both_hosts_dead(tmp_path, folder):
    """It must stop soon and not walk all 82,783 images; what is there stays, and no CSV claims to be whole."""
    rows = [(f"images/{number}.jpg", "a caption") for number in range(1, 301)]
    with Hub(write_pictures(tmp_path / "many", rows, size=(16, 16))) as hub:
        data2csv(hub, folder, fallbacks=True, MAX_DATA_NUMBER=2)
        first = files(folder)
        hub.faults = {FIRST_HOST: status(404), OFFICIAL_HOST: status(404)}
        hub.requests.clear()
        run = data2csv(hub, folder, fallbacks=True, MAX_DATA_NUMBER=300)
        assert (
            run.returncode != 0
            and "32 images in a row failed" in run.stderr
            and "Traceback" not in run.stderr
        )
        assert len(hub.requests) < 4 * (32 + 16)
        assert files(folder) == first


def test_host_that_is_down_is_asked_last(tmp_path, folder):
    """A dead first host must not cost each of 82,783 pictures its own retries."""
    rows = [(f"images/{number}.jpg", "a caption") for number in range(1, 101)]
    with Hub(write_pictures(tmp_path / "many", rows, size=(16, 16))) as hub:
        hub.faults[FIRST_HOST] = status(404)
        second_host = hub.constants("data2csv.py")["OFFICIAL_IMAGE_URL"].replace(
            "127.0.0.1", "localhost"
        )
        run = data2csv(hub, folder, OFFICIAL_IMAGE_URL=second_host, DOWNLOAD_THREADS=4)
        assert run.returncode == 0 and "100 images" in run.stdout and "0 replaced" in run.stdout
        assert sum(path.startswith(FIRST_HOST) for path in hub.requests) < 20


def test_table_moved(hub, folder):
    """The table has moved before: the address comes from the loader script, not from what was once known."""
    hub.loader_script = f'BASE = 1\nURLS = {{"validation": "x/val.csv.zip", "train": "{hub.url}{OLD_TABLE}"}}\nboom()'
    assert data2csv(hub, folder).returncode == 0
    assert OLD_TABLE in hub.requests and TABLE not in hub.requests


def test_loader_gone_then_known_addresses(hub, folder):
    """Without the loader script the known addresses are tried, newest first, past one that answers with HTML."""
    hub.faults = {LOADER: status(404), TABLE: html}
    assert data2csv(hub, folder, fallbacks=True).returncode == 0
    tables = [path for path in hub.requests if path.endswith(".zip")]
    assert tables == [TABLE, OLD_TABLE]


def test_loader_and_tables_gone_then_annotations(hub, folder):
    """COCO's annotations are the last source: the same captions, and the output says that the order differs."""
    hub.faults = {LOADER: status(404), TABLE: status(404), OLD_TABLE: cut_short}
    run = data2csv(hub, folder, fallbacks=True)
    assert run.returncode == 0, run.stderr
    assert "order differs" in run.stdout
    rows = read_csv(folder / "coco-2024-dataset.csv")
    assert Counter(row["image_path"] for row in rows)["coco_2014_caption/57870.jpg"] == 3
    assert {" ".join(caption.split()) for _, caption in CAPTIONS} == {
        row["caption"] for row in rows
    }
    assert not any(path.startswith(FIRST_HOST) for path in hub.requests)


def test_no_table_anywhere(hub, folder):
    """Everything dead: one message that names what was tried, exit code, no CSV."""
    hub.faults = {LOADER: status(404), TABLE: status(403), OLD_TABLE: cut_short, ANNOTATIONS: html}
    run = data2csv(hub, folder, fallbacks=True)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert all(path in run.stdout for path in (TABLE, OLD_TABLE, ANNOTATIONS))
    assert files(folder) == {}


def test_empty_captions(tmp_path, folder):
    """A caption of spaces only is dropped and counted; an image that has no other is no image of the data set."""
    rows = [
        ("images/1.jpg", "  \n"),
        ("images/1.jpg", "a dog"),
        ("images/2.jpg", " "),
        ("images/3.jpg", "a cat"),
    ]
    with Hub(write_pictures(tmp_path / "pictures", rows)) as hub:
        run = data2csv(hub, folder, CSV_PATH="lists/all.csv")
        assert "2 images" in run.stdout and "2 empty captions" in run.stdout
    assert [tuple(row.values()) for row in read_csv(folder / "lists" / "all.csv")] == [
        ("../coco_2014_caption/3.jpg", "a cat"),
        ("../coco_2014_caption/1.jpg", "a dog"),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_DATA_NUMBER", 0), ("MAX_DATA_NUMBER", "5"), ("CAPTIONS_PER_IMAGE", None)],
)
def test_impossible_constants(hub, folder, name, value):
    """Told in one sentence, before anything is fetched."""
    run = data2csv(hub, folder, **{name: value})
    assert run.returncode != 0 and name in run.stderr and "Traceback" not in run.stderr
    assert hub.requests == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c(hub, folder):
    """It ends at once with one line, though all threads wait for an answer; run again, it ends as undisturbed."""
    hub.faults[FIRST_HOST] = lambda handler: time.sleep(20)
    started = time.monotonic()
    process = subprocess.Popen(
        command("data2csv.py"),
        cwd=folder,
        env=variables(hub.environment()),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not picture_requests(hub) and time.monotonic() - started < 15:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert (
        process.returncode == 130 and "run again to go on" in errors and "Traceback" not in errors
    )
    hub.faults.clear()
    assert data2csv(hub, folder).returncode == 0
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)
