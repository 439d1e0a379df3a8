"""data2csv.py when things go wrong: networks, kills, disks, constants; and what it needs for the whole table."""

import io
import json
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import command, run_and_stop, run_script, variables, write_pictures
from PIL import Image
from support import launch
from support.hub import (
    ANNOTATIONS,
    OLD_TABLE,
    Hub,
    cut_short,
    drip,
    garbled,
    hang_up,
    html,
    late,
    on_share,
    status,
    wrong_length,
)
from test_data2csv import FIRST_HOST, LOADER, OFFICIAL_HOST, TABLE, data2csv, files, images
from tools.scale_data2csv import BigHub, measure

posix = pytest.mark.skipif(
    sys.platform == "win32", reason="signals, limits and usage are those of POSIX"
)
QUICK = {"TIMEOUT": [1, 1], "BACKOFF": 0}  # constants with which a fault costs a second
FAULTS = {
    "hung up": hang_up,
    "403": status(403),
    "404": status(404),
    "500": status(500),
    "cut": cut_short,
    "drip": drip(pause=0.1, pieces=10_000),
    "longer": wrong_length(1.5),
    "shorter": wrong_length(0.5),
    "garbled": garbled,
    "html": html,
}
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A hub with 100 pictures, one caption each, and what an undisturbed run leaves of them."""
    rows = [(f"images/{number}.jpg", f"caption {number}") for number in range(1, 101)]
    with Hub(write_pictures(tmp_path_factory.mktemp("many") / "pictures", rows)) as hub:
        folder = tmp_path_factory.mktemp("undisturbed")
        started = time.monotonic()
        run = data2csv(hub, folder)
        assert run.returncode == 0, run.stderr
        hub.undisturbed, hub.seconds = files(folder), time.monotonic() - started
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture(autouse=True)
def no_faults(request):
    """The next test finds the shared hub without faults."""
    yield
    if "many" in request.fixturenames:
        request.getfixturevalue("many").faults = {}


def refused_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def clean(run: subprocess.CompletedProcess) -> str:
    """The one sentence of a run that was refused."""
    assert run.returncode not in (0, None) and "Traceback" not in run.stderr, run.stderr
    return run.stderr.strip().splitlines()[-1]


# The network


@each_fault
def test_table_fault(many, folder, fault):
    """Whatever the table's host does, the next address is asked, in time, and what came is not kept as the table."""
    many.faults = {TABLE: fault}
    started = time.monotonic()
    run = data2csv(many, folder, fallbacks=True, **QUICK)
    assert run.returncode == 0 and time.monotonic() - started < 15, run.stderr
    assert many.undisturbed == files(folder)
    assert zipfile.ZipFile(folder / ".cache/coco_2014_caption/train_captions.zip").testzip() is None


@pytest.mark.parametrize("address", ["refused", "http://no.such.host.invalid", "not an address"])
def test_address_fault(many, folder, tmp_path, address):
    """Nobody listens, no name server knows it, no address at all: known addresses help, for table and pictures."""
    address = refused_address() if address == "refused" else address
    loader, many.loader_script = many.loader_script, f'URL = "{address}/train.csv.zip"'
    try:
        constants = {**many.constants("data2csv.py"), **QUICK, "MODELSCOPE_URL": address}
        environment = {
            **many.environment(),
            "NETWORK_GUARD_LOG": str(tmp_path / "log"),
        }  # here it is the name server
        for number, given in enumerate(
            (
                {"TABLE_URLS": [address, many.url + TABLE]},
                {"OFFICIAL_IMAGE_URL": address + "/{image_id}"},
            )
        ):
            run = run_script("data2csv.py", folder, environment, **{**constants, **given})
            assert run.returncode == 0 and many.undisturbed == files(folder), (number, run.stderr)
    finally:
        many.loader_script = loader


@pytest.mark.parametrize("percent", [1, 30, 100])
@each_fault
def test_picture_fault(many, folder, fault, percent):
    """On one picture, on some or on all of one host: the other host gives the same bytes and none is left out."""
    many.faults = {FIRST_HOST: on_share(fault, percent)}
    started = time.monotonic()
    run = data2csv(many, folder, fallbacks=True, **QUICK)
    assert run.returncode == 0 and time.monotonic() - started < 30, run.stderr
    assert many.undisturbed == files(folder)


