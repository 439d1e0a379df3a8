"""data2csv.py when things go wrong: networks, proxies, kills, disks, tables; and its memory.

Timeouts here only end a run that hangs. What a fault costs is seen in the number of requests.
"""

import gzip
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import (
    CAPTIONS,
    TESTS,
    command,
    posix,
    read_csv,
    run_and_stop,
    run_script,
    variables,
    write_images,
)
from PIL import Image
from support import launch, socks_proxy
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
    whole_body,
    wrong_length,
)
from support.run_data2csv import (
    FIRST_HOST,
    LOADER,
    OFFICIAL_HOST,
    QUICK,
    TABLE,
    data2csv,
    files,
    image_requests,
    images,
    refusal,
)
from tools.scale_data2csv import BigHub, measure

pytestmark = pytest.mark.slow


def zipped(handler):
    """The truth, compressed on the way, as some hosts send everything."""
    headers = {"Content-Encoding": "gzip"}
    handler.send(200, gzip.compress(whole_body(handler)), headers=headers)


def nonsense_length(handler):
    """The truth, with a Content-Length that is no number, until the connection ends."""
    body = whole_body(handler)
    handler.send(200, io.BytesIO(body), length=len(body), headers={"Content-Length": "many"})
    handler.close_connection = True


def endless(handler):
    """An answer that never ends, as from a host that sends something else than was asked for."""
    handler.send(200, b"", headers={"Content-Length": 10**15})
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
            handler.server.hub.sent = getattr(handler.server.hub, "sent", 0) + (1 << 16)
    except OSError:
        pass


def redirect(location: bytes):
    def fault(handler):
        head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location
        handler.wfile.write(head + b"\r\n\r\n")

    return fault


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
    "redirect to nothing": redirect(b"http://[bad"),
    "redirect in Latin-1": redirect(b"/caf\xe9"),
    "redirect to a file": redirect(b"file:///etc/hostname"),
}
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A hub with 40 images, one caption each, and what an undisturbed run leaves of them."""
    rows = [(f"images/{number}.jpg", f"caption {number}") for number in range(1, 41)]
    with Hub(write_images(tmp_path_factory.mktemp("many") / "served", rows)) as hub:
        folder = tmp_path_factory.mktemp("undisturbed")
        run = data2csv(hub, folder)
        assert run.returncode == 0, run.stderr
        hub.undisturbed = files(folder)
        hub.requests.clear()
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture(autouse=True)
def no_faults(request):
    """The next test finds the shared hub without faults."""
    yield
    if "many" in request.fixturenames:
        hub = request.getfixturevalue("many")
        hub.faults = {}
        hub.requests.clear()


@pytest.fixture
def script():
    """data2csv.py as a module of its own, with its constants as they are in the file."""
    return launch.load("data2csv.py", [])


def refused_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def no_temporary_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".part")]


# The network


@each_fault
def test_table_fault(many, folder, fault):
    """Whatever the table's host does, the next address is asked, and what came is not kept."""
    many.faults = {TABLE: fault}
    run = data2csv(many, folder, fallbacks=True, **QUICK)
    assert run.returncode == 0, run.stderr
    assert many.undisturbed == files(folder)
    assert many.requests.count(TABLE) <= 2 and many.requests.count(OLD_TABLE) == 1
    assert zipfile.ZipFile(folder / ".cache/coco_2014_caption/train_captions.zip").testzip() is None


@pytest.mark.parametrize(
    "address", ["refused", "http://no.such.host.invalid", "http://not an address"]
)
def test_address_fault(many, folder, tmp_path, address):
    """If nobody listens at an address, or it is none, the known addresses help."""
    address = refused_address() if address == "refused" else address
    loader, many.loader_script = many.loader_script, f'URL = "{address}/train.csv.zip"'
    try:
        constants = {**many.constants("data2csv.py"), **QUICK, "MODELSCOPE_URL": address}
        # The network guard takes the part of the name server
        environment = {**many.environment(), "NETWORK_GUARD_LOG": str(tmp_path / "log")}
        for given in (
            {"TABLE_URLS": [address, many.url + TABLE]},
            {"COCO_URL": address},
        ):
            run = run_script("data2csv.py", folder, environment, **{**constants, **given})
            assert run.returncode == 0 and many.undisturbed == files(folder), (given, run.stderr)
    finally:
        many.loader_script = loader


