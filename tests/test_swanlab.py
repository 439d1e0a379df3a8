"""SwanLab's faults against train.py: it trains on, ends by itself, tells how to catch up; and what SwanLab shows."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import TESTS, command, variables
from support.scenes import all_scenes, draw, terse
from tools.make_assets import browse, dashboard, find_browser

KEY = "key" + "5wanlab0" * 4  # looks like one; no file and no line may hold it
OUTPUT = Path("output/Qwen2-VL-2B")
SMALL = {  # constants of train.py for a run of seconds: 12 pictures to train on, 4 steps
    "IMAGE_SIZE": 112,
    "TEST_IMAGES": 2,
    "BATCH_SIZE": 1,
    "GRADIENT_ACCUMULATION": 3,
    "EPOCHS": 1,
    "LEARNING_RATE": 0.01,
    "LOG_STEPS": 1,
    "MAX_NEW_TOKENS": 12,
    "SWANLAB_TIMEOUT": 5,
}
PATIENCE = 90  # seconds until a run counts as held up for ever; alone it takes 6 to 15


class Cloud:
    """SwanLab's server as far as its client asks, on 127.0.0.1: everything sent to it lies in `received`.

    From the request on that contains `sign`, it keeps silent ("freeze") or hangs up ("drop"), until heal() is called.
    """

    def __init__(self, key: str = KEY, fault: str = "", sign: str = ""):
        self.key, self.fault, self.sign = key, fault, sign
        self.received: list[tuple[str, str]] = []  # (path, body)
        self.experiments: dict[str, str] = {}  # id: state
        self.faulty, self.healed = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Handler,), {"cloud": self})
        )
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def heal(self) -> None:
        self.fault = ""
        self.healed.set()

    def answer(self, path: str, body: str) -> tuple[int, object]:
        """The status and the JSON for a request."""
        if path == "/api/login/api_key":
            account = {
                "sid": "a session",
                "expiredAt": "2099-01-01T00:00:00.000Z",
                "userInfo": {"username": "me"},
            }
            return 200, account
        if path.endswith("/experiment"):
            cuid = json.loads(body)["cuid"]
            status = 200 if cuid in self.experiments else 201
            self.experiments[cuid] = "RUNNING"
            return status, {
                "cuid": cuid,
                "slug": cuid,
                "name": "one",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        if path.endswith("/state"):
            self.experiments[path.split("/")[-2]] = json.loads(body)["state"]
        if path == "/api/resources/presigned/put":
            return 200, {"urls": [f"{self.url}/media/{name}" for name in json.loads(body)["paths"]]}
        project = {
            "cuid": "p",
            "name": "p",
            "path": "/me/p",
            "version": 1,
            "_count": {"experiments": 0},
        }
        return 200, {**project, "group": {"username": "me"}}


class Handler(BaseHTTPRequestHandler):
    protocol_version, cloud = "HTTP/1.1", None

    def reply(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(
            "utf-8", "replace"
        )
        cloud = self.cloud
        cloud.received.append((path, body))
        if cloud.fault and cloud.sign in path + body:
            cloud.faulty.set()
        if cloud.fault and cloud.faulty.is_set():
            self.close_connection = True
            if cloud.fault == "freeze":
                cloud.healed.wait(300)
            return
        status, answer = cloud.answer(path, body)
        if path == "/api/login/api_key" and self.headers["authorization"] != cloud.key:
            status, answer = 401, {"code": "unauthorized", "message": "invalid key"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = reply

    def log_message(self, *_) -> None:
        pass


@dataclass
class Case:
    """A run of train.py with something wrong around it."""

    constants: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    cloud: dict | None = None  # arguments of Cloud; None: there is none
    says: str = ""  # on the terminal
    code: int = 0
    interrupt: bool = False  # Ctrl-C in the middle of training
    small_disk: bool = False  # the disk of swanlog/ runs full in the middle of training


ONLINE = {"SWANLAB_MODE": "online"}
POSIX_CASES = {
    # a frozen server at the end, when it was the user who ended it
    "Ctrl-C": Case(
        ONLINE | {"EPOCHS": 50},
        cloud={"fault": "freeze", "sign": "/state"},
        code=130,
        interrupt=True,
    ),
    "disk full": Case({"SWANLAB_MODE": "local"}, says="the disk is full now", small_disk=True),
}
CASES = {
    "not logged in": Case(ONLINE, says="does not start in mode online"),
    "wrong key": Case(cloud={"key": "another"}, says="does not start in mode online"),
    "no network": Case(environment={"SWANLAB_API_KEY": KEY}, says="does not start in mode online"),
    "frozen at the start": Case(cloud={"fault": "freeze"}, says="does not start in mode online"),
    "network lost": Case(cloud={"fault": "drop", "sign": "eval/loss"}, says="did not finish"),
    "frozen at the end": Case(cloud={"fault": "freeze", "sign": "/state"}, says="did not finish"),
    # transformers' documentation tells people to set this; the encoding is that of a Western Windows console
    "misnamed variable": Case(
        environment={"SWANLAB_PROJECT": "mine", "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"},
        says="swanlab watch",
    ),
    "all is well": Case(cloud={}, says="View run"),
    "training fails": Case(
        {"LEARNING_RATE": 1e5, "WARMUP": 0.0}, cloud={}, says="The loss is nan in step", code=1
    ),
} | (POSIX_CASES if os.name == "posix" else {})
SMALL_DISK = """
mkdir swanlog && mount -t tmpfs -o size=4m none swanlog || exit 99
(until grep -q eval_loss ../log; do sleep 0.05; done
 cat /dev/zero > swanlog/ballast 2> /dev/null || echo the disk is full now) &
