"""train.py on much data: what is done in portions is the same as at once.

tests/tools/scale_train.py measures what COCO's 413,915 captions take.
"""

import json

import pytest
from support.launch import load
from tools.scale_train import with_comment


@pytest.fixture
def train():
    return load("train.py", [])


def make_examples(train, count: int) -> list:
    """Examples of so many images, with two answers for each."""
    examples = []
    for number in range(count):
        image = train.ImageFile(f"{number}.jpg", f"digest {number}", 112, 112)
        for answer in ("a star", "a red star"):
            tokens = list(range(len(answer)))
            examples.append(train.Example((image,), "what?", [1, 2, 3], tokens, answer))
    return examples


def test_a_table_made_in_portions(train, monkeypatch):
    """The table is the same, row by row, in however many portions it is made.

    Otherwise samples are lost or change places where a portion ends.
    """
    examples = make_examples(train, 5)
    whole = train.gather_samples(examples)
    monkeypatch.setattr(train, "PORTION", 2)
    portions = train.gather_samples(examples)
    assert portions.to_list() == whole.to_list()
    assert portions.features == whole.features
    assert portions["references"][:] == [["a star", "a red star"]] * 5


def test_problems_are_counted_of_all_records(train, tmp_path, monkeypatch, capsys):
    """What can't be used is counted of all records, the good ones included."""
    monkeypatch.setattr(train, "ON_BAD_SAMPLE", "drop")
    monkeypatch.setattr(train, "inspect_images", lambda paths, side: {})
    records = [{"conversations": []}, {"conversations": "?"}]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    base = train.Base(None, None, None, None)
    monkeypatch.setattr(train.Base, "side", 28)
    with pytest.raises(SystemExit, match="2 of 2 records of"):
        train.read_examples(str(tmp_path / "data.json"), base)


def test_made_up_images_differ():
    """Two images of the scale measurement differ in content, and both can be opened."""
    import io

    from PIL import Image
    from tools.scale_data2csv import made_up_image

    jpeg = made_up_image((64, 48))
    first, second = (with_comment(jpeg, text) for text in ("1", "2"))
    assert first != second
    for content in (first, second):
        with Image.open(io.BytesIO(content)) as image:
            assert image.convert("RGB").size == (64, 48)