@pytest.mark.parametrize("percent", [3, 30, 100])
@each_fault
def test_image_fault(many, folder, fault, percent):
    """On one image, on some or on all of one host: the other host gives the same bytes of each."""
    many.faults = {FIRST_HOST: on_share(fault, percent)}
    run = data2csv(many, folder, fallbacks=True, **QUICK)
    assert run.returncode == 0, run.stderr
    assert many.undisturbed == files(folder)
    assert len(image_requests(many)) <= 2 * 40


@pytest.mark.parametrize("fault", [zipped, nonsense_length], ids=["gzip", "length"])
def test_unusual_answers(many, folder, fault):
    """An answer in gzip, or of unknown length, is as good as any other."""
    many.faults = {TABLE: fault, FIRST_HOST: fault}
    run = data2csv(many, folder)
    assert run.returncode == 0 and many.undisturbed == files(folder), run.stderr
    assert many.requests.count(TABLE) == 1 and len(image_requests(many)) == 40


def test_redirect_to_another_host(many, folder):
    """A host may send the script on to another one."""

    def elsewhere(handler):
        address = f"http://localhost:{handler.server.server_port}"
        path = handler.path.replace(FIRST_HOST, OFFICIAL_HOST).replace(TABLE, OLD_TABLE)
        redirect(f"{address}{path}".encode())(handler)

    many.faults = {TABLE: elsewhere, FIRST_HOST: elsewhere}
    run = data2csv(many, folder)
    assert run.returncode == 0 and many.undisturbed == files(folder), run.stderr


def test_endless_answer(many, folder):
    """An answer beyond MAX_FILE_BYTES is given up. Otherwise it fills the disk."""
    many.faults = {f"{FIRST_HOST}COCO_train2014_{7:012d}.jpg": endless}
    run = data2csv(many, folder, fallbacks=True, MAX_FILE_BYTES=1_000_000)
    assert run.returncode == 0 and many.undisturbed == files(folder), run.stderr
    assert many.sent < 20_000_000  # what the kernel buffers is on its way, too


def test_everything_dead(many, folder):
    """If nobody answers, one sentence follows the names of all that was tried; files stay."""
    data2csv(many, folder, MAX_DATA_NUMBER=3)
    before = files(folder)
    (folder / ".cache/coco_2014_caption/train_captions.zip").unlink()
    dead = refused_address()
    constants = {
        name: json.loads(json.dumps(value).replace(many.url, dead))
        for name, value in many.constants("data2csv.py").items()
    }
    run = data2csv(many, folder, env={"MODELSCOPE_ENDPOINT": dead}, BACKOFF=0.5, **constants)
    assert refusal(run).startswith("The caption table could not be downloaded")
    assert all(f"{dead}{path}" in run.stdout for path in (LOADER, TABLE, OLD_TABLE, ANNOTATIONS))
    assert files(folder) == before


# Proxies


@pytest.mark.parametrize("variable", ["all_proxy", "http_proxy"])
@pytest.mark.parametrize(
    "proxy",
    [
        "socks9://me:secret@127.0.0.1:1080",
        "me:secret@127.0.0.1:port",
        "http:/me:secret@127.0.0.1:80",
        "http://",
        "http://me:secret@",
        "http://me:secret@127.0.0.1:99999",
        "://me:secret@127.0.0.1:80",
    ],
)
def test_misspelt_proxy(many, folder, variable, proxy):
    """A misspelt proxy is named by its variable, without its password, before anything is sent."""
    run = data2csv(many, folder, env={variable: proxy})
    assert refusal(run).startswith(f"The proxy in {variable} can't be used (")
    assert "secret" not in run.stdout + run.stderr
    assert many.requests == []


@pytest.mark.parametrize(
    "proxy", ["http://me:secret@127.0.0.1:{}", "socks5h://me:secret@127.0.0.1:{}", "127.0.0.1:{}"]
)
def test_unreachable_proxy(many, folder, proxy):
    """A proxy that doesn't answer is named by its variables. Otherwise each source seems dead."""
    proxy = proxy.format(refused_address().rpartition(":")[2])
    run = data2csv(many, folder, env={"all_proxy": proxy, "http_proxy": proxy})
    assert refusal(run).startswith("The proxy in all_proxy and http_proxy can't be used (")
    assert "secret" not in run.stdout + run.stderr
    assert many.requests == []