exec "$@"
"""


@dataclass
class Outcome:
    code: int
    printed: str
    folder: Path
    cloud: Cloud | None


def run(case: Case, work: Path, place: Path) -> Outcome:
    """Run train.py in a copy of `work` inside `place`, and wait for its end, but not for ever."""
    folder, log = place / "work", place / "log"
    shutil.copytree(work, folder)
    cloud = None if case.cloud is None else Cloud(**case.cloud)
    guard = {
        "PYTHONPATH": str(TESTS / "support/guard"),
        "NETWORK_GUARD_LOG": str(place / "refused"),
        "HF_HUB_OFFLINE": "1",
    }
    quick = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
    environment = guard | quick | {"SWANLAB_ROOT": str(place / "nothing")} | case.environment
    if cloud:
        environment |= {"SWANLAB_API_HOST": cloud.url, "SWANLAB_API_KEY": KEY}
    line = command("train.py", **SMALL | case.constants)
    if case.small_disk:
        line = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "-", *line]
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            line, cwd=folder, env=variables(environment), stdout=stream, stderr=stream
        )
    if case.interrupt:
        while (
            "'loss'" not in log.read_text(encoding="utf-8", errors="replace")
            and process.poll() is None
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return Outcome(
        process.returncode, log.read_text(encoding="utf-8", errors="replace"), folder, cloud
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder that train.py can start in: 14 scenes of 2 captions, and the small model."""
    folder, rng, records = tmp_path_factory.mktemp("prepared"), random.Random(0), []
    (folder / "pictures").mkdir()
    for number, scene in enumerate(rng.sample(all_scenes(), 14)):
        draw(scene, rng, side=112).save(folder / f"pictures/{number}.jpg")
        question = f"请描述这张图片: <|vision_start|>pictures/{number}.jpg<|vision_end|>"
        for caption in terse(scene)[:2]:
            turns = [{"from": "user", "value": question}, {"from": "assistant", "value": caption}]
            records.append({"conversations": turns})
    (folder / "data_vl.json").write_text(json.dumps(records), encoding="utf-8")
    shutil.copytree(TESTS / "support/tiny_qwen2vl", folder / "Qwen/Qwen2-VL-2B-Instruct")
    return folder


@pytest.fixture(scope="module")
def outcomes(work, tmp_path_factory):
    """All cases, at once: much of their time is waiting. Returns {name: future of an Outcome}."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [
            name for name in os.environ if name.startswith("SWANLAB_")
        ]:  # the developer's own
            patch.delenv(name)
        with ThreadPoolExecutor(os.cpu_count() + 2) as pool:
            places = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in CASES}
            yield {name: pool.submit(run, case, work, places[name]) for name, case in CASES.items()}


def can_mount() -> bool:
    """Whether a process may have file systems of its own here; the tests' own user needs no rights."""
    line = ["unshare", "--map-root-user", "--mount", "true"]
    return (
        bool(shutil.which("unshare"))
        and subprocess.run(line, stderr=subprocess.DEVNULL).returncode == 0
    )


