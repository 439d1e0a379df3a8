"""The rehearsal: the four scripts one after the other on any machine, without GPU and network.

    python tests/demo.py                   generated scenes: the small model learns to say
                                           "a large red star on blue" where it used to say
                                           "The image shows a large red star in the middle of ..."
    python tests/demo.py --data FOLDER     your own images: FOLDER/captions.csv with the columns
                                           image_path,caption

It starts the stand-in hub of support/hub.py with the images and support/tiny_qwen2vl, and runs
data2csv.py, csv2json.py, load_model.py and train.py in a new temporary folder: their code
unmodified, the constants below set from outside. At the end it prints the scores before and after,
and where the report is. About a minute on 2 cores.

The small model knows scenes only: with --data the way is that of the real model, but the captions
make no sense.
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
OUTPUT = "output/Qwen2-VL-2B"
SCENES = 280  # images, each of another combination: held-out images show scenes never trained on
CONSTANTS = {
    "data2csv.py": {"MAX_DATA_NUMBER": SCENES},
    "csv2json.py": {},
    "load_model.py": {},
    "train.py": {
        "IMAGE_SIZE": 112,  # what the small model was made for
        "TEST_IMAGES": 40,
        "EPOCHS": 7,
        "IMAGES_PER_STEP": 8,
        "LEARNING_RATE": 1e-2,  # high, as it suits so small a model
        "BATCH_SIZE": 8,
        # CIDEr doesn't mind a caption that begins as one person's and ends as another's
        "KEEP": "last",
        # the small model can't answer anything else
        "STYLE_PROMPT": None,
        "OTHER_QUESTIONS": [],
        "SWANLAB_MODE": "local",
    },
}


def run_scripts(folder: Path, hub: Hub, constants: dict[str, dict]) -> None:
    """Run the four scripts in a folder, their output on this terminal; stop where one fails."""
    environment = {
        **os.environ,
        "PYTHONUTF8": "1",
        # on so small a model more threads wait for each other
        "OMP_NUM_THREADS": "1",
        **hub.environment(),
    }
    for script, values in constants.items():
        settings = [f"{name}={json.dumps(value)}" for name, value in values.items()]
        print(f"\n===== {script} {' '.join(settings)}", flush=True)
        command = [sys.executable, str(TESTS / "support/launch.py"), script, *settings]
        if code := subprocess.run(command, cwd=folder, env=environment).returncode:
            raise SystemExit(f"{script} failed with exit code {code}; its files are in {folder}")


def rehearse(images: Path, folder: Path, constants: dict[str, dict]) -> dict:
    """Run everything on the images of a folder; return what train.py wrote to results.json."""
    with Hub(images, {MODEL_ID: TESTS / "support/tiny_qwen2vl"}) as hub:
        constants["data2csv.py"] |= hub.constants("data2csv.py")
        run_scripts(folder, hub, constants)
        if hub.refusals():
            raise SystemExit(f"A script tried to leave this machine: {hub.refusals()}")
    return json.loads((folder / OUTPUT / "results.json").read_text(encoding="utf-8"))


def print_scores(results: dict) -> None:
    """Print the scores of the base model beside those of the fine-tuned one."""
    after = results["scores"]["fine_tuned"]
    print(f"\n{'':24}before | after")
    for name, before in results["scores"]["base"].items():
        print(f"{name:20}{before:10.3f} | {after[name]:.3f}")


def main() -> None:
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rehearsal_"))
    constants = {script: dict(values) for script, values in CONSTANTS.items()}
    if len(sys.argv) == 3 and sys.argv[1] == "--data":
        images = Path(sys.argv[2])
        if not (images / "captions.csv").is_file():
            raise SystemExit(f"{images} holds no captions.csv (columns image_path,caption).")
        constants["data2csv.py"]["MAX_DATA_NUMBER"] = None
        constants["train.py"]["TEST_IMAGES"] = 10
    elif len(sys.argv) == 1:
        images = folder / "scenes"
        write_folder(images, random.Random(0).sample(all_scenes(), SCENES))
    else:
        raise SystemExit("Usage: python tests/demo.py [--data FOLDER]")
    print_scores(rehearse(images, folder, constants))
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} s. The report: {folder / OUTPUT / 'report.html'}")


if __name__ == "__main__":
    main()
