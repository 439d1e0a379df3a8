"""load_model.py: what it downloads, how it resumes, what it refuses, what it says of the model."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from conftest import TESTS, posix, variables
from PIL import Image
from safetensors.torch import load_file, save_file
from support import hub as stand_in
from support.fork_runner import Run, Runner
from support.hub import COMMIT, MODEL_ID, Hub, as_json, cut_short, describe, html, status
from support.launch import load
from support.socks_proxy import Proxy
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

TINY = TESTS / "support/tiny_qwen2vl"
FOLDER = Path("Qwen/Qwen2-VL-2B-Instruct")
SHARD = "model-00001-of-00002.safetensors"
TOKEN = "ms-8f1e0c7d-a-secret-of-the-user"


class Site(NamedTuple):
    """One of the two hubs: the value of HUB, and the beginnings of the paths it is asked for."""

    name: str
    listing: str
    file: str
    large_file: str  # what a large file's path is redirected to

    def environment(self, hub: Hub) -> dict[str, str]:
        """What leads a script to this hub. The clients give up soon where nothing answers."""
        if self.name == "huggingface":
            return hub.huggingface_environment()
        return {**hub.environment(), "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}

    def fetched(self, hub: Hub) -> list[str]:
        """Names of the files that the hub was asked for, in order."""
        asked = [path for path in hub.requests if path.startswith(self.file)]
        return [path.removeprefix(self.file) for path in asked]

    def place(self, name: str) -> str:
        """The path at which the bytes of a file are."""
        return (self.large_file if name.endswith(".safetensors") else self.file) + name


MODELSCOPE = Site(
    name="modelscope",
    listing=f"/api/v1/models/{MODEL_ID}/repo/files",
    file=f"/api/v1/models/{MODEL_ID}/repo?Revision=master&FilePath=",
    large_file=f"/api/v1/models/{MODEL_ID}/repo?Revision=master&FilePath=",
)
HUGGINGFACE = Site(
    name="huggingface",
    listing=f"/api/models/{MODEL_ID}/revision/main",
    file=f"/{MODEL_ID}/resolve/{COMMIT}/",
    large_file=f"/cdn/{MODEL_ID}/",
)
SITES = [MODELSCOPE, HUGGINGFACE]

# Limits of the clients where a fault stays, so that a test doesn't wait as long as a user would
HURRY = {
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "1",
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "1",
}


@pytest.fixture(scope="module")
def runner():
    """load_model.py, imported once; each run is a process."""
    with Hub() as hub:
        runner = Runner("load_model.py", hub.environment())
    yield runner
    runner.close()


@pytest.fixture(params=SITES, ids=[site.name for site in SITES])
def site(request):
    return request.param


@pytest.fixture
def run(runner, site):
    """One run from start to end, against a hub that is up or was."""

    def run(work: Path, hub: Hub, env: dict[str, str] | None = None, **constants):
        environment = {**site.environment(hub), **(env or {})}
        return runner(work, environment, HUB=site.name, **constants)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, but for the record that load_model.py adds."""
    files = (file for file in folder.iterdir() if file.name != ".complete.json")
    return {file.name: file.read_bytes() for file in files}


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a model folder, the record among them."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """What a refused run ended with: the last line on stderr, and no traceback above it."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module", params=SITES, ids=[site.name for site in SITES])
def first_run(request, runner, tmp_path_factory):
    """A folder after one run on a repository with traps, its hub, and what the run printed."""
    site = request.param
    work = tmp_path_factory.mktemp("first")
    repository = tmp_path_factory.mktemp("repository") / "model"
    shutil.copytree(TINY, repository)
    for name in ("pytorch_model.bin", "model.pt", "old/model.ckpt", "modeling_trap.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(f"open({str(work / 'trapped')!r}, 'w')")
    config = json.loads((TINY / "config.json").read_text())
    classes = {"AutoModel": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Trap"}
    (repository / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    with Hub(models={MODEL_ID: repository}) as hub:
        tokens = {"MODELSCOPE_API_TOKEN": TOKEN, "HF_TOKEN": TOKEN}
        done = runner(work, {**site.environment(hub), **tokens}, HUB=site.name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.refusals() == []
        folders = (work, hub.temporary)
        written = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        leaks = [str(file) for file in written if TOKEN.encode() in file.read_bytes()]
    return SimpleNamespace(
        site=site, work=work, hub=hub, repository=repository, done=done, leaks=leaks
    )


@pytest.fixture(scope="module")
def downloaded(runner, tmp_path_factory):
    """What a run on each hub leaves, by the hub's name."""
    folders = {}
    with Hub(models={MODEL_ID: TINY}) as hub:
        for site in SITES:
            folders[site.name] = tmp_path_factory.mktemp(site.name)
            done = runner(folders[site.name], site.environment(hub), HUB=site.name)
            assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture
def whole(downloaded, site, folder):
    """A folder with the whole model and its record."""
    return Path(shutil.copytree(downloaded[site.name], folder, dirs_exist_ok=True))


@pytest.fixture
def model_hub():
    with Hub(models={MODEL_ID: TINY}) as hub:
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture
def closed_hub():
    """Where nothing listens any more."""
    with Hub() as hub:
        pass
    return hub


@pytest.fixture(scope="module")
def script():
    """load_model.py as a module of this process, where neither network nor signals are needed."""
    return load("load_model.py", [])


@pytest.fixture
def model_folder(script, monkeypatch, tmp_path):
    """The folder of a model for `script`, filled by hand."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    monkeypatch.setattr(script, "MODEL_FOLDER", str(folder))
    return folder


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def record_as_whole(script) -> None:
    """Write the record that says that MODEL_FOLDER is as a hub lists it."""
    size = (TINY / "config.json").stat().st_size
    files = [script.RemoteFile("config.json", size, None)]
    script.write_record(SimpleNamespace(revision="main"), files)


# A whole download


def test_files_land_where_documented(first_run):
    """The wanted files, each asked for once, are in MODEL_FOLDER, and nothing but caches elsewhere.

    Otherwise train.py wouldn't find them: the client's cache_dir puts them under models/Qwen--....
    """
    wanted = set(contents(TINY))
    expected = {name: (first_run.repository / name).read_bytes() for name in wanted}
    assert contents(first_run.work / FOLDER) == expected
    assert {path.name for path in first_run.work.iterdir()} == {"Qwen", ".cache"}
    # Neither a pickle nor code is among them
    assert sorted(first_run.site.fetched(first_run.hub)) == sorted(wanted)


def test_nothing_else_is_asked_for(first_run):
    """Requests are for the listing and the files. Otherwise somebody learns who trains what."""
    site = first_run.site
    known = (site.listing, site.file, site.large_file, "/api/v1/repos/internalAccelerationInfo")
    assert [path for path in first_run.hub.requests if not path.startswith(known)] == []
    listings = [path for path in first_run.hub.requests if path.startswith(site.listing)]
    assert len(listings) == 1


def test_no_token_leaks(first_run):
    """A token is neither printed nor written, and no other host gets it.

    Otherwise a log in a forum, or a folder that is shared, would open the user's account.
    """
    assert TOKEN not in first_run.done.stdout + first_run.done.stderr
    assert first_run.leaks == []
    assert [path for path in first_run.hub.with_token if path.startswith("/cdn/")] == []


def test_the_record_holds_what_is_on_the_disk(first_run):
    """Size and SHA-256 of each file, even of those of which the hub only knows git's name."""
    folder = first_run.work / FOLDER
    record = json.loads((folder / ".complete.json").read_text())
    expected = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents(folder).items()
    }
    branch = {"modelscope": "master", "huggingface": "main"}[first_run.site.name]
    assert record == {"model": MODEL_ID, "revision": branch, "files": expected}


def test_what_the_run_shows(first_run):
    """The parts add up to the whole. Otherwise a tied weight counts twice or a part is missing."""
    stdout = first_run.done.stdout
    lines = [line for line in stdout.splitlines() if line.endswith(" parameters")]
    *parts, total = [int(line.split()[-2].replace(",", "")) for line in lines]
    weights = [file.stat().st_size for file in TINY.glob("*.safetensors")]
    assert sum(parts) == total and len(parts) == 4 and parts[-1] == 0
    # Two bytes each; the rest are the names of the tensors
    assert 0.97 < 2 * total / sum(weights) <= 1
    assert "torch.bfloat16" in stdout and "transformers 5." in stdout


def test_second_run_needs_no_network(run, whole, closed_hub):
    """A whole folder is verified and loaded without a request. Otherwise no train ride works."""
    done = run(whole, closed_hub)
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout and "no network is used" in done.stdout
    assert "retry" not in done.stderr
    assert "M/2." in done.stderr  # the bar counts bytes, not files


def test_the_other_hub_needs_no_download(runner, model_hub, folder):
    """What one hub gave is whole for the other one, too; so is half a file, which is resumed."""
    model_hub.faults[MODELSCOPE.file + SHARD] = slow(0.1)
    download = runner.start(folder, model_hub.environment())
    wait_for(folder / FOLDER / f"{SHARD}.incomplete", 500_000)
    os.kill(download.pid, signal.SIGKILL)
    runner.end(download)
    ranges = []
    model_hub.faults = {HUGGINGFACE.place(SHARD): remember_range(ranges)}
    model_hub.requests.clear()
    environment = HUGGINGFACE.environment(model_hub)
    assert runner(folder, environment, HUB="huggingface").returncode == 0
    assert HUGGINGFACE.fetched(model_hub) == [SHARD] and ranges[0] > 500_000
    assert contents(folder / FOLDER) == contents(TINY)
    model_hub.requests.clear()
    done = runner(folder, model_hub.environment())
    assert done.returncode == 0 and model_hub.requests == []


def test_verifying_is_seen_to_move(script, tmp_path):
    """The bar moves within a file. Otherwise it stands still for a file of 4 GB."""
    moves = []
    bar = SimpleNamespace(update=moves.append)
    path = tmp_path / "large"
    path.write_bytes(bytes(5_000_000))
    assert script.is_whole(path, script.RemoteFile("large", 5_000_000, None), bar)
    assert len(moves) >= 4 and sum(moves) == 5_000_000
    # A hub that gives no hash still gives the size
    assert not script.is_whole(path, script.RemoteFile("large", 5_000_001, None), bar)


def test_small_files_are_verified_by_gits_name(script):
    """A small file with one wrong byte is found, though Hugging Face lists no SHA-256 of it."""
    path = TINY / "config.json"
    size = path.stat().st_size
    name = subprocess.check_output(["git", "hash-object", str(path)], text=True).strip()
    assert script.is_whole(path, script.RemoteFile("config.json", size, None, name))
    assert not script.is_whole(path, script.RemoteFile("config.json", size, None, "0" * 40))


def test_two_runs_at_once(runner, site, model_hub, folder):
    """Two runs in one folder don't write to one file. Otherwise their bytes would mix."""
    model_hub.faults[site.place(SHARD)] = slow(0.02)
    runs = [
        runner.start(folder / name, site.environment(model_hub), HUB=site.name, **shared(folder))
        for name in make_folders(folder, "one", "two")
    ]
    assert [runner.end(each).returncode for each in runs] == [0, 0]
    assert contents(folder / "model") == contents(TINY)
    assert site.fetched(model_hub).count(SHARD) == 1


def make_folders(parent: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (parent / name).mkdir()
    return names


def shared(folder: Path) -> dict[str, str]:
    """Constants of two runs that share their folders."""
    return {"MODEL_FOLDER": str(folder / "model"), "LOCK_FOLDER": str(folder / "cache")}


# Faults of the network


def once(fault: Callable) -> Callable:
    """A fault that is gone the second time."""
    left = [fault]

    def chosen(handler) -> None:
        if left:
            left.pop()(handler)
        else:
            handler.answer()

    return chosen


def true_content(handler) -> bytes:
    return (TINY / re.split("[/=]", handler.path)[-1]).read_bytes()


def other_bytes(handler) -> None:
    """A file of the right length with the wrong contents, as a broken mirror has it."""
    handler.send(200, b"?" * len(true_content(handler)), "application/octet-stream")


def stall(handler) -> None:
    """The headers and half of the file, then nothing for as long as the client waits."""
    handler.connection.settimeout(20)
    handler.answer(share=1 / 2)
    handler.wfile.flush()
    handler.rfile.read(1)  # until it hangs up


def drip(handler) -> None:
    """The headers, then a byte now and then: a timeout between two bytes never strikes."""
    content = true_content(handler)
    handler.send(200, io.BytesIO(), "application/octet-stream", length=len(content))
    for number in range(100):
        handler.wfile.write(content[number : number + 1])
        handler.wfile.flush()
        time.sleep(0.1)


def reset(handler) -> None:
    """The connection is reset in the middle of a file, as firewalls do it."""
    handler.answer(share=1 / 2)
    handler.wfile.flush()
    linger = bytes([1, 0, 0, 0, 0, 0, 0, 0])  # on, 0 seconds: the kernel sends RST
    handler.connection.setsockopt(1, 13, linger)  # SOL_SOCKET, SO_LINGER
    handler.connection.close()


def empty_listing(handler) -> None:
    """A repository without files."""
    body = as_json({"Files": []})
    if "/api/models/" in handler.path:
        body = json.dumps({"id": MODEL_ID, "sha": COMMIT, "siblings": []}).encode()
    handler.send(200, body, "application/json")


@pytest.mark.slow
def test_faults_that_pass(run, site, folder, model_hub):
    """A cut connection, a broken answer or an overloaded server doesn't end a download."""
    model_hub.faults[site.place(SHARD)] = once(cut_short)
    model_hub.faults[site.place("tokenizer.json")] = once(other_bytes)
    model_hub.faults[site.place("vocab.json")] = once(status(503))
    done = run(folder, model_hub)
    assert done.returncode == 0, done.stderr
    assert contents(folder / FOLDER) == contents(TINY)
    times = [
        site.fetched(model_hub).count(name) for name in (SHARD, "tokenizer.json", "vocab.json")
    ]
    assert times == [2, 2, 2]


def test_files_of_all_kinds(run, site, tmp_path, folder):
    """An empty file, and one in a folder of its own with a name to be quoted, arrive as any."""
    repository = Path(shutil.copytree(TINY, tmp_path / "model"))
    (repository / "empty.txt").write_bytes(b"")
    (repository / "sub").mkdir()
    (repository / "sub/a name & 名字.json").write_text("{}")
    (repository / "sub/weights.safetensors").write_bytes(bytes(100))
    with Hub(models={MODEL_ID: repository}) as hub:
        done = run(folder, hub)
    assert done.returncode == 0, done.stderr
    files = everything(folder / FOLDER)
    del files[".complete.json"]
    assert files == everything(repository)


@posix
def test_a_reset_connection_is_resumed(run, site, folder, model_hub):
    """A firewall that resets connections doesn't end a download, which resumes."""
    model_hub.faults[site.place(SHARD)] = once(reset)
    done = run(folder, model_hub)
    assert done.returncode == 0, done.stderr
    assert contents(folder / FOLDER) == contents(TINY)
    assert site.fetched(model_hub).count(SHARD) == 2


LASTING = [
    ("listing", status(404), "Check MODEL_ID"),
    ("listing", status(401), "Check MODEL_ID"),
    ("listing", status(500), "can't be reached"),
    ("listing", html, "login"),
    ("listing", empty_listing, "no config.json"),
    (SHARD, status(404), f"1 of .* files didn't arrive.* {SHARD}: .*404"),
    pytest.param(
        SHARD,
        other_bytes,
        f"1 of .* files didn't arrive.* {SHARD}: .*Hash mismatch",
        marks=pytest.mark.slow,
    ),
    pytest.param(SHARD, stall, f"1 of .* files didn't arrive.* {SHARD}", marks=pytest.mark.slow),
    (SHARD, drip, f"1 of .* files didn't arrive.* {SHARD}"),
]
LASTING_IDS = [
    "listing-404", "listing-401", "listing-500", "listing-html", "listing-empty",
    "404", "checksum", "stall", "drip",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("place", "fault", "message"), LASTING, ids=LASTING_IDS)
def test_faults_that_stay(run, site, folder, model_hub, place, fault, message):
    """A run ends in a sentence that says what to do, and the next one needs the rest only.

    Otherwise: a traceback, a wait without an end, or a model with a hole.
    """
    if fault is drip and site is HUGGINGFACE:
        pytest.skip("its client has no lowest speed: the bar shows that next to nothing arrives")
    path = site.listing if place == "listing" else site.place(place)
    model_hub.faults[path] = fault
    done = run(folder, model_hub, HURRY, MAX_RETRIES=1)
    assert re.search(message, one_sentence(done))
    assert not (folder / FOLDER / ".complete.json").exists()
    if place == "listing":
        return
    assert SHARD not in contents(folder / FOLDER)
    if fault in (stall, drip):  # that it waits is seen
        assert SHARD in done.stderr and re.search("retrying|Trying to resume", done.stderr)
    model_hub.faults.clear()
    model_hub.requests.clear()
    done = run(folder, model_hub)
    assert done.returncode == 0 and site.fetched(model_hub) == [SHARD]
    assert contents(folder / FOLDER) == contents(TINY)


def test_nothing_there_without_network(run, site, folder, closed_hub):
    """Without network and model the message says so, and which hub else could be asked."""
    other = {"modelscope": "huggingface", "huggingface": "modelscope"}[site.name]
    message = one_sentence(run(folder, closed_hub))
    assert "can't be reached" in message and f'HUB = "{other}"' in message


def test_modelscope_is_asked_again(runner, folder, closed_hub):
    """The waiting for a hub that may come back is seen."""
    environment = {**closed_hub.environment(), "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2"}
    done = runner(folder, environment)
    assert "can't be reached" in one_sentence(done) and "retry in" in done.stderr


def test_offline_mode_is_named(runner, folder, model_hub):
    """HF_HUB_OFFLINE, which many set for transformers, is named as the reason."""
    done = runner(folder, model_hub.environment(), HUB="huggingface")
    assert "HF_HUB_OFFLINE" in one_sentence(done) and model_hub.requests == []


def test_filled_by_hand_without_network(run, whole, closed_hub):
    """A folder copied from a colleague works without network; that nobody verified it is said."""
    (whole / FOLDER / ".complete.json").unlink()
    done = run(whole, closed_hub)
    assert done.returncode == 0, done.stderr
    assert "NOT VERIFIED" in done.stdout
    assert not (whole / FOLDER / ".complete.json").exists()


def test_half_a_download_is_not_a_folder_filled_by_hand(run, whole, closed_hub):
    """Half a download without network ends with the network as reason, not with missing weights."""
    (whole / FOLDER / ".complete.json").unlink()
    (whole / FOLDER / SHARD).rename(whole / FOLDER / f"{SHARD}.incomplete")
    assert "can't be reached" in one_sentence(run(whole, closed_hub))


@pytest.mark.slow
def test_limits_of_the_waiting(closed_hub):
    """The clients wait 30 s for a byte, and ModelScope's gives a file 12 hours, not one.

    Otherwise 4 GB on a line of 1 MB/s never arrive in one run. What the shell says counts more.
    """
    code = """
import load_model, modelscope_hub.constants as ms, huggingface_hub.constants as hf
print(ms.DOWNLOAD_TIMEOUT, ms.DOWNLOAD_TOTAL_TIMEOUT, hf.HF_HUB_DOWNLOAD_TIMEOUT)
print(hf.HF_HUB_DISABLE_TELEMETRY)
"""
    environment = variables({**closed_hub.environment(), "MODELSCOPE_DOWNLOAD_TIMEOUT": "45"})
    output = subprocess.check_output(
        [sys.executable, "-c", code], env=environment, cwd=TESTS.parent, text=True
    )
    assert output.split() == ["45", "43200", "30", "True"]


# Proxies


def proxy_variable(name: str, address: str) -> dict[str, str | None]:
    """This variable alone: an empty one in lower case would hide one in upper case."""
    return {name.lower(): None, name: address}


def test_socks_proxy(run, folder, model_hub):
    """ALL_PROXY = socks5://..., which many users' programs set, is used for all requests."""
    with Proxy() as proxy:
        address = f"socks5://user:secret-of-the-user@{proxy.address}"
        done = run(folder, model_hub, proxy_variable("ALL_PROXY", address))
    assert done.returncode == 0, done.stderr
    assert contents(folder / FOLDER) == contents(TINY)
    hosts = {host for host, _ in proxy.targets}
    assert hosts <= {"127.0.0.1", "localhost"} and len(proxy.targets) > 1
    assert "secret-of-the-user" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "address"),
    [
        ("ALL_PROXY", "sock5://127.0.0.1:7890"),
        ("all_proxy", "socks5://127.0.0.1:1"),
        ("HTTP_PROXY", "127.0.0.1:1"),
        ("http_proxy", "http://127.0.0.1:port"),
        ("ALL_PROXY", "socks5://me:my-secret@127.0.0.1:1"),
    ],
    ids=["misspelt", "socks", "without scheme", "port", "password"],
)
def test_proxy_that_cannot_work(run, folder, model_hub, variable, address):
    """The message names the variable. Otherwise it is about a login page, or names the hub's host.

    The password in the address isn't printed.
    """
    done = run(folder, model_hub, proxy_variable(variable, address))
    assert one_sentence(done).startswith(f"The proxy in {variable} can't be used (")
    assert "my-secret" not in done.stdout + done.stderr
    assert model_hub.requests == []


def test_proxy_that_answers_wrongly(run, folder, model_hub, closed_hub):
    """A hub that can't be reached behind a proxy: the message names the proxy's variable."""
    with Proxy() as proxy:
        variables = proxy_variable("ALL_PROXY", f"socks5://{proxy.address}")
        done = run(folder, closed_hub, variables)
    assert "can't be reached through the proxy in ALL_PROXY" in one_sentence(done)


# Faults of the disk


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


DAMAGES = [{SHARD: flip}, {"config.json": Path.unlink, "tokenizer.json": cut}, {"vocab.json": flip}]


@pytest.mark.parametrize("damage", DAMAGES, ids=["bit", "gone and cut", "small"])
def test_damaged_files_are_fetched_again(run, site, model_hub, whole, damage):
    """What differs is fetched again, and nothing else. A flipped bit keeps a file's size."""
    for name, spoil in damage.items():
        spoil(whole / FOLDER / name)
    done = run(whole, model_hub)
    assert done.returncode == 0, done.stderr
    assert sorted(site.fetched(model_hub)) == sorted(damage)
    assert contents(whole / FOLDER) == contents(TINY)


def test_damaged_without_network(run, whole, closed_hub):
    """What is known to be damaged is not loaded. Otherwise the training would learn from noise."""
    flip(whole / FOLDER / SHARD)
    done = run(whole, closed_hub)
    assert (
        "can't be reached" in one_sentence(done)
        and f"altered, and downloaded again: {SHARD}" in done.stdout
    )


def test_damaged_record(run, site, whole, model_hub):
    """A record cut by a full disk is as none: the files are verified by the hub's list."""
    cut(whole / FOLDER / ".complete.json")
    assert run(whole, model_hub).returncode == 0
    assert site.fetched(model_hub) == []
    assert json.loads((whole / FOLDER / ".complete.json").read_text())["model"] == MODEL_ID


def test_record_of_an_earlier_version(run, whole, closed_hub):
    """A folder that REVISION = "master" was written for is whole with REVISION = None."""
    record = whole / FOLDER / ".complete.json"
    record.write_text(record.read_text().replace('"main"', '"master"'))
    assert run(whole, closed_hub).returncode == 0


def test_disk_too_small(script, monkeypatch, tmp_path):
    """A disk without room for the wanted files is refused before any is fetched."""
    sizes = {"config.json": 1, "model.safetensors": 10**18, "old/pytorch_model.bin": 10**18}
    files = [script.RemoteFile(name, size, None) for name, size in sizes.items()]
    hub = SimpleNamespace(title="a hub", revision="main", list_files=lambda: files)
    monkeypatch.setattr(script, "MODEL_FOLDER", str(tmp_path))
    with pytest.raises(SystemExit, match="1000000000.0 GB are needed"):
        script.check_space(script.list_wanted(hub))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_disk_full_on_the_way(run, site, folder, model_hub):
    """A disk that is full meanwhile is named; with room again, only what is missing is fetched."""
    partial = folder / FOLDER / f"{SHARD}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    message = one_sentence(run(folder, model_hub))
    assert "Free some space" in message and f"{SHARD}: [Errno 28] No space left" in message
    partial.unlink()
    model_hub.requests.clear()
    assert run(folder, model_hub).returncode == 0
    assert site.fetched(model_hub) == [SHARD] and contents(folder / FOLDER) == contents(TINY)


@pytest.mark.parametrize(
    "place", ["taken", "taken/model", pytest.param("/proc/model", marks=posix)]
)
def test_folder_that_cannot_be(run, site, folder, model_hub, place):
    """A file where the folder should be, or a disk that can't be written, is named."""
    (folder / "taken").write_text("mine")
    message = one_sentence(run(folder, model_hub, MODEL_FOLDER=place))
    assert message.startswith("Can't write to") and place in message
    assert (folder / "taken").read_text() == "mine" and site.fetched(model_hub) == []


@pytest.mark.parametrize("name", [".complete.json", "config.json", SHARD])
def test_files_without_rights_are_not_damage(script, monkeypatch, model_folder, name):
    """A file that may not be read is named with its reason. Otherwise it would be fetched again."""
    monkeypatch.setattr(script, "list_wanted", lambda hub: pytest.fail("the hub was asked"))
    record = {"model": MODEL_ID, "revision": "master", "files": {}}
    for path in model_folder.iterdir():
        entry = {"size": path.stat().st_size, "sha256": None}
        record["files"][path.name] = entry
    (model_folder / ".complete.json").write_text(json.dumps(record))
    real_open = io.open

    def refuse(path, *args, **options):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **options)

    # Tests may run as root, whom no permission stops
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr(script, "handle_stop_signals", lambda handler: None)
    with pytest.raises(SystemExit, match=f"^Can't use .*{name} .*Permission denied.*permissions"):
        script.main()


def test_weights_without_rights(script, monkeypatch, model_folder):
    """Weights that may not be read are not called missing, as safetensors would do."""

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="safetensors"):
        script.load()


