"""data2csv.py against the stand-in hub: which images and captions it takes, and from which source.

python -m pytest tests/test_data2csv.py -q
"""

import csv
import hashlib
import re
import signal
import subprocess
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import CAPTIONS, command, posix, read_csv, variables, write_images
from PIL import Image
from support import launch
from support.hub import ANNOTATIONS, OLD_TABLE, Hub, cut_short, html, status
from support.run_data2csv import (
    FIRST_HOST,
    LOADER,
    OFFICIAL_HOST,
    TABLE,
    data2csv,
    files,
    image_requests,
    images,
    refusal,
)


@pytest.fixture
def script():
    """data2csv.py as a module of its own, with its constants as they are in the file."""
    return launch.load("data2csv.py", [])


def write_table(hub: Hub, *rows: tuple) -> None:
    """Put a table with these rows in the place of the hub's; the first row names the columns."""
    path = hub.temporary / "table.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    with zipfile.ZipFile(hub.temporary / "train2014.csv.zip", "w") as archive:
        archive.write(path, "train2014.csv")


# Images and captions


def test_images_and_captions_in_table_order(hub, folder):
    """The captions of an image stand together, in the table's order, with single spaces."""
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
    assert "3 images are there" in run.stdout and "5 captions" in run.stdout
    assert "\x1b[A" not in run.stderr, "two progress bars at a time"


def test_preview_shows_images_as_people_see_them(script, tmp_path, monkeypatch):
    """Clear ground is white, and what a camera has turned stands upright."""
    monkeypatch.setattr(script, "IMAGE_FOLDER", str(tmp_path))
    monkeypatch.setattr(script, "PREVIEW_COLUMNS", 2)
    clear = Image.new("LA", (256, 192), (0, 0))
    clear.save(tmp_path / "1.jpg", "PNG")
    turned = Image.new("RGB", (192, 96), "red")
    turned.paste("blue", (0, 0, 96, 96))
    exif = Image.Exif()
    exif[0x0112] = 6  # its left half is the upper one
    turned.save(tmp_path / "2.jpg", "PNG", exif=exif)
    sheet = script.draw_preview({1: "a dog", 2: "a cat"})
    gap = script.PREVIEW_FONT_SIZE
    assert sheet.getpixel((gap + 128, gap + 96)) == (255, 255, 255)
    x = 2 * gap + 256 + 128
    assert sheet.getpixel((x, gap + 48)) == (0, 0, 255)
    assert sheet.getpixel((x, gap + 144)) == (255, 0, 0)


def test_preview_is_only_for_looking(script, tmp_path, monkeypatch, capsys):
    """Whatever Pillow raises, the run is complete. Otherwise it ends in a traceback."""

    def fail(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(script, "IMAGE_FOLDER", str(tmp_path))
    monkeypatch.setattr(script.ImageOps, "exif_transpose", fail)
    Image.new("RGB", (10, 10)).save(tmp_path / "1.jpg")
    script.write_preview({1: script.Entry([], ["a dog"])}, [1])
    assert "was not written (not a TIFF file). All else is complete." in capsys.readouterr().out
    assert not (tmp_path / "preview.jpg").exists()


def test_bytes_as_served(hub, folder, hub_folder):
    """Every file equals what the host served. Otherwise images lose quality."""
    assert data2csv(hub, folder).returncode == 0
    for file in images(folder):
        served = (hub_folder / "images" / file.name).read_bytes()
        assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(served).digest()
    table = (folder / "coco-2024-dataset.csv").read_bytes()
    assert table.startswith(b"image_path,caption\ncoco_2014_caption/")


def test_more_images_asked_than_there_are(hub, folder):
    """All of them are taken, and the output says so."""
    run = data2csv(hub, folder)
    assert run.returncode == 0
    assert "MAX_DATA_NUMBER is 500, but the table has only 6 images" in run.stdout
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)


def test_second_run_fetches_nothing_and_a_larger_one_only_what_is_missing(hub, folder):
    """The table and every whole image are kept: a second run asks for nothing at all."""
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