def test_proxy_that_is_not_needed(many, folder):
    """A dead proxy harms nobody if no_proxy names the hosts, or if everything is there."""
    dead = {"http_proxy": refused_address()}
    assert data2csv(many, folder, env={**dead, "no_proxy": "127.0.0.1"}).returncode == 0
    assert data2csv(many, folder, env=dead).returncode == 0
    assert files(folder) == many.undisturbed


@pytest.mark.parametrize("kind", ["socks5", "socks5h"])
def test_socks_proxy(many, folder, kind):
    """All goes through a SOCKS proxy, for which PySocks must be installed."""
    with socks_proxy.Proxy() as proxy:
        run = data2csv(many, folder, env={"all_proxy": f"{kind}://me:secret@{proxy.address}"})
    assert run.returncode == 0 and files(folder) == many.undisturbed, run.stderr
    ports = {port for _, port in proxy.targets}
    assert ports == {int(many.url.rpartition(":")[2])}


# Kills


@posix
@pytest.mark.slow
def test_killed_at_any_moment(many, tmp_path):
    """After a kill at any of ten moments, the next run ends as if nothing had been."""
    many.faults = {LOADER: late(0.2), TABLE: drip(pause=0.05, pieces=8), FIRST_HOST: late(0.05)}
    constants = {"DOWNLOAD_THREADS": 8}
    (tmp_path / "slow").mkdir()
    started = time.monotonic()
    # A process as those that are killed, which spend a part of the time on imports
    run_script("data2csv.py", tmp_path / "slow", many.environment(), **constants)
    seconds = time.monotonic() - started
    moments = [random.Random(number).uniform(0.1, seconds) for number in range(10)]

    def kill_and_finish(number: int) -> int:
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = many.environment()
        killed = run_and_stop("data2csv.py", folder, environment, moments[number], **constants)
        run = data2csv(many, folder, **constants)
        same = files(folder) == many.undisturbed
        assert run.returncode == 0 and same, (moments[number], run.stderr)
        assert no_temporary_files(folder)
        return killed.returncode

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(kill_and_finish, range(10)))
    assert codes.count(-signal.SIGKILL) >= 5, codes