def test_everything_dead(many, folder):
    """Nobody answers: soon, one sentence behind the names of all that was tried; what is there stays."""
    data2csv(many, folder, MAX_DATA_NUMBER=3)
    before = files(folder)
    (folder / ".cache/coco_2014_caption/train_captions.zip").unlink()
    dead = refused_address()
    constants = {
        name: json.loads(json.dumps(value).replace(many.url, dead))
        for name, value in many.constants("data2csv.py").items()
    }
    started = time.monotonic()
    run = run_script(
        "data2csv.py",
        folder,
        {**many.environment(), "MODELSCOPE_ENDPOINT": dead},
        BACKOFF=0.5,
        **constants,
    )
    assert "caption table" in clean(run) and time.monotonic() - started < 25
    assert all(f"{dead}{path}" in run.stdout for path in (LOADER, TABLE, OLD_TABLE, ANNOTATIONS))
    assert files(folder) == before


# Kills


@posix
def test_killed_at_any_moment(many, tmp_path):
    """Twenty kills over the whole run, the table's download included: the next run ends as if nothing had been."""
    many.faults = {LOADER: late(0.2), TABLE: drip(pause=0.05, pieces=8), FIRST_HOST: late(0.05)}
    constants = {"DOWNLOAD_THREADS": 8}
    started = time.monotonic()
    (tmp_path / "slow").mkdir()
    data2csv(many, tmp_path / "slow", **constants)
    seconds = time.monotonic() - started
    moments = [random.Random(number).uniform(0.1, seconds) for number in range(20)]

    def kill_and_finish(number: int) -> int:
        folder = tmp_path / str(number)
        folder.mkdir()
        killed = run_and_stop(
            "data2csv.py", folder, many.environment(), moments[number], **constants
        )
        run = data2csv(many, folder, **constants)
        assert run.returncode == 0 and files(folder) == many.undisturbed, (
            moments[number],
            run.stderr,
        )
        assert not list(folder.rglob("*.part"))
        return killed.returncode

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(kill_and_finish, range(20)))
    assert codes.count(-signal.SIGKILL) >= 10, codes


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("path", [LOADER, TABLE, FIRST_HOST], ids=["loader", "table", "pictures"])
def test_stopped(many, folder, path, sent):
    """Ctrl-C and SIGTERM end it at once with one sentence, whatever it waits for; run again, it ends as undisturbed."""
    many.faults = {path: drip(pause=0.2, pieces=10_000)}
    many.requests.clear()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command("data2csv.py"), cwd=folder, env=variables(many.environment()), **options
    )
    started = time.monotonic()
    while (
        not any(asked.startswith(path) for asked in list(many.requests))
        and time.monotonic() - started < 20
    ):
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(sent)
    sent_at = time.monotonic()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + sent and time.monotonic() - sent_at < 2
    assert (
        errors.endswith("Stopped. What is fetched stays: run again to go on.\n")
        and "Traceback" not in errors
    )
    many.faults = {}
    assert data2csv(many, folder).returncode == 0 and files(folder) == many.undisturbed
    assert not list(folder.rglob("*.part"))


def test_leftovers_of_a_killed_run(many, folder):
    """A killed larger run's temporary files go, though a smaller one that follows has no use for these images."""
    leftovers = [
        folder / "coco_2014_caption/99.part",
        folder / ".cache/coco_2014_caption/train_captions.part",
    ]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"half")
    assert data2csv(many, folder, MAX_DATA_NUMBER=2).returncode == 0
    assert not list(folder.rglob("*.part"))


# This machine