def test_empty_captions(tmp_path, folder):
    """A caption of spaces is dropped and counted; an image without another one is not taken."""
    rows = [
        ("images/1.jpg", "  \n"),
        ("images/1.jpg", "a dog"),
        ("images/2.jpg", " "),
        ("images/3.jpg", "a cat"),
    ]
    with Hub(write_images(tmp_path / "served", rows)) as hub:
        run = data2csv(hub, folder, CSV_PATH="lists/all.csv")
        assert "2 images" in run.stdout and "2 empty captions" in run.stdout
    assert [tuple(row.values()) for row in read_csv(folder / "lists" / "all.csv")] == [
        ("../coco_2014_caption/3.jpg", "a cat"),
        ("../coco_2014_caption/1.jpg", "a dog"),
    ]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("", ""),
        (" \t\r\n", ""),
        ("\u3000\xa0", ""),  # spaces of other scripts
        ("\ufeff", ""),  # byte order mark
        ("\u200b\u200d\u2060", ""),  # zero-width space, joiner, word joiner
        ("\x00\x1b\x7f", ""),
        ("\ud800", ""),  # half a surrogate pair, which JSON can spell
        ("nan", "nan"),
        ("null", "null"),
        ("None", "None"),
        ("0", "0"),
        (" a  cat\r\nand\ta dog ", "a cat and a dog"),
        ("a \ud800cat", "a cat"),
        ("一只猫。", "一只猫。"),
        ("👍", "👍"),
    ],
)
def test_clean_caption(script, text, caption):
    """Text that shows nothing is empty; words that mean nothing to a program are words."""
    assert script.clean_caption(text) == caption


# Tables


@pytest.mark.parametrize("missing", ["caption", "image", "image_id"])
def test_table_columns_missing(hub, folder, missing):
    """A table without a column ends the run. Otherwise captions would be guessed, as forks did."""
    row = {"uniq_id": 0, "image_id": 1, "text": "hello", "caption": "hello", "image": "http://x/1"}
    del row[missing]
    write_table(hub, tuple(row), tuple(row.values()))
    sentence = refusal(data2csv(hub, folder))
    assert f"has no column ['{missing}']" in sentence
    assert files(folder) == {}


def test_image_id_that_is_a_path(hub, folder, tmp_path):
    """An image_id that is no number ends the run. Otherwise ../../x is written two folders up."""
    url = f"{hub.url}{FIRST_HOST}{57870:012d}.jpg"
    write_table(hub, ("image_id", "caption", "image"), ("../../x", "hello", url))
    before = set(tmp_path.rglob("*.jpg"))
    assert "'../../x'" in refusal(data2csv(hub, folder))
    assert set(tmp_path.rglob("*.jpg")) == before


def test_one_image_under_several_spellings_of_its_id(hub, folder):
    """Rows with the ids 57870 and 057870 are one image, at the address of the first."""
    url = f"{hub.url}{FIRST_HOST}COCO_train2014_{57870:012d}.jpg"
    rows = [("57870", "a cat", url), ("057870", "a dog", "http://x/1.jpg"), ("57870", "a cow", url)]
    write_table(hub, ("image_id", "caption", "image"), *rows)
    assert data2csv(hub, folder).returncode == 0
    assert [tuple(row.values()) for row in read_csv(folder / "coco-2024-dataset.csv")] == [
        ("coco_2014_caption/57870.jpg", caption) for caption in ("a cat", "a dog", "a cow")
    ]


@pytest.mark.parametrize("address", ["", "nan", "//x/1.jpg", "http://[", "ftp://x/1.jpg"])
def test_table_without_an_address(hub, folder, address):
    """An image whose address is empty or none comes from COCO's own host."""
    write_table(hub, ("image_id", "caption", "image"), (57870, "a cat", address))
    assert data2csv(hub, folder, fallbacks=True).returncode == 0
    assert [file.name for file in images(folder)] == ["57870.jpg"]


def test_table_moved(hub, folder):
    """The table's address comes from the loader script, which is read and never run."""
    urls = f'{{"validation": "x/val.csv.zip", "train": "{hub.url}{OLD_TABLE}"}}'
    hub.loader_script = f"BASE = 1\nURLS = {urls}\nboom()"
    assert data2csv(hub, folder).returncode == 0
    assert OLD_TABLE in hub.requests and TABLE not in hub.requests


def test_loader_gone_then_known_addresses(hub, folder):
    """Without the loader script the known addresses are tried, newest first, past a login page."""
    hub.faults = {LOADER: status(404), TABLE: html}
    assert data2csv(hub, folder, fallbacks=True).returncode == 0
    tables = [path for path in hub.requests if path.endswith(".zip")]
    assert tables == [TABLE, OLD_TABLE]


def test_loader_and_tables_gone_then_annotations(hub, folder):
    """COCO's annotations are the last source: the same captions, in an order that is announced."""
    hub.faults = {LOADER: status(404), TABLE: status(404), OLD_TABLE: cut_short}
    run = data2csv(hub, folder, fallbacks=True)
    assert run.returncode == 0, run.stderr
    assert "in another order" in run.stdout
    rows = read_csv(folder / "coco-2024-dataset.csv")
    assert Counter(row["image_path"] for row in rows)["coco_2014_caption/57870.jpg"] == 3
    captions = {" ".join(caption.split()) for _, caption in CAPTIONS}
    assert captions == {row["caption"] for row in rows}
    assert not any(path.startswith(FIRST_HOST) for path in hub.requests)