def test_a_folder_shared_by_many(script, monkeypatch, model_folder, capsys):
    """A whole folder that can't be written is used; only the record is missing, which is said."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    files = [script.RemoteFile("config.json", (TINY / "config.json").stat().st_size, None)]
    monkeypatch.setattr(script, "write_atomically", refuse)
    script.download(SimpleNamespace(title="a hub", revision="main"), files)
    assert "Can't write .complete.json (Permission denied)" in capsys.readouterr().out


def test_what_an_older_client_left(run, site, folder, model_hub):
    """What modelscope 1.18 with cache_dir="./" left is kept where a file is whole."""
    model, temporary = folder / FOLDER, folder / "._____temp" / FOLDER
    shutil.copytree(TINY, model)
    shutil.copytree(TINY, temporary)
    (model / SHARD).unlink()
    cut(temporary / SHARD)
    cut(model / "vocab.json")
    (model / ".msc").write_bytes(b"its index")
    done = run(folder, model_hub)
    assert done.returncode == 0, done.stderr
    assert sorted(site.fetched(model_hub)) == [SHARD, "vocab.json"]
    assert contents(model) == {**contents(TINY), ".msc": b"its index"}


def test_stale_halves_are_dropped(run, site, folder, model_hub):
    """Half of another version of a file, or more than all of it, doesn't end in a wrong file."""
    model = folder / FOLDER
    model.mkdir(parents=True)
    (model / f"{SHARD}.incomplete").write_bytes(b"another version" * 1000)
    (model / "vocab.json.incomplete").write_bytes(bytes(10**6))
    done = run(folder, model_hub)
    assert done.returncode == 0, done.stderr
    assert contents(model) == contents(TINY)