@posix
def test_disk_full(many, folder, tmp_path):
    """A write that fails gets one sentence that names the cause, not the next source; with room, it goes on."""
    rows = [(f"images/{number}.jpg", "a cat") for number in range(60)]
    with Hub(write_pictures(tmp_path / "large", rows, size=(320, 240))) as hub:
        command_line = command("data2csv.py", DOWNLOAD_THREADS=2)
        limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *command_line]
        options = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
        run = subprocess.run(limited, cwd=folder, env=variables(hub.environment()), **options)
        assert (
            "File too large" in clean(run)
            and "Make room" in clean(run)
            and "no source" not in run.stdout
        )
        assert sum(path.endswith(".jpg") for path in hub.requests) < 30, (
            "the rest of the queue is not fetched in vain"
        )
        assert data2csv(hub, folder).returncode == 0 and len(images(folder)) == 60


def test_less_room_than_the_images_need(many, folder):
    """The estimate is compared with the free space before the first picture is fetched, not found out after hours."""
    many.requests.clear()
    assert "make room" in clean(data2csv(many, folder, IMAGE_BYTES=10**15))
    assert not any(path.startswith((FIRST_HOST, OFFICIAL_HOST)) for path in many.requests)


@pytest.mark.parametrize(
    ("constants", "early"),
    [
        ({"IMAGE_FOLDER": "a_file"}, True),
        ({"CSV_PATH": "a_file/x.csv"}, True),
        ({"CSV_PATH": "a_folder"}, False),
    ],
)
def test_place_that_cannot_be_written(many, folder, constants, early):
    """A file where a folder must be, or a CSV that can't be replaced (open in Excel): one sentence that names it."""
    (folder / "a_file").write_text("mine", encoding="utf-8")
    (folder / "a_folder" / "x").mkdir(parents=True)
    many.requests.clear()
    sentence = clean(data2csv(many, folder, MAX_DATA_NUMBER=2, **constants))
    assert (
        "a_f" in sentence
        and "Excel" in sentence
        and (folder / "a_file").read_text(encoding="utf-8") == "mine"
    )
    assert (many.requests == []) == early and len(images(folder)) == (0 if early else 2)


def archive(text: str, name: str = "train.csv") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(name, text)
    return file.getvalue()


HEADER = "uniq_id,image_id,caption,image\n"
TWISTED = (
    archive(HEADER + "0,1,a cat,x\n")[:-4] + b"\xff\0\0\0"
)  # its end points before its beginning: an OSError