def test_no_table_anywhere(hub, folder):
    """With every source dead, the run ends with the names of all that were tried, and no CSV."""
    hub.faults = {LOADER: status(404), TABLE: status(403), OLD_TABLE: cut_short, ANNOTATIONS: html}
    run = data2csv(hub, folder, fallbacks=True)
    assert "caption table could not be downloaded" in refusal(run)
    assert all(path in run.stdout for path in (TABLE, OLD_TABLE, ANNOTATIONS))
    assert files(folder) == {}


# Image hosts


def test_truncated_file_of_an_earlier_kill(hub, folder, hub_folder):
    """An image cut in the middle is fetched again, though it opens with grey rows at its end."""
    data2csv(hub, folder)
    damaged = folder / "coco_2014_caption" / "69675.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    hub.requests.clear()
    data2csv(hub, folder)
    assert len(hub.requests) == 1
    assert damaged.read_bytes() == (hub_folder / "images" / "69675.jpg").read_bytes()


def test_folder_alone_means_nothing(hub, folder):
    """A folder with an empty file is not the data set. Otherwise nothing would be downloaded."""
    (folder / "coco_2014_caption").mkdir()
    (folder / "coco_2014_caption" / "57870.jpg").write_bytes(b"")
    assert data2csv(hub, folder).returncode == 0
    assert len(image_requests(hub)) == 6
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)


@pytest.mark.parametrize(
    "fault", [status(403), status(500), html, cut_short], ids=["403", "500", "html", "cut"]
)
def test_first_host_fails(hub, folder, hub_folder, fault):
    """If the table's host refuses or gives a login page, the official host serves all images."""
    hub.faults[FIRST_HOST] = fault
    run = data2csv(hub, folder, fallbacks=True)
    assert run.returncode == 0 and "0 skipped" in run.stdout
    for file in images(folder):
        assert file.read_bytes() == (hub_folder / "images" / file.name).read_bytes()
    assert len(images(folder)) == 6


def test_image_cut_once(hub, folder):
    """An image whose transfer breaks off is asked for again before another takes its place."""
    path = f"{FIRST_HOST}COCO_train2014_{57870:012d}.jpg"

    def cut_once(handler):
        del hub.faults[path]
        cut_short(handler)

    hub.faults[path] = cut_once
    run = data2csv(hub, folder, COCO_URL=hub.url + "/nothing", BACKOFF=0)
    assert run.returncode == 0 and "0 skipped" in run.stdout
    assert hub.requests.count(path) == 2


def test_image_that_nobody_has(hub, folder):
    """It is named, the table's next image takes its place, and no row points to a missing file."""
    for host in (FIRST_HOST, OFFICIAL_HOST):
        hub.faults[f"{host}COCO_train2014_{384029:012d}.jpg"] = status(404)
    run = data2csv(hub, folder, fallbacks=True, MAX_DATA_NUMBER=3, CAPTIONS_PER_IMAGE=1)
    assert run.returncode == 0 and "1 skipped" in run.stdout
    assert "384029.jpg could not be downloaded" in run.stdout + run.stderr
    paths = [row["image_path"] for row in read_csv(folder / "coco-2024-dataset.csv")]
    assert paths == [f"coco_2014_caption/{number}.jpg" for number in (57870, 222016, 520950)]
    assert [file.name for file in images(folder)] == sorted(Path(path).name for path in paths)


def test_both_hosts_dead(tmp_path, folder):
    """The run ends after 32 images in a row, not after 82,783; what is there stays as it is."""
    rows = [(f"images/{number}.jpg", "a caption") for number in range(1, 301)]
    with Hub(write_images(tmp_path / "many", rows, size=(16, 16))) as hub:
        data2csv(hub, folder, fallbacks=True, MAX_DATA_NUMBER=2)
        first = files(folder)
        hub.faults = {FIRST_HOST: status(404), OFFICIAL_HOST: status(404)}
        hub.requests.clear()
        run = data2csv(hub, folder, fallbacks=True, MAX_DATA_NUMBER=300)
        assert refusal(run).startswith("32 images in a row could not be downloaded")
        # four requests an image, and at most 64 images are on their way when the 32nd fails
        assert len(hub.requests) <= 4 * (32 + 64)
        assert files(folder) == first


def test_host_that_is_down_is_asked_last(tmp_path, folder):
    """A dead first host is asked a few times only, not twice for each of 82,783 images."""
    rows = [(f"images/{number}.jpg", "a caption") for number in range(1, 101)]
    with Hub(write_images(tmp_path / "many", rows, size=(16, 16))) as hub:
        hub.faults[FIRST_HOST] = status(404)
        second_host = hub.url.replace("127.0.0.1", "localhost")
        run = data2csv(hub, folder, COCO_URL=second_host, DOWNLOAD_THREADS=4)
        assert run.returncode == 0
        assert "100 images are there, 0 skipped" in run.stdout
        assert sum(path.startswith(FIRST_HOST) for path in hub.requests) < 20