@posix
def test_links_are_not_written_through(run, whole, model_hub, tmp_path):
    """Weights that are links into another program's cache are replaced here, and kept there."""
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (whole / FOLDER / SHARD).unlink()
    (whole / FOLDER / SHARD).symlink_to(theirs)
    elsewhere = shutil.move(whole / FOLDER, tmp_path / "large disk")
    (whole / FOLDER).symlink_to(elsewhere)  # the whole folder on another disk is nothing unusual
    assert run(whole, model_hub).returncode == 0
    assert theirs.read_text() == "theirs" and contents(whole / FOLDER) == contents(TINY)


# What is refused


OUTSIDE = ["../../escaped.json", "{tmp}/escaped.json", "..\\..\\escaped.json", "C:escaped.json"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_is_written_outside(run, site, folder, model_hub, tmp_path, path):
    """A listing that names a file outside of MODEL_FOLDER is refused.

    Otherwise a hub, or who sits between, could replace any file of the user's.
    """
    path = path.format(tmp=tmp_path)
    if site is MODELSCOPE:
        files = [describe(file.name, file) for file in TINY.iterdir()]
        files.append({"Path": path, "Name": "escaped.json", "Type": "blob", "Size": 2})
        body = as_json({"Files": files})
    else:
        listing = json.loads(stand_in.huggingface_listing(TINY, with_blobs=True).body)
        listing["siblings"].append({"rfilename": path, "size": 2, "blobId": "0" * 40})
        body = json.dumps(listing).encode()
    model_hub.faults[site.listing] = lambda handler: handler.send(200, body, "application/json")
    before = sorted(tmp_path.rglob("*"))
    done = run(folder, model_hub)
    assert "would land outside" in one_sentence(done)
    new = [each for each in sorted(tmp_path.rglob("*")) if each not in before]
    assert [each for each in new if each.parent != tmp_path] == []
    assert site.fetched(model_hub) == []


def test_unknown_model(run, model_hub, folder):
    """A typo in MODEL_ID ends in a sentence that names it, and leaves no folder."""
    done = run(folder, model_hub, MODEL_ID="Qwen/Qwen2-LV-2B", MODEL_FOLDER="m")
    assert "Check MODEL_ID = 'Qwen/Qwen2-LV-2B'" in one_sentence(done)
    assert not (folder / "m").exists()


def test_unknown_revision(runner, model_hub, folder):
    """A branch that isn't there is named: ModelScope's "master" is "main" on Hugging Face."""
    environment = HUGGINGFACE.environment(model_hub)
    done = runner(folder, environment, HUB="huggingface", REVISION="master")
    assert "REVISION = 'master'" in one_sentence(done)


def test_another_model_is_not_replaced(run, whole, model_hub):
    """MODEL_ID changed and MODEL_FOLDER forgotten: the second model doesn't overwrite the first."""
    other = "Qwen/Qwen2-VL-7B-Instruct"
    model_hub.models[other] = TINY
    done = run(whole, model_hub, MODEL_ID=other)
    assert "Change MODEL_FOLDER" in one_sentence(done) and model_hub.requests == []
    done = run(whole, model_hub, MODEL_ID=other, MODEL_FOLDER="seven")
    assert done.returncode == 0 and contents(whole / "seven") == contents(TINY)


def test_an_uploaded_record_is_not_fetched(run, site, tmp_path, folder):
    """Of a repository that was uploaded with its record, all else is fetched, once."""
    repository = Path(shutil.copytree(TINY, tmp_path / "model"))
    (repository / ".complete.json").write_text("{}")
    with Hub(models={MODEL_ID: repository}) as hub:
        assert run(folder, hub).returncode == 0
        assert ".complete.json" not in site.fetched(hub)
        hub.requests.clear()
        assert run(folder, hub).returncode == 0 and hub.requests == []


QUANTISED = {
    "Qwen/Qwen2-VL-2B-Instruct-AWQ": "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int8": "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct-FP8": "Qwen/Qwen3-VL-4B-Instruct",
    "someone/Qwen2-VL-7B-Instruct-bnb-4bit": "someone/Qwen2-VL-7B-Instruct",
    "someone/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit": "someone/Qwen2.5-VL-3B-Instruct",
    "someone/small-and-fast": "the one it was made from",
}


@pytest.mark.parametrize(("name", "plain"), QUANTISED.items())
def test_plain_name_of_a_quantised_model(script, monkeypatch, model_folder, name, plain):
    """The message names the model to take instead, and what saves memory with it."""
    change_config(model_folder, quantization_config={"quant_method": "awq", "bits": 4})
    monkeypatch.setattr(script, "MODEL_ID", name)
    with pytest.raises(SystemExit, match="is quantised") as stopped:
        script.check_config()
    assert re.search(f'Take (MODEL_ID = "{plain}"|{plain}),', str(stopped.value))
    assert "LOAD_IN_4BIT = True" in str(stopped.value)


REFUSED = {
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "text": {"model_type": "qwen2"},
    "linear attention": {"model_type": "qwen3_5"},
    "experts": {"model_type": "qwen3_vl_moe"},
    "no type": {"model_type": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_refused_before_the_weights_are_fetched(run, site, tmp_path, folder, changes):
    """A model that can't be trained costs the user one small file, not an hour."""
    repository = Path(shutil.copytree(TINY, tmp_path / "model"))
    change_config(repository, **changes)
    with Hub(models={MODEL_ID: repository}) as hub:
        message = one_sentence(run(folder, hub))
    assert site.fetched(hub) == ["config.json"]
    if "quantization_config" not in changes:
        assert f"of type {changes['model_type']}" in message
        assert "Qwen2-VL, Qwen2.5-VL, Qwen3-VL" in message


BAD = {
    "HUB": ["ModelScope", None, ""],
    "MODEL_ID": ["Qwen2-VL-2B-Instruct", "/Qwen", 7, "a/b/c", "https://host/a/b"],
    "REVISION": ["", 3],
    "MODEL_FOLDER": ["", 3, "e:\new"],
    "RECORD_FILE": ["", None],
    "LOCK_FOLDER": ["", None],
    "WANTED_FILES": ["*.json", [], [1], [""]],
    "FILE_THREADS": [0, "4", True],
    "CONNECT_TIMEOUT": [0, "10", float("nan")],
    "MAX_RETRIES": [0, None],
    "IMAGE_FOLDER": ["", None],
    "QUESTION": ["", None],
    "LARGEST_SIDE": [0, "640"],
    "CAPTION_TOKENS": [0, None],
    "BATCH_SIZES": [[], [0], ["4"], [1.5], 4, None],
    "LORA_RANK": [0, 0.5],
    "IMAGE_TOKENS": [0, "100"],
    "TEXT_TOKENS": [0],
    "ANSWER_TOKENS": [-1],
}


def test_every_constant_is_checked(script):
    """Each constant between the rules of dashes has a rule, and bad values below in this test."""
    assert set(script.__annotations__) == set(BAD)
    # Who changes only MODEL_ID keeps both models
    assert script.MODEL_FOLDER == script.MODEL_ID
    train = (TESTS.parent / "train.py").read_text(encoding="utf-8")
    assert re.search(rf'^MODEL_FOLDER.* = "{script.MODEL_FOLDER}"', train, re.M)
    # The memory is that of train.py's images
    [side] = re.findall(r"^IMAGE_SIZE.* = (\d+)", train, re.M)
    assert script.IMAGE_TOKENS == (int(side) / 28) ** 2


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_constant(script, monkeypatch, name, value):
    """A typo in a constant is named at once. Otherwise it would end an hour of downloading."""
    monkeypatch.setattr(script, name, value)
    with pytest.raises(SystemExit, match=f"^{name} = .* can't work: ") as stopped:
        script.check_constants()
    assert repr(value) in str(stopped.value)


def test_constants_are_checked_first(runner, folder, model_hub):
    """main() checks the constants before it asks the hub."""
    done = runner(folder, model_hub.environment(), LORA_RANK=0)
    assert "LORA_RANK = 0 at the top of load_model.py" in one_sentence(done)
    assert model_hub.requests == []


def test_home_folder(runner, folder, model_hub):
    """~ in MODEL_FOLDER is the home folder. Otherwise a folder named ~ appears."""
    environment = {**model_hub.environment(), "HOME": str(folder), "USERPROFILE": str(folder)}
    assert runner(folder, environment, MODEL_FOLDER="~/m").returncode == 0
    assert contents(folder / "m") == contents(TINY)


# Stopped on the way


class Slow:
    """A file that takes its time, so that a download of 3 MB lasts."""

    def __init__(self, file, pause: float):
        self.file, self.pause = file, pause

    def write(self, piece: bytes) -> None:
        self.file.write(piece)
        self.file.flush()
        time.sleep(self.pause)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def slow(pause: float) -> Callable:
    """Answers in pieces of 64 KB with a pause after each."""

    def fault(handler) -> None:
        handler.wfile = Slow(getattr(handler.wfile, "file", handler.wfile), pause)
        handler.answer()

    return fault


def remember_range(ranges: list[int]) -> Callable:
    """The truth; `ranges` gets the byte from which on a file was asked for."""

    def fault(handler) -> None:
        ranges.append(int(re.search(r"\d+", handler.headers["Range"])[0]))
        handler.answer()

    return fault


def wait_for(file: Path, size: int) -> None:
    """Wait until a file has so many bytes."""
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > size):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def arrived(folder: Path) -> int:
    """Return how many bytes there are in a folder, whose files may be renamed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.rglob("*"))
    return 0


@posix
@pytest.mark.slow
def test_killed_at_any_moment(runner, site, model_hub, tmp_path):
    """After a kill at any moment, the next run ends where an undisturbed one would have."""
    model_hub.faults[site.place("")] = slow(0.04)
    model_hub.faults[site.large_file] = slow(0.04)
    environment = site.environment(model_hub)
    works = [tmp_path / str(number) for number in range(11)]
    for work in works:
        work.mkdir()
    undisturbed = runner(works[0], environment, HUB=site.name)
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = everything(works[0] / FOLDER)
    size = sum(map(len, expected.values()))
    rng = random.Random(2014)
    left = []
    for work in works[1:]:
        killed = runner.start(work, environment, HUB=site.name)
        # A moment is told by what has arrived: a busy machine is slower than the clock
        moment = rng.uniform(0, size)
        deadline = time.monotonic() + 60
        while arrived(work / FOLDER) < moment:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(killed.pid, signal.SIGKILL)
        assert runner.end(killed).returncode in (-signal.SIGKILL, 0)
        left.append(sum(map(len, everything(work / FOLDER).values())))
    assert len(set(left)) >= 5 and min(left) < max(left) / 2, left
    model_hub.faults.clear()
    for work in works[1:]:
        assert runner(work, environment, HUB=site.name).returncode == 0
        assert everything(work / FOLDER) == expected


def stop_at(runner: Runner, run: Run, moment: str, number: int) -> subprocess.CompletedProcess:
    """Send a signal once a run has printed `moment`; what it left behind."""
    deadline = time.monotonic() + 60
    while moment not in run.out.read_text("utf-8") + run.err.read_text("utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(run.pid, number)
    done = runner.end(run)
    assert done.returncode == 128 + number, done
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Stopped. ")
    return done


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("moment", "signal_name"),
    [
        ("Asking", "SIGINT"),
        ("to download", "SIGINT"),
        ("to download", "SIGTERM"),
        ("to download", "SIGHUP"),
        ("verifying", "SIGTERM"),
        ("no network is used", "SIGHUP"),
    ],
)
def test_stopped_with_one_sentence(runner, site, whole, model_hub, moment, signal_name):
    """Ctrl-C, kill and a closed terminal end a run at once, in a sentence, and spoil nothing."""
    expected = everything(whole / FOLDER)
    hold = ""
    if moment in ("Asking", "to download"):
        shutil.rmtree(whole / FOLDER)
    if moment == "Asking":
        model_hub.faults[site.listing] = stall
    if moment == "to download":
        model_hub.faults[site.place(SHARD)] = slow(5)
    if moment == "verifying":
        hold = "is_whole"
    if moment == "no network is used":
        hold = "load"
    started = runner.start(whole, site.environment(model_hub), hold, HUB=site.name)
    stop_at(runner, started, moment, signal.Signals[signal_name])
    model_hub.faults.clear()
    assert runner(whole, site.environment(model_hub), HUB=site.name).returncode == 0
    assert everything(whole / FOLDER) == expected


@pytest.mark.slow
@posix
def test_nohup_is_respected(runner, site, folder, model_hub):
    """A run under nohup outlives its terminal. Otherwise an hour of downloading is lost."""
    model_hub.faults[site.place(SHARD)] = slow(0.05)
    environment = site.environment(model_hub)
    run = runner.start(folder, environment, ignore=["SIGHUP"], HUB=site.name)
    wait_for(folder / FOLDER / f"{SHARD}.incomplete", 100_000)
    os.kill(run.pid, signal.SIGHUP)
    done = runner.end(run)
    assert done.returncode == 0, done
    assert contents(folder / FOLDER) == contents(TINY)


@pytest.mark.slow
@posix
def test_a_resumed_file_is_not_fetched_from_its_start(runner, site, folder, model_hub):
    """A killed run's half of a file is kept. Otherwise 4 GB never arrive on a slow line."""
    model_hub.faults[site.place(SHARD)] = slow(0.1)
    environment = site.environment(model_hub)
    killed = runner.start(folder, environment, HUB=site.name)
    wait_for(folder / FOLDER / f"{SHARD}.incomplete", 500_000)
    os.kill(killed.pid, signal.SIGKILL)
    runner.end(killed)
    ranges = []
    model_hub.faults[site.place(SHARD)] = remember_range(ranges)
    model_hub.requests.clear()
    assert runner(folder, environment, HUB=site.name).returncode == 0
    assert site.fetched(model_hub) == [SHARD] and ranges[0] > 500_000
    assert contents(folder / FOLDER) == contents(TINY)


# The model


def test_other_and_broken_models(script, model_folder):
    """A model of another kind, or with a hole, is refused, by what is wrong with it.

    Otherwise from_pretrained fills what is missing with random numbers, and the training learns
    from noise.
    """
    config = json.loads((model_folder / "config.json").read_text())
    change_config(model_folder, model_type="llama")
    with pytest.raises(SystemExit, match="of type llama.*Qwen2-VL"):
        script.load()

    deeper = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1}
    (model_folder / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(SystemExit, match="is not whole: missing_keys"):
        script.load()

    (model_folder / "config.json").write_text(json.dumps(config))
    cut(model_folder / SHARD)
    with pytest.raises(SystemExit, match="doesn't load.*Run again with a network"):
        script.load()

    (model_folder / "config.json").write_text("<html>")
    with pytest.raises(SystemExit, match="config.json is damaged"):
        script.load()


def test_advice_follows_the_cause(script, monkeypatch, model_folder):
    """Neither a lack of memory nor a file that is as it should be is called damage."""

    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(script.AutoModelForImageTextToText, "from_pretrained", fail)
    message = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    with pytest.raises(SystemExit, match="can't allocate memory.*Close other programs"):
        script.load()
    message = "something that a library doesn't like"
    record_as_whole(script)
    with pytest.raises(SystemExit, match="doesn't like.*as the hub lists them"):
        script.load()


def test_untied_output_head(script, model_folder, capsys):
    """The output head of its own, which the 7B model has in its last shard, loads and counts."""
    change_config(model_folder, tie_word_embeddings=False)
    with pytest.raises(SystemExit, match=r"missing_keys \['lm_head.weight'\]"):
        script.load()
    index = json.loads((model_folder / "model.safetensors.index.json").read_text())
    embeddings = next(name for name in index["weight_map"] if name.endswith("embed_tokens.weight"))
    head = load_file(model_folder / index["weight_map"][embeddings])[embeddings]
    shard = "model-00003-of-00003.safetensors"
    save_file({"lm_head.weight": head + 1}, model_folder / shard, {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = shard
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = script.load()
    assert torch.equal(loaded.lm_head.weight, head + 1)
    script.print_parts(loaded)
    assert re.search(rf"output head +{head.numel():,} parameters", capsys.readouterr().out)


# What the published models have in their config.json; the numbers of weights are those that their
# pages on the hubs give.
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
INTERLEAVED = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}


class Shape(NamedTuple):
    config: dict
    parts: list[int]
    lora: int


def qwen2_vl(
    hidden: int, intermediate: int, heads: int, groups: int, words: int, tied: bool
) -> dict:
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
    return {
        "model_type": "qwen2_vl",
        "num_hidden_layers": 28,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "rope_scaling": MROPE,
        "vision_config": {**vision, "hidden_size": hidden},
    }


QWEN2_VL_2B = qwen2_vl(1536, 8960, 12, 2, 151936, True)
QWEN2_VL_7B = qwen2_vl(3584, 18944, 28, 4, 152064, False)
QWEN2_5_VL_3B = {
    "model_type": "qwen2_5_vl",
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_scaling": MROPE,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
    },
}


def qwen3_vl(hidden: int, intermediate: int, layers: int, heads: int, tied: bool, **vision) -> dict:
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": tied,
            "rope_scaling": INTERLEAVED,
        },
        "vision_config": {
            "num_heads": 16,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            **vision,
        },
    }


