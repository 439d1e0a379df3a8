"""The rehearsal: the four scripts one after the other on any machine, without a graphics card and without a network.

    python tests/demo.py                   generated scenes: the small model learns to say "a large red star on blue"
                                           where it used to say "The image shows a large red star in the middle of ..."
    python tests/demo.py --data FOLDER     your own photos: FOLDER/captions.csv with the columns image_path,caption

It starts the stand-in hub of support/hub.py with the pictures and support/tiny_qwen2vl, runs data2csv.py, csv2json.py,
load_model.py and train.py in a new temporary folder, with the constants below set from outside and their code
unmodified, and ends with the scores before | after and the gallery's path. About 2 minutes on 2 cores.
The small model knows scenes only: with --data the way is the same as with the real model, the captions make no sense.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.hub import MODEL_ID, Hub
from support.scenes import all_scenes, write_folder

TESTS = Path(__file__).resolve().parent
SCENES = 280  # pictures, each of another combination: what is held out shows scenes that are never trained on
CONSTANTS = {
    "data2csv.py": {"MAX_DATA_NUMBER": SCENES},
    "csv2json.py": {},
    "load_model.py": {},
    "train.py": {
        "IMAGE_SIZE": 112,  # what the small model was made for
        "TEST_IMAGES": 40,
        "EPOCHS": 15,
        "LEARNING_RATE": 1e-2,  # high, as it suits so small a model
        "SWANLAB_MODE": "local",
        "EVAL_BATCH_SIZE": 20,
    },
}


def run_scripts(folder: Path, hub: Hub, constants: dict[str, dict]) -> None:
    """Run the four scripts in `folder`, their output on this terminal; stop where one fails."""
    # one thread a process: on so small a model more of them wait for each other
    environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **hub.environment()}
    for script, values in constants.items():
        settings = [f"{name}={json.dumps(value)}" for name, value in values.items()]
        print(f"\n===== {script} {' '.join(settings)}", flush=True)
        command = [sys.executable, str(TESTS / "support/launch.py"), script, *settings]
        if code := subprocess.run(command, cwd=folder, env=environment).returncode:
            raise SystemExit(f"{script} failed with exit code {code}; its files are in {folder}")


def exactly_right(results: dict, when: str) -> float:
    """The share of held-out pictures whose caption is, letter for letter, one of those that people gave."""
    rows = results["captions"]
    return sum(row[when]["caption"] in row["human"] for row in rows) / len(rows)


def rehearse(pictures: Path, folder: Path, constants: dict[str, dict]) -> dict:
    """Run everything on the pictures of a folder. Returns what train.py wrote to results.json."""
    with Hub(pictures, {MODEL_ID: TESTS / "support/tiny_qwen2vl"}) as hub:
        constants["data2csv.py"] |= hub.constants("data2csv.py")
        run_scripts(folder, hub, constants)
        if hub.refusals():
            raise SystemExit(f"A script tried to leave this machine: {hub.refusals()}")
    return json.loads((folder / "output/Qwen2-VL-2B/results.json").read_text(encoding="utf-8"))


def main() -> None:
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rehearsal_"))
    constants = {script: dict(values) for script, values in CONSTANTS.items()}
    if len(sys.argv) == 3 and sys.argv[1] == "--data":
        pictures = Path(sys.argv[2])
        if not (pictures / "captions.csv").is_file():
            raise SystemExit(f"{pictures} holds no captions.csv (columns image_path,caption).")
        constants["data2csv.py"]["MAX_DATA_NUMBER"] = None
        constants["train.py"]["TEST_IMAGES"] = 10
    elif len(sys.argv) == 1:
        pictures = folder / "scenes"
        write_folder(pictures, random.Random(0).sample(all_scenes(), SCENES))
    else:
        raise SystemExit("Usage: python tests/demo.py [--data FOLDER]")
    results = rehearse(pictures, folder, constants)
    print(f"\n{'':24}before | after")
    for name, before in results["scores"]["before"].items():
        print(f"{name:20}{before:10.3f} | {results['scores']['after'][name]:.3f}")
    print(
        f"{'exactly right':20}{exactly_right(results, 'before'):10.3f} | {exactly_right(results, 'after'):.3f}"
    )
    print(
        f"{time.monotonic() - start:.0f} s. The gallery: {folder / 'output/Qwen2-VL-2B/report.html'}"
    )


if __name__ == "__main__":
    main()