def test_one_connection_per_thread(hub, script, tmp_path, monkeypatch):
    """All threads keep their connections from image to image. Otherwise each costs a new one."""
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    together = threading.Barrier(20, timeout=60)
    ports = set()

    def answer(handler):
        ports.add(handler.client_address[1])
        together.wait()
        handler.answer()

    hub.faults[OFFICIAL_HOST] = answer
    script.DOWNLOAD_THREADS = 20
    downloader = script.Downloader()
    url = f"{hub.url}{OFFICIAL_HOST}COCO_train2014_{57870:012d}.jpg"
    paths = [tmp_path / f"{number}.jpg" for number in range(60)]
    with ThreadPoolExecutor(20) as pool:
        for wave in (paths[:20], paths[20:40], paths[40:]):
            fetched = pool.map(lambda path: downloader.fetch(path, [url], script.read_image), wave)
            assert all(fetched)
    assert len(image_requests(hub)) == 60 and len(ports) == 20


# Constants


def test_every_constant_is_checked(script):
    """Each constant between the two rules has a rule of its own, and is refused by its name."""
    source = Path(script.__file__).read_text(encoding="utf-8")
    block = re.split("^# -{98}$", source, flags=re.MULTILINE)[1]
    names = re.findall("^([A-Z_]+)", block, flags=re.MULTILINE)
    assert names == list(get_type_hints(script)) and len(names) > 25
    script.check_constants()
    impossible = [True, -1, 0, "", " ", [], {}, (), ("",), (0, 0), (1, 2, 3)]
    impossible += [1.5, float("nan"), float("inf"), None, "http", ["x"], ["x", 1]]
    legal = {
        "MAX_DATA_NUMBER": [None],
        "CONNECT_TIMEOUT": [1.5],
        "READ_TIMEOUT": [1.5],
        "BACKOFF": [0, 1.5],
        "IMAGE_FOLDER": ["http"],
        "CSV_PATH": ["http"],
        "TABLE_FOLDER": ["http"],
        "FONTS": [[], ["x"]],
    }
    for name in names:
        good = getattr(script, name)
        for value in impossible:
            setattr(script, name, value)
            if value is not True and value in legal.get(name, []):
                script.check_constants()
            else:
                with pytest.raises(SystemExit, match=f"^{name} = .* can't work: "):
                    script.check_constants()
        setattr(script, name, good)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_DATA_NUMBER", 0),
        ("MAX_DATA_NUMBER", "5"),
        ("CAPTIONS_PER_IMAGE", None),
        ("IMAGE_FORMATS", ["JPG"]),
        ("IMAGE_FORMATS", ["JPEG", "EPS"]),
        ("IMAGE_FOLDER", "e:\new"),
        ("COCO_URL", "images.cocodataset.org"),
        ("MODELSCOPE_URL", "modelscope.cn"),
        ("TABLE_URLS", ["not an address"]),
        ("DOWNLOAD_THREADS", 1_000_000),
    ],
)
def test_impossible_constants(hub, folder, name, value):
    """An impossible constant is refused in one sentence before anything is fetched or written."""
    assert refusal(data2csv(hub, folder, **{name: value})).startswith(f"{name} = ")
    assert hub.requests == [] and not list(folder.iterdir())


def test_home_in_paths(hub, folder, tmp_path):
    """~ is the user's home in every path. Otherwise a folder named ~ is made."""
    home = tmp_path / "home"
    constants = {
        "IMAGE_FOLDER": "~/images",
        "CSV_PATH": "~/lists/all.csv",
        "TABLE_FOLDER": "~/cache",
    }
    env = {"HOME": str(home), "USERPROFILE": str(home)}
    assert data2csv(hub, folder, env=env, **constants).returncode == 0
    assert len(list((home / "images").glob("[0-9]*.jpg"))) == 6
    assert read_csv(home / "lists/all.csv")[0]["image_path"] == "../images/57870.jpg"
    assert (home / "cache/train_captions.zip").exists() and not list(folder.iterdir())


# Signals


@posix
def test_ctrl_c(hub, folder):
    """Ctrl-C ends it with one line while all threads wait; the next run ends as undisturbed."""
    hub.faults[FIRST_HOST] = lambda handler: time.sleep(20)
    process = subprocess.Popen(
        command("data2csv.py"),
        cwd=folder,
        env=variables(hub.environment()),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not image_requests(hub) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped." in errors and "Traceback" not in errors
    hub.faults.clear()
    assert data2csv(hub, folder).returncode == 0
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)