SMALL_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
QWEN3_VL_4B = qwen3_vl(2560, 9728, 36, 32, True, **SMALL_TOWER)
QWEN3_VL_8B = qwen3_vl(4096, 12288, 36, 32, False, **LARGE_TOWER)


def build(config: dict) -> torch.nn.Module:
    """A model of this shape without numbers: gigabytes that nobody allocates."""
    config = deepcopy(config)
    shape = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shape, dtype=torch.bfloat16)


def test_qwen2_vl_2b_is_the_published_shape():
    """QWEN2_VL_2B says what the real config.json says. Otherwise its numbers prove nothing."""
    real = TESTS.parent / "../shared/qwen2vl/config.json"
    if not real.is_file():
        pytest.skip("the real configuration file is not beside this project")
    real = json.loads(real.read_text())
    for name, value in QWEN2_VL_2B.items():
        if name == "vision_config":
            assert {key: real[name][key] for key in value} == value
        else:
            assert real[name] == value, name


PUBLISHED = {
    "Qwen2-VL-2B": (QWEN2_VL_2B, [665_271_296, 233_373_696, 1_310_340_608, 0], 73_859_072),
    "Qwen2-VL-7B": (
        QWEN2_VL_7B,
        [675_759_104, 544_997_376, 6_525_621_760, 544_997_376],
        161_480_704,
    ),
}
TOTALS = {
    "Qwen2.5-VL-3B": (QWEN2_5_VL_3B, 3_754_622_976),
    "Qwen3-VL-4B": (QWEN3_VL_4B, 4_437_815_808),
    "Qwen3-VL-8B": (QWEN3_VL_8B, 8_767_123_696),
}


