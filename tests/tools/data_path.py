"""What it costs train.py to make a batch, and to open images for its pass, on one core.

bench.py --small starts this in a process of its own: python tests/tools/data_path.py MODEL_FOLDER
"""

import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import datasets
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from support.launch import load
from tools.shapes import QWEN2_VL_2B, make_base, make_sample

SAMPLES = 200
IMAGES_PER_STEP = 16
ROUNDS = 5


def photo(width: int, height: int, number: int) -> bytes:
    """Return a JPEG that is as hard to decode as a photograph."""
    noise = Image.effect_noise((width // 4, height // 4), 60).resize((width, height))
    file = io.BytesIO()
    noise.convert("RGB").save(file, "JPEG", quality=92, comment=str(number))
    return file.getvalue()


def time_batches(train: ModuleType, captions: int) -> float:
    """Return the CPU milliseconds of a step's batch: table, kept features, tensors."""
    base = make_base(train, QWEN2_VL_2B, "cpu", torch.bfloat16)
    features = train.KeptFeatures.__new__(train.KeptFeatures)
    features.side, features.dtype, features.rule = base.side, base.dtype, ""
    features.hidden = features.width = base.config.text_config.hidden_size
    samples = []
    rng = random.Random(0)
    for number in range(SAMPLES):
        sample = make_sample(train, base, captions)
        sample["images"][0]["digest"] = str(number)
        # captions of unequal lengths, as people write them
        for answer in sample["answers"]:
            del answer[rng.randrange(8, 12) :]
        samples.append(sample)
        [image] = train.images_of(sample)
        features.write(image, torch.zeros(features.tokens(image), features.width))
    with torch.device("meta"):  # the collator asks it for positions, not for numbers
        model = AutoModelForImageTextToText.from_config(base.config)
    collator = train.Collator(base, features, model)
    loader = torch.utils.data.DataLoader(
        datasets.Dataset.from_list(samples),
        IMAGES_PER_STEP,
        shuffle=True,
        collate_fn=collator,
    )
    list(loader)  # the cache of positions, and the system's of files
    start, batches = time.process_time(), 0
    for _ in range(ROUNDS):
        batches += len(list(loader))
    return 1000 * (time.process_time() - start) / batches


def time_opening(train: ModuleType, width: int, height: int, count: int) -> tuple[float, float]:
    """Return how many images a core inspects, and opens for the tower, per CPU second."""
    processor, config = train.load_processor()
    base = train.Base(processor, config, torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(count):
            path = Path(folder) / f"{number}.jpg"
            path.write_bytes(photo(width, height, number))
            paths.append(str(path))
        start = time.process_time()
        images = list(train.inspect_images(paths, base.side).values())
        inspected = time.process_time()
        for _, future in train.open_ahead(images, base):
            future.result()
        opened = time.process_time()
    return count / (inspected - start), count / (opened - inspected)


def main() -> None:
    """Measure, and print the rows of the table as JSON."""
    torch.set_num_threads(1)
    train = load("train.py", [])
    train.quiet_libraries()
    train.MODEL_FOLDER = sys.argv[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        train.CACHE_FOLDER = folder
        for captions in (1, 5):
            spent = time_batches(train, captions)
            what = f"a batch of {IMAGES_PER_STEP} images with {captions} captions each"
            rows.append({"what": what, "on one core": f"{spent:.1f} ms"})
    for width, height, count in ((640, 480, 200), (4000, 3000, 12)):
        inspected, opened = time_opening(train, width, height, count)
        size = f"{width}x{height}"
        rows.append({"what": f"inspect {size}", "on one core": f"{inspected:.0f} images/s"})
        rows.append({"what": f"open {size}", "on one core": f"{opened:.0f} images/s"})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