def start(hub: Hub, folder: Path, until: str, **options) -> subprocess.Popen:
    """Start the script, and return when it has asked the hub for a path that begins so."""
    hub.requests.clear()
    process = subprocess.Popen(
        command("data2csv.py"),
        cwd=folder,
        env=variables(hub.environment()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    while process.poll() is None:
        if any(path.startswith(until) for path in list(hub.requests)):
            break
        time.sleep(0.02)
    time.sleep(0.1)
    return process


@posix
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("path", [LOADER, TABLE, FIRST_HOST], ids=["loader", "table", "images"])
def test_stopped(many, folder, path, sent):
    """A signal ends it with one sentence, whatever it waits for; the next run completes it."""
    sent = signal.Signals[sent]
    many.faults = {path: drip(pause=0.2, pieces=10_000)}
    process = start(many, folder, until=path)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Stopped." in errors.splitlines()[-1] and "Traceback" not in errors
    many.faults = {}
    assert data2csv(many, folder).returncode == 0 and files(folder) == many.undisturbed
    assert no_temporary_files(folder)


@posix
def test_closed_terminal(many, folder):
    """Closing the terminal ends it at once, although its last sentence can't be written there."""
    many.faults = {FIRST_HOST: late(10)}
    line = command("data2csv.py")
    child, terminal = os.forkpty()
    if child == 0:
        os.chdir(folder)
        os.execve(line[0], line, variables(many.environment()))
    while not image_requests(many):
        time.sleep(0.02)
    os.close(terminal)
    _, ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended) == 128 + signal.SIGHUP


@posix
def test_closed_terminal_under_nohup(many, folder):
    """nohup ignores SIGHUP before the script starts: it is left ignored, and the run ends well."""
    many.faults = {FIRST_HOST: late(0.1)}
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = start(many, folder, until=FIRST_HOST, preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and files(folder) == many.undisturbed, errors


def test_leftovers_of_a_killed_run(many, folder):
    """Unfinished images of a killed run go, also those that the next run has no use for."""
    leftovers = [
        folder / "coco_2014_caption/99.jpg.tmp",
        folder / "coco_2014_caption/preview.jpg.tmp",
        folder / ".cache/coco_2014_caption/train_captions.zip.tmp",
        folder / "coco-2024-dataset.csv.tmp",
    ]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"half")
    mine = folder / "coco_2014_caption/notes.tmp"
    mine.write_bytes(b"somebody else's")
    assert data2csv(many, folder, MAX_DATA_NUMBER=2).returncode == 0
    assert list(folder.rglob("*.tmp")) == [mine]


# This machine


def limited(hub: Hub, folder: Path, kilobytes: int, **constants) -> subprocess.CompletedProcess:
    """Run the script where no file may become larger than this, as on a full disk."""
    line = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-"]
    return subprocess.run(
        [*line, *command("data2csv.py", **constants)],
        cwd=folder,
        env=variables(hub.environment()),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@posix
def test_disk_full(folder, tmp_path):
    """A write that fails ends the run and names the file; with room, the next run completes it."""
    rows = [(f"images/{number}.jpg", "a cat") for number in range(60)]
    with Hub(write_images(tmp_path / "large", rows, size=(320, 240))) as hub:
        run = limited(hub, folder, 8, DOWNLOAD_THREADS=2)
        assert refusal(run).startswith("Can't write ")
        assert ".jpg.tmp (File too large)" in refusal(run) and "Free some space" in refusal(run)
        assert "could not be downloaded" not in run.stdout
        requests = len(image_requests(hub))
        assert requests < 30, "the rest of the queue is not fetched in vain"
        assert no_temporary_files(folder)
        assert data2csv(hub, folder).returncode == 0 and len(images(folder)) == 60


@posix
def test_disk_full_at_the_csv(folder, tmp_path):
    """A CSV that can't be written ends the run and leaves the one that was there."""
    rows = [(f"images/{number}.jpg", "a cat " * 1000) for number in range(40)]
    (folder / "coco-2024-dataset.csv").write_text("the old one", encoding="utf-8")
    with Hub(write_images(tmp_path / "small", rows, size=(32, 24))) as hub:
        sentence = refusal(limited(hub, folder, 100))
    assert sentence.startswith("Can't write ") and "coco-2024-dataset.csv" in sentence
    assert (folder / "coco-2024-dataset.csv").read_text(encoding="utf-8") == "the old one"
    assert len(images(folder)) == 40 and no_temporary_files(folder)


@posix
def test_disk_full_at_the_preview(many, folder):
    """A preview that can't be written is reported and fails nothing: it is only for looking."""
    run = limited(many, folder, 40)
    assert run.returncode == 0, run.stderr
    assert "preview.jpg was not written (File too large)" in run.stdout
    missing = {name for name in many.undisturbed if name not in files(folder)}
    assert missing == {"coco_2014_caption/preview.jpg"} and no_temporary_files(folder)


def test_less_room_than_the_images_need(many, folder):
    """The estimate is compared with the free space before the first image, not found out later."""
    sentence = refusal(data2csv(many, folder, IMAGE_BYTES=10**15))
    assert sentence.startswith("The disk of IMAGE_FOLDER")
    assert image_requests(many) == []


@pytest.mark.parametrize("name", ["IMAGE_FOLDER", "TABLE_FOLDER", "CSV_PATH"])
@pytest.mark.parametrize(
    "place",
    [
        "a_file",
        "a_file/below",
        pytest.param("/proc/a_folder", marks=posix),  # nobody can make one there, not even root
    ],
)
def test_place_that_cannot_be_written(many, folder, name, place):
    """A place that can't be written is one sentence with its name, before anything is fetched."""
    (folder / "a_file").write_text("mine", encoding="utf-8")
    value = f"{place}/x.csv" if name == "CSV_PATH" else place
    sentence = refusal(data2csv(many, folder, **{name: value}))
    assert sentence.startswith("Can't write to ") and place.rpartition("/")[2] in sentence
    assert many.requests == []
    assert (folder / "a_file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("path", ["a_folder", "a_folder/", "new/", "."])
def test_csv_path_that_is_a_folder(many, folder, path):
    """It is refused before anything is fetched. Otherwise the run fails at its end, after hours."""
    (folder / "a_folder").mkdir()
    assert refusal(data2csv(many, folder, CSV_PATH=path)).startswith(f"CSV_PATH = {path!r} is a")
    assert many.requests == []


def test_csv_that_cannot_be_replaced(script, folder, monkeypatch):
    """A CSV that another program has open is one sentence with its name, as Windows refuses it."""

    def refuse(source, target):
        raise PermissionError(13, "The process cannot access the file", str(target))

    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit, match="^Can't write .*coco-2024-dataset.csv.*Excel"):
        script.write_csv({1: script.Entry([], ["a cat"])}, [1])
    assert list(folder.iterdir()) == []


def test_two_drives(script, folder, monkeypatch):
    """Images on another drive of Windows have absolute paths, as no relative path leads there."""

    def refuse(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(os.path, "relpath", refuse)
    script.write_csv({1: script.Entry([], ["a cat"])}, [1])
    expected = (folder / "coco_2014_caption/1.jpg").as_posix()
    assert read_csv(folder / "coco-2024-dataset.csv")[0]["image_path"] == expected


@pytest.mark.parametrize("images_at", ["coco_2014_caption", "real/images"])
@posix
def test_csv_in_a_linked_folder(hub, folder, images_at):
    """Every row leads from the CSV to its image, also where the CSV's folder is a link."""
    (folder / "real" / "below").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "real" / "below")
    constants = {"IMAGE_FOLDER": images_at, "CSV_PATH": "link/all.csv"}
    assert data2csv(hub, folder, **constants).returncode == 0
    rows = read_csv(folder / "link/all.csv")
    assert len(rows) == len(CAPTIONS)
    for row in rows:
        assert (folder / "link" / row["image_path"]).is_file(), row


def test_all_in_one_folder(hub, folder):
    """Images, table and CSV may share the folder the user is in."""
    constants = {"IMAGE_FOLDER": ".", "TABLE_FOLDER": ".", "CSV_PATH": "all.csv"}
    for _ in range(2):
        assert data2csv(hub, folder, **constants).returncode == 0
    assert read_csv(folder / "all.csv")[0]["image_path"] == "./57870.jpg"
    assert len(list(folder.glob("[0-9]*.jpg"))) == 6


def test_image_that_is_a_folder(many, folder):
    """A folder in an image's place is named in one sentence."""
    (folder / "coco_2014_caption/1.jpg").mkdir(parents=True)
    sentence = refusal(data2csv(many, folder))
    assert sentence.startswith("Can't write ") and "1.jpg" in sentence


@pytest.mark.parametrize("console", ["None", "io.StringIO()"])
def test_console_that_is_no_file(hub, folder, console):
    """It works without a console (pythonw) and with one that is no file (a notebook)."""
    program = (
        "import io, sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from support import launch\n"
        "script = launch.load('data2csv.py', [])\n"
        f"sys.stdout = sys.stderr = {console}\n"
        "script.main()\n"
    )
    line = [sys.executable, "-c", program]
    subprocess.run(line, cwd=folder, env=variables(hub.environment()), check=True, timeout=300)
    assert len(read_csv(folder / "coco-2024-dataset.csv")) == len(CAPTIONS)


# Damaged tables and images


def archive(text: str | bytes, name: str = "train.csv", stored: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as made:
        made.writestr(name, text)
    return file.getvalue()


HEADER = "uniq_id,image_id,caption,image\n"
DAMAGED = {
    "empty": b"",
    "two letters": b"PK",
    "no member": b"PK\x05\x06" + bytes(18),
    "empty member": archive(""),
    "no rows": archive(HEADER),
    "no captions": archive(HEADER + "0,1, ,x\n"),
    "end before beginning": archive(HEADER + "0,1,a cat,x\n")[:-4] + b"\xff\0\0\0",
    "wrong checksum": archive(HEADER + "0,1,a cat,x\n", stored=True).replace(b"cat", b"cow"),
    "not UTF-8": archive((HEADER + "0,1,caf\xe9,x\n").encode("latin-1")),
    "huge field": archive(HEADER + "0,1," + "a" * 200_000 + ",x\n"),
    "not JSON": archive("[1, 2", "annotations/captions_train2014.json"),
    "other JSON": archive("{}", "annotations/captions_train2014.json"),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_table(many, folder, damage):
    """In the cache it is fetched again; from a source it is not kept, and the next one is asked."""
    cached = folder / ".cache/coco_2014_caption/train_captions.zip"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(damage)
    many.faults = {TABLE: lambda handler: handler.send(200, damage)}
    run = data2csv(many, folder, fallbacks=True)
    assert run.returncode == 0 and files(folder) == many.undisturbed, run.stderr
    many.faults = dict.fromkeys((TABLE, OLD_TABLE, ANNOTATIONS), many.faults[TABLE])
    cached.unlink()
    sentence = refusal(data2csv(many, folder, fallbacks=True, **QUICK))
    assert sentence.startswith("The caption table could not") and not cached.exists()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_truncated_file_of_another_format(many, folder, kind):
    """A PNG or WebP that breaks off is fetched again: only decoding finds it, opening succeeds."""
    file = io.BytesIO()
    Image.effect_noise((64, 48), 90).save(file, kind)
    (folder / "coco_2014_caption").mkdir()
    (folder / "coco_2014_caption/5.jpg").write_bytes(file.getvalue()[:-500])
    assert data2csv(many, folder).returncode == 0 and files(folder) == many.undisturbed


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_whole_file_of_another_format(many, folder, kind):
    """A whole PNG or WebP is kept, although COCO's images are JPEG."""
    file = io.BytesIO()
    Image.effect_noise((64, 48), 90).save(file, kind)
    (folder / "coco_2014_caption").mkdir()
    (folder / "coco_2014_caption/5.jpg").write_bytes(file.getvalue())
    assert data2csv(many, folder).returncode == 0
    assert files(folder)["coco_2014_caption/5.jpg"] == file.getvalue()


def test_image_of_too_many_pixels(script, tmp_path):
    """It is refused before it is decoded. Otherwise 16 threads decode to gigabytes."""
    script.MAX_FILE_PIXELS = 64 * 48
    Image.new("RGB", (64, 48)).save(tmp_path / "legal.png")
    Image.new("RGB", (65, 48)).save(tmp_path / "large.png")
    assert script.read_image(tmp_path / "legal.png")
    with pytest.raises(script.BadFile, match="MAX_FILE_PIXELS"):
        script.read_image(tmp_path / "large.png")


def test_image_of_too_many_bytes(script, tmp_path):
    """It is refused before it is read. Otherwise Pillow keeps its metadata: half a gigabyte."""
    Image.effect_noise((64, 48), 40).save(tmp_path / "noise.png")
    assert script.read_image(tmp_path / "noise.png")
    script.MAX_IMAGE_BYTES = 100
    with pytest.raises(script.BadFile, match="MAX_IMAGE_BYTES"):
        script.read_image(tmp_path / "noise.png")


def test_archive_whose_member_leads_out_of_the_folder(many, folder, tmp_path):
    """A member named ../../x is read and not written: nothing is unpacked."""
    row = f"0,7,a cat,{many.url}{FIRST_HOST}COCO_train2014_000000000007.jpg\n"
    table = archive(HEADER + row, "../../../../evil.csv")
    many.faults = {TABLE: lambda handler: handler.send(200, table)}
    run = data2csv(many, folder)
    assert run.returncode == 0 and [file.name for file in images(folder)] == ["7.jpg"]
    assert not list(tmp_path.rglob("evil*"))


# Failures of the script itself


def test_error_of_new_code_stays_a_traceback(script, tmp_path, monkeypatch):
    """A mistake in the code that reads the table is not taken for a damaged download."""

    def mistake(text):
        raise ZeroDivisionError

    monkeypatch.setattr(script, "clean_caption", mistake)
    (tmp_path / "table.zip").write_bytes(archive(HEADER + "0,1,a cat,x\n"))
    with pytest.raises(ZeroDivisionError):
        script.read_table(tmp_path / "table.zip")


def test_failure_in_a_thread_ends_the_others(script, tmp_path, capsys):
    """An error in one thread ends the run and the downloads of all others, and is the one seen."""
    script.IMAGE_FOLDER = str(tmp_path)
    script.DOWNLOAD_THREADS = 4
    downloader = script.Downloader()
    begun, ended = [], []

    def fetch(path, urls, read):
        begun.append(path.name)
        if path.name == "3.jpg":
            raise ZeroDivisionError
        ended.append(downloader.stopping.wait(timeout=60))

    downloader.fetch = fetch
    table = {number: script.Entry([], ["a cat"]) for number in range(1000)}
    with pytest.raises(ZeroDivisionError):
        script.fetch_images(downloader, table, 1000)
    assert all(ended) and len(begun) <= 2 * 4


# The whole table


@posix
@pytest.mark.slow
def test_memory_of_the_whole_table(folder):
    """A table of 414,113 rows, as the real one, is held in 300 MB, for few images or many."""
    with BigHub((64, 48)) as hub:
        _, memory = measure(folder, hub.environment(), MAX_DATA_NUMBER=1500)
    assert len(images(folder)) == 1500 and memory < 300, memory


# The preview


def corners() -> list[tuple[int, int]]:
    return [(16 + column * 272, 16 + row * 296) for row in range(4) for column in range(6)]


def test_preview(many, folder):
    """24 images on a sheet of six columns, the same from run to run, apart from the images."""
    assert data2csv(many, folder).returncode == 0
    path = folder / "coco_2014_caption/preview.jpg"
    first = path.read_bytes()
    with Image.open(path) as sheet:
        assert sheet.size == (16 + 6 * (256 + 16), 16 + 4 * (192 + 2 * 16 + 72))
        sheet = sheet.convert("L")
    for x, y in corners():
        image = sheet.crop((x, y, x + 256, y + 192))
        text = sheet.crop((x, y + 192 + 4, x + 256, y + 280))
        assert image.getextrema()[0] < 100 and text.getextrema()[0] < 100, (x, y)
    assert data2csv(many, folder).returncode == 0 and path.read_bytes() == first
    # load_model.py takes the first image of the folder
    assert min((folder / "coco_2014_caption").glob("*.jpg")).stem.isdigit()


CHINESE = (
    "两只狗 (golden retrievers) 在公园的草地上追逐一个黄色的 frisbee，旁边还有很多很多的人在看。"
)


@pytest.mark.parametrize(
    ("caption", "hint"),
    [
        ("W" * 71 + " and more words " * 3, False),
        (CHINESE * 2, True),
        ("A café, a “naïve” façade – quoted 👍", False),
    ],
    ids=["wide", "Chinese", "Latin"],
)
def test_preview_captions(tmp_path, folder, caption, hint):
    """A caption stays beneath its image; only Chinese captions ask for a font with Chinese."""
    rows = [(f"images/{number}.jpg", f"{caption} {number}") for number in range(1, 9)]
    with Hub(write_images(tmp_path / "served", rows)) as hub:
        run = data2csv(hub, folder, FONTS=["no such font.ttf"])
    assert run.returncode == 0, run.stderr
    assert ("lacks Chinese letters" in run.stdout) == hint
    with Image.open(folder / "coco_2014_caption/preview.jpg") as sheet:
        sheet = sheet.convert("L")
    between_columns = [
        (272 * column + 4, 0, 272 * column + 12, sheet.height) for column in range(7)
    ]
    between_rows = [(0, 16 + 296 * row - 12, sheet.width, 16 + 296 * row - 6) for row in (1, 2)]
    for gap in between_columns + between_rows:
        assert sheet.crop(gap).getextrema()[0] > 200, gap


@pytest.mark.parametrize(
    "constants",
    [
        {"PREVIEW_WIDTH": 8, "PREVIEW_FONT_SIZE": 40},
        {"PREVIEW_IMAGES": 1, "PREVIEW_COLUMNS": 1, "PREVIEW_LINES": 1},
        {"PREVIEW_WIDTH": 2000, "PREVIEW_HEIGHT": 8, "PREVIEW_FONT_SIZE": 8},
    ],
)
def test_preview_of_another_size(many, folder, constants):
    """Every legal size gives a preview, also one too narrow for a single letter."""
    run = data2csv(many, folder, MAX_DATA_NUMBER=30, **constants)
    assert run.returncode == 0, run.stderr
    with Image.open(folder / "coco_2014_caption/preview.jpg") as sheet:
        sheet.load()