def printed_counts(printed: str) -> list[int]:
    lines = [line for line in printed.splitlines() if line.endswith(" parameters")]
    return [int(line.split()[-2].replace(",", "")) for line in lines]


def adapter_size(model: torch.nn.Module, rank: int) -> int:
    """The weights that peft adds in the language model, as train.py has it."""
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    targets = rf"model\.language_model\..*\.({names})"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets))
    return adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("config", "parts", "lora"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_shapes(script, capsys, config, parts, lora):
    """Parts and memory of the published models. The vision tower is not in the training's memory.

    Otherwise a table that says 5 GB where the GPU needs 9 leads into the error that it should
    prevent.
    """
    model = build(config)
    fixed = script.training_memory(model, 0, True) * 2**30
    script.print_parts(model)
    script.print_memory(model)
    printed = capsys.readouterr().out
    assert printed_counts(printed) == [*parts, sum(parts)]
    with torch.device("meta"):
        assert adapter_size(model, script.LORA_RANK) == lora
    assert fixed == pytest.approx(2 * sum(parts[1:]) + 18 * lora)
    lines = [line for line in printed.splitlines() if " | " in line]
    rows = [[float(cell) for cell in re.findall(r"\d+\.\d", line)] for line in lines]
    assert [len(row) for row in rows] == [0, 4, 4, 4, 4, 4]
    assert sorted(rows[1:]) == rows[1:]
    for with_it, without, small_with_it, small_without in rows[1:]:
        assert with_it < without and small_with_it < small_without
        assert small_with_it < with_it and small_without < without


@pytest.mark.slow
@pytest.mark.parametrize(("config", "total"), TOTALS.values(), ids=TOTALS)
def test_the_other_families(script, capsys, config, total):
    """Qwen2.5-VL and Qwen3-VL: the parts add up, and the memory has LoRA as peft adds it."""
    model = build(config)
    script.print_parts(model)
    *parts, whole = printed_counts(capsys.readouterr().out)
    assert sum(parts) == whole == total
    assert (parts[-1] == 0) == config["tie_word_embeddings"]
    fixed = script.training_memory(model, 0, True) * 2**30
    with torch.device("meta"):
        lora = adapter_size(model, script.LORA_RANK)
    assert fixed == pytest.approx(2 * sum(parts[1:]) + 18 * lora)


@pytest.mark.parametrize(("config", "gib"), [(QWEN2_VL_2B, 1.06), (QWEN2_VL_7B, 5.2)])
def test_memory_of_4_bits(script, monkeypatch, config, gib):
    """Weights of the language model in 4 bits, as bitsandbytes keeps them; the head stays whole."""
    monkeypatch.setattr(script, "BYTES_PER_TRAINED", 0)
    needed = script.training_memory(build(config), 0, True, four_bits=True)
    assert needed == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize(("free", "largest"), [(2.0, "none"), (5.0, "4"), (80.0, "16")])
def test_batch_sizes_that_fit(script, monkeypatch, capsys, free, largest):
    """The largest batch size that fits the GPU at hand is printed for each setting."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 2**40))
    model = build(QWEN2_VL_2B)
    script.print_memory(model)
    printed = capsys.readouterr().out
    assert f"{free:.1f} GiB are free" in printed
    assert f" checkpointing: {largest}\n" in printed
    if largest != "none":
        assert script.training_memory(model, int(largest), checkpointing=True) <= free
    if largest == "4":
        assert script.training_memory(model, 8, checkpointing=True) > free


def test_gpu_that_cannot_be_used(script, monkeypatch, capsys):
    """A GPU that another process has for itself is named in a line, and the run ends well."""

    def busy():
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    script.print_memory(build(QWEN2_VL_2B))
    assert "The GPU can't be used: CUDA error" in capsys.readouterr().out


# A look at an image


@pytest.fixture
def images(script, monkeypatch, tmp_path):
    """IMAGE_FOLDER with two small images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("2.jpg", "1.jpg"):
        Image.effect_noise((64, 48), 40).convert("RGB").save(folder / name)
    monkeypatch.setattr(script, "IMAGE_FOLDER", str(folder))
    return folder


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A machine that says it has a GPU, which is the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)