@pytest.mark.parametrize(
    "damage", [b"", b"PK", archive(""), archive(HEADER), archive(HEADER + "0,1, ,x\n"), TWISTED]
)
def test_damaged_table(many, folder, damage):
    """In the cache it is fetched again; from a source it is refused and not kept, and the next source is asked."""
    cached = folder / ".cache/coco_2014_caption/train_captions.zip"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(damage)
    many.faults = {TABLE: lambda handler: handler.send(200, damage)}
    assert (
        data2csv(many, folder, fallbacks=True).returncode == 0 and files(folder) == many.undisturbed
    )
    many.faults = {
        TABLE: many.faults[TABLE],
        OLD_TABLE: many.faults[TABLE],
        ANNOTATIONS: many.faults[TABLE],
    }
    cached.unlink()
    assert (
        "caption table" in clean(data2csv(many, folder, fallbacks=True, **QUICK))
        and not cached.exists()
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_truncated_file_of_another_format(many, folder, kind):
    """Only decoding finds a PNG or WebP that breaks off: opening it succeeds."""
    file = io.BytesIO()
    Image.effect_noise((64, 48), 90).save(file, kind)
    (folder / "coco_2014_caption").mkdir()
    (folder / "coco_2014_caption/5.jpg").write_bytes(file.getvalue()[:-500])
    assert data2csv(many, folder).returncode == 0 and files(folder) == many.undisturbed


def test_archive_whose_member_leads_out_of_the_folder(many, folder, tmp_path):
    """A member named ../../x must not be written there; nothing is unpacked."""
    table = archive(
        f"{HEADER}0,7,a cat,{many.url}{FIRST_HOST}COCO_train2014_000000000007.jpg\n",
        "../../../../evil.csv",
    )
    many.faults = {TABLE: lambda handler: handler.send(200, table)}
    run = data2csv(many, folder)
    assert run.returncode == 0 and [file.name for file in images(folder)] == ["7.jpg"]
    assert not list(tmp_path.rglob("evil*"))


def test_every_constant_is_checked():
    """Each constant, wrong in type or range, is refused by its name; one without a rule would end in a traceback."""
    script = launch.load("data2csv.py", [])
    names = [name for name in vars(script) if name.isupper()]
    assert len(names) > 25
    script.check_constants()
    for name in names:
        good = getattr(script, name)
        for bad in (
            True,
            -1,
            0,
            "",
            " ",
            [],
            {},
            (),
            ("",),
            (0, 0),
            1.5,
            float("nan"),
            None,
            "http",
            ["x"],
            (1, 2, 3),
        ):
            legal = {"MAX_DATA_NUMBER": (None,), "BACKOFF": (0, 1.5)}.get(
                name, ("http",) if isinstance(good, str) else ()
            )
            setattr(script, name, bad)
            if bad is not True and bad in legal:
                script.check_constants()
            else:
                with pytest.raises(SystemExit, match=f"^{name} = .* it must be "):
                    script.check_constants()
        setattr(script, name, good)


# The whole table


@posix
def test_memory_of_the_whole_table(folder):
    """A table of 414,113 rows, as the real one, is held in 300 MB, however few or many images are wanted."""
    with BigHub((64, 48)) as hub:
        seconds, memory = measure(folder, hub.environment(), MAX_DATA_NUMBER=1500)
    assert len(images(folder)) == 1500 and memory < 300, memory


# The preview


def test_preview(many, folder):
    """24 pictures on a sheet of six columns, the same from run to run, beside the pictures but not among them."""
    assert data2csv(many, folder).returncode == 0
    path = folder / "coco_2014_caption/preview.jpg"
    first = path.read_bytes()
    with Image.open(path) as sheet:
        assert sheet.size == (16 + 6 * (256 + 16), 16 + 4 * (192 + 2 * 16 + 72))
        cells = [sheet.convert("L").crop((x, y, x + 256, y + 192)) for x, y in corners()]
        texts = [sheet.convert("L").crop((x, y + 192 + 4, x + 256, y + 280)) for x, y in corners()]
    assert all(cell.getextrema()[0] < 100 for cell in cells) and all(
        text.getextrema()[0] < 100 for text in texts
    )
    assert data2csv(many, folder).returncode == 0 and path.read_bytes() == first
    assert min(
        (folder / "coco_2014_caption").glob("*.jpg")
    ).stem.isdigit()  # load_model.py takes the first


def corners() -> list[tuple[int, int]]:
    return [(16 + column * 272, 16 + row * 296) for row in range(4) for column in range(6)]


@pytest.mark.parametrize(
    ("caption", "hint"),
    [
        (
            "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW and more words "
            * 3,
            False,
        ),
        (
            "两只狗 (golden retrievers) 在公园的草地上追逐一个黄色的 frisbee，旁边还有很多很多的人在看。"
            * 2,
            True,
        ),
        ("A café, a “naïve” façade – quoted", False),
    ],
    ids=["wide", "Chinese", "Latin"],
)
def test_preview_captions(tmp_path, folder, caption, hint):
    """A caption stays beneath its own picture, and no font for Chinese is asked of people whose captions need none."""
    rows = [(f"images/{number}.jpg", f"{caption} {number}") for number in range(1, 9)]
    with Hub(write_pictures(tmp_path / "pictures", rows)) as hub:
        run = data2csv(hub, folder, FONTS=["no such font.ttf"])
    assert run.returncode == 0 and ("lacks Chinese letters" in run.stdout) == hint, (
        run.stdout + run.stderr
    )
    with Image.open(folder / "coco_2014_caption/preview.jpg") as sheet:
        sheet = sheet.convert("L")
    gaps = [
        sheet.crop((272 * column + 4, 0, 272 * column + 12, sheet.height)) for column in range(7)
    ]
    gaps += [
        sheet.crop((0, 16 + 296 * row - 12, sheet.width, 16 + 296 * row - 6)) for row in range(1, 3)
    ]
    assert all(gap.getextrema()[0] > 200 for gap in gaps)
