"""The stand-ins themselves: if the hub or the guard did otherwise, no other test would count."""

import hashlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import requests
from conftest import run_script, variables
from support.hub import MODEL_ID, Hub


def test_modelscope_client_takes_and_resumes_a_model(tmp_path):
    """The real client accepts the listing and the files, and Range gives the right bytes."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text('{"a": 1}', encoding="utf-8")
    (model / "sub" / "weights.bin").write_bytes(bytes(range(256)) * 400)
    code = "from modelscope_hub.compat import snapshot_download as get; "
    code += f"get({MODEL_ID!r}, local_dir='m', cache_dir='c')"
    with Hub(None, {MODEL_ID: model}) as hub:
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=variables(hub.environment()), check=True
        )
        rest = requests.get(
            f"{hub.url}/api/v1/models/{MODEL_ID}/repo?FilePath=sub/weights.bin",
            headers={"Range": "bytes=1000-"},
            timeout=5,
        )
        listing = requests.get(f"{hub.url}/api/v1/models/{MODEL_ID}/repo/files", timeout=5).json()
        assert (
            requests.get(f"{hub.url}/api/v1/models/some/thing/repo/files", timeout=5).status_code
            == 404
        )
        assert hub.refusals() == []
    weights = (model / "sub" / "weights.bin").read_bytes()
    assert (tmp_path / "m" / "sub" / "weights.bin").read_bytes() == weights
    assert rest.status_code == 206 and rest.content == weights[1000:]
    assert listing["Data"]["Files"][1]["Sha256"] == hashlib.sha256(weights).hexdigest()


def test_huggingface_client_takes_a_model(tmp_path):
    """The real client accepts the listing, the headers and the redirect of a large file.

    Otherwise tests of downloads from there would test something else than Hugging Face.
    """
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text('{"a": 1}', encoding="utf-8")
    (model / "sub" / "weights.safetensors").write_bytes(bytes(range(256)) * 400)
    code = f"""
import huggingface_hub as hf
for file in hf.model_info({MODEL_ID!r}, files_metadata=True).siblings:
    hf.hf_hub_download({MODEL_ID!r}, file.rfilename, local_dir="m")
"""
    with Hub(None, {MODEL_ID: model}) as hub:
        environment = {**hub.huggingface_environment(), "HF_HUB_DISABLE_TELEMETRY": "1"}
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=variables(environment), check=True
        )
        assert hub.refusals() == []
    for name in ("config.json", "sub/weights.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (model / name).read_bytes()
    large = [path for path in hub.requests if path.startswith("/cdn/")]
    assert large == [f"/cdn/{MODEL_ID}/sub/weights.safetensors"]


def test_guard_refuses_and_remembers(tmp_path):
    """Leaving the machine fails, and is seen even if the error is swallowed.

    Otherwise a test without network proves nothing.
    """
    code = """
import requests, socket
for attempt in (
    lambda: requests.get("http://example.org", timeout=2),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=2),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        attempt()
    except OSError as error:
        print("guard" in str(error))
"""
    with Hub(None) as hub:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=variables(hub.environment()),
            capture_output=True,
            text=True,
        )
        assert run.stdout.split() == ["True", "True", "True"]
        assert len(hub.refusals()) == 3
        url = f"{hub.url}/api/v1/repos/internalAccelerationInfo"
        local = f"import urllib.request; print(urllib.request.urlopen({url!r}).status)"
        run = subprocess.run(
            [sys.executable, "-c", local], env=variables(hub.environment()), capture_output=True
        )
        assert run.stdout.split() == [b"200"] and len(hub.refusals()) == 3


def test_launch_refuses_an_unknown_constant(tmp_path):
    """A constant that isn't there is an error. Otherwise a test runs on the default, unnoticed."""
    (tmp_path / "script.py").write_text("A = 1\ndef main():\n    print(A)\n", encoding="utf-8")
    assert run_script("script.py", tmp_path, {}, A=[2, "é"]).stdout == "[2, 'é']\n"
    run = run_script("script.py", tmp_path, {}, B=2)
    assert run.returncode != 0 and "no constant named B" in run.stderr and run.stdout == ""


def test_launch_sets_constants_in_spawned_workers_too(tmp_path):
    """A spawned worker, which imports the script anew, has the same constants.

    Otherwise a test on Windows would test something else.
    """
    (tmp_path / "script.py").write_text(
        "import json, multiprocessing\nA = 1\n"
        "def work(number):\n    return number * A\n"
        "def main():\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(json.dumps(pool.map(work, [1, 2])))\n",
        encoding="utf-8",
    )
    assert "spawn" in multiprocessing.get_all_start_methods()
    run = run_script("script.py", tmp_path, {}, A=10)
    assert run.returncode == 0 and json.loads(run.stdout) == [10, 20], run.stderr


def test_images_without_number_names_are_enumerated(tmp_path):
    """Any folder can be served: an image whose name is not a number gets an image_id of its own."""
    Path(tmp_path / "captions.csv").write_text(
        "image_path,caption\nb.jpg,one\na.jpg,two\nb.jpg,three\n", "utf-8"
    )
    with Hub(tmp_path) as hub:
        assert {path: number for path, (number, _) in hub.images.items()} == {
            "b.jpg": 1,
            "a.jpg": 2,
        }