def small_model(folder: Path, family: str) -> None:
    """Turn the small Qwen2-VL in `folder` into a model of another family, with random weights."""
    config = json.loads((folder / "config.json").read_text())
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in names}
    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": config["vocab_size"],
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 128,
    }
    processor = AutoProcessor.from_pretrained(folder)
    kind = transformers.Qwen2_5_VLProcessor
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        kind = transformers.Qwen3VLProcessor
        processor.image_processor.patch_size = 16
        processor.video_processor = transformers.Qwen3VLVideoProcessor()
    for file in folder.iterdir():
        file.unlink()
    kind(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=processor.video_processor,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    shape = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    model = AutoModelForImageTextToText.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_caption(script, capsys, model_folder, images, pretended_gpu, family):
    """Each family loads and captions an image by its folder alone."""
    if family != "qwen2_vl":
        small_model(model_folder, family)
    model = script.load()
    script.print_parts(model)
    *parts, total = printed_counts(capsys.readouterr().out)
    assert sum(parts) == total == script.count_parameters(model) and min(parts[:3]) > 0
    script.print_caption(model)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{images / '1.jpg'}: ") and "No image" not in printed
    # Greedy, and what it says depends on the image
    assert script.caption(model, images / "1.jpg") == script.caption(model, images / "1.jpg")


def test_caption_is_what_the_model_sees(script, monkeypatch, model_folder, images):
    """The prompt is the chat template's, the image reaches the vision tower, upright and small."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as phones write it
    Image.new("RGB", (2000, 1000), "red").save(images / "1.jpg", exif=exif)
    model = script.load()
    seen = {}

    def remember(**inputs):
        seen.update(inputs)
        return torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], dim=1)

    monkeypatch.setattr(model, "generate", remember)
    script.caption(model, images / "1.jpg")
    _, height, width = seen["image_grid_thw"][0].tolist()
    assert height > width and height * 14 <= 644
    assert not seen["do_sample"]
    values = seen["pixel_values"].unique()
    drawing = Image.new("LA", (280, 280), (0, 0))
    drawing.save(images / "1.png")
    script.caption(model, images / "1.png")
    white = seen["pixel_values"].unique()
    assert len(white) <= 3 and white.min() > values.min(), "clear ground is seen as white"
    processor = script.AutoProcessor.from_pretrained(model_folder)
    assert script.QUESTION in processor.decode(seen["input_ids"][0])


def test_why_no_image_is_captioned(script, monkeypatch, capsys, model_folder, images):
    """Without GPU or image, and where either fails, a line says why, and the run ends well."""
    model = script.load()

    def reason() -> str:
        capsys.readouterr()
        script.print_caption(model)
        return capsys.readouterr().out

    assert "no CUDA GPU" in reason()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", out_of_memory)
        assert re.search("though the model is whole: CUDA out of memory", reason())
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    (images / "1.jpg").write_bytes(b"not an image")
    assert "though the model is whole: cannot identify image file" in reason()
    Image.new("1", (100, 100)).save(images / "1.jpg", "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert "though the model is whole: Image size (10000 pixels) exceeds" in reason()
    shutil.rmtree(images)
    assert "holds none. data2csv.py downloads some" in reason()


# Consoles


class Notebook(io.StringIO):
    """A stream as Jupyter has it: no file behind it, no encoding that could be changed."""

    reconfigure = property()  # reading it raises AttributeError

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


@pytest.mark.parametrize("stream", [Notebook, lambda: None], ids=["notebook", "pythonw"])
def test_consoles_that_are_no_terminal(script, monkeypatch, model_folder, stream):
    """%run in a notebook and pythonw, which has no console at all, work."""
    record_as_whole(script)
    monkeypatch.setattr(script, "handle_stop_signals", lambda handler: None)
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    script.main()
    if isinstance(sys.stdout, Notebook):
        assert "is complete" in sys.stdout.getvalue()
