"""bench.py: the recipe it compares with is a fair opponent, the arithmetic is within its targets, the table for a card
can be made. What takes minutes (--tiny) isn't run here."""

import json
import subprocess
import sys

import bench
import pytest
import torch
from support.launch import load
from tools import flops, recipes


def test_the_documented_recipe_learns_the_same_captions(tmp_path, monkeypatch):
    """Guards the comparison: an opponent that sees another prompt, picture or label would prove nothing."""
    bench.write_data(tmp_path, 3)
    records = json.loads((tmp_path / "data_1.json").read_text(encoding="utf-8"))
    train = load("train.py", [])
    monkeypatch.setattr(train, "MODEL_FOLDER", str(bench.TINY))
    monkeypatch.setattr(train, "DATA_JSON", str(tmp_path / "data_1.json"))
    processor, config = train.load_processor()
    torch.manual_seed(0)
    model = train.load_model("cpu", torch.float32).eval()
    documented = [recipes.documented_sample(record, processor) for record in records]
    documented = recipes.DocumentedCollator(processor.tokenizer, padding=True)(documented)

    def own():
        samples = train.share_prompts(
            [train.parse_record(record, processor) for record in records], train.MAX_LENGTH
        )
        batch = train.CaptionCollator(processor, config)(samples)
        return {name: tensor for name, tensor in batch.items() if name != "names"}

    with torch.no_grad():
        theirs = model(**documented).loss.item()
        ours = model(**own()).loss.item()
        # the recipe ends an answer with <|endoftext|> where the chat template has <|im_end|>; else they are the same
        monkeypatch.setattr(train, "end_of_turn", "<|endoftext|>")
        assert model(**own()).loss.item() == pytest.approx(theirs, abs=1e-4)
    assert abs(ours - theirs) > 1e-3, "the end token is part of the loss"


def test_arithmetic_of_the_real_shape():
    """Guards the step: a vision tower in the graph, logits of the prompt or a picture a caption cost this much more."""
    train = load("train.py", [])
    documented = sum(flops.count_flops(train, "documented", 1, True).values()) / 1e12
    plain = flops.count_flops(train, "train.py", 1, False)
    shared = sum(flops.count_flops(train, "train.py", 5, False).values()) / 1e12
    assert 10.9 < documented < 11.4
    assert sum(plain.values()) / 1e12 <= 5.5
    assert shared / 4 / 5 <= 0.36
    assert (
        plain["head"] == 4 * 4 * flops.CAPTION_TOKENS * 1536 * 151936
    )  # 4 pictures; forward and backward


def test_table_for_a_card_as_a_dry_run():
    """Guards the command that only a machine with a card runs: each variant trains, is timed and counted.

    A run that starts with captions is none of that: it fails, and so does the table.
    """
    runs = [bench.Run("documented", accumulation=1, steps=1, count=True)]
    runs += [bench.Run("train.py", captions=5, batch=2, accumulation=2, steps=1, count=True)]
    rows, rate = bench.gpu_table(runs, shape={}, rounds=1)
    assert rate > 0
    assert [(row["variant"], row["layout"], row["captions a picture"]) for row in rows] == [
        ("documented", "4x1", 1),
        ("train.py", "2x2", 5),
    ]
    assert [float(row["estimate, GiB"].replace("-", "0")) > 0 for row in rows] == [False, True]
    for row in rows:
        assert float(row["samples/s"]) > 0 and float(row["share of matmul rate"].rstrip("%")) > 0
    assert float(rows[1]["captions/s"]) == pytest.approx(5 * float(rows[1]["samples/s"]), abs=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so():
    """Guards the answer to a command that can't work: one sentence, no traceback, no empty table."""
    command = [sys.executable, bench.__file__, "--gpu"]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert ended.returncode != 0 and ended.stdout == ""
    assert ended.stderr.strip() == "--gpu needs a CUDA card, and torch finds none on this machine."