@pytest.mark.parametrize("name", CASES)
def test_a_fault_of_swanlab_neither_stops_nor_changes_a_training(outcomes, name):
    """Guards the night: SwanLab asks for a key or waits for a network, and nothing is trained, or it never ends."""
    if CASES[name].small_disk and not can_mount():
        pytest.skip("no disk of its own can be mounted here")
    case, done = CASES[name], outcomes[name].result()
    assert done.code == case.code, done.printed
    assert case.says in done.printed
    assert 'train.py", line' not in done.printed and "Exception ignored" not in done.printed, (
        "a traceback"
    )
    if "mode online" in case.says:
        assert "swanlab sync" in done.printed, "the run is on disk, and there is a way to upload it"
    if case.code == 130:
        assert "which is saved: run it again to go on" in done.printed
    assert (done.folder / OUTPUT / "results.json").is_file() == (case.code == 0)
    assert (done.folder / OUTPUT / "report.html").is_file()


@pytest.mark.parametrize("name", ["no network", "network lost", "frozen at the end"])
def test_what_was_not_uploaded_is_uploaded_by_the_command_it_told(outcomes, name):
    """Guards the curves: the advice printed, followed to the letter, brings all of them, and into one experiment."""
    done = outcomes[name].result()
    advice = re.findall(r"swanlab (sync [^`\n]+)", done.printed)
    assert advice, done.printed
    cloud = done.cloud or Cloud()
    cloud.heal()
    cloud.key, before = KEY, len(cloud.received)
    environment = {
        "SWANLAB_API_HOST": cloud.url,
        "SWANLAB_API_KEY": KEY,
        "SWANLAB_ROOT": str(done.folder / "nothing"),
    }
    line = [sys.executable, "-m", "swanlab", *advice[-1].split()]
    subprocess.run(line, env=variables(environment), timeout=60, check=True, capture_output=True)
    assert list(cloud.experiments.values()) == ["FINISHED"], "one experiment, and it is whole"
    sent = " ".join(body for _, body in cloud.received[before:])
    for step in range(1, 5):
        assert f'"key": "train/loss", "index": {step},' in sent
    assert "eval/CIDEr" in sent and '"samples"' in sent


@pytest.mark.parametrize("name", CASES)
def test_no_key_is_printed_or_written(outcomes, name):
    """Guards a secret: people post logs, results.json and swanlog/ in public."""
    done = outcomes[name].result()
    assert KEY not in done.printed
    holders = [
        path
        for path in done.folder.rglob("*")
        if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert not holders


@pytest.mark.parametrize("name", ["all is well", "training fails"])
def test_the_cloud_learns_no_names_of_this_machine(outcomes, name):
    """Guards privacy: with SHARE_MACHINE_INFO off neither the host's name nor a folder's leaves, not even in a log."""
    done = outcomes[name].result()
    assert done.cloud.experiments and list(done.cloud.experiments.values()) == [
        "FINISHED" if done.code == 0 else "CRASHED"
    ]
    names = {
        str(done.folder),
        str(Path.home()),
        f'"{socket.gethostname()}"',
        sys.executable,
        "launch.py",
    }
    for path, body in done.cloud.received:
        body = body.replace("\\\\", "\\")
        for private in names:
            assert private not in body, (
                f"{path}: ...{body[max(0, body.index(private) - 200) :][:400]}"
            )
    [metadata] = [
        path.read_text("utf-8")
        for path in done.folder.glob("swanlog/run-*/files/swanlab-metadata.json")
    ]
    assert not any(name in metadata for name in names)


def test_the_dashboard_shows_curves_and_captions(outcomes):
    """Guards what people open to see whether it works: `swanlab watch`, in a browser."""
    done = outcomes["misnamed variable"].result()
    if not (browser := find_browser()):
        pytest.skip("no Chromium or Chrome here")
    with dashboard(done.folder / "swanlog") as address:
        page = browse(browser, address, "--dump-dom")
    for curve in (
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "eval/loss",
        "eval/CIDEr",
    ):
        assert curve in page, curve
    results = json.loads((done.folder / OUTPUT / "results.json").read_text(encoding="utf-8"))
    for row in results["captions"]:
        [rows] = re.findall(r'class="[^"]*text-chart.*?</section>', page, re.DOTALL)
        for text in (row["human"][0], row["before"]["caption"], row["after"]["caption"]):
            assert text in page and text in rows, "below the pictures, and in the table of captions"
    assert page.count("<canvas") >= 5 and page.count("data:image/jpeg;base64,") >= len(
        results["captions"]
    )
