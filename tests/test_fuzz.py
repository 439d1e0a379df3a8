"""Text that nobody would think of arrives letter for letter, and can't forge a turn.

python -m pytest tests/test_fuzz.py                       1,000 examples per test, always the same
FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz.py    5,000 per test, new ones on every run
"""

import contextlib
import csv
import html
import io
import json
import math
import os
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import launch
from support.page import Page
from support.vocabulary import SPECIAL, real_processor

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
FUZZ = settings(
    max_examples=EXAMPLES or 1000,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SIDE = 56  # pixels of an image's side, which makes it 4 tokens

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
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    Image.effect_noise((SIDE, SIDE), 40).convert("RGB").save(folder / "one.jpg")
    return folder


@pytest.fixture(scope="module")
def csv2json(fuzz_folder):
    """csv2json.py as a module that works in fuzz_folder and drops what it can't use."""
    script = launch.load("csv2json.py", ['ON_BAD_SAMPLE="drop"', "CHECK_THREADS=1"])
    script.CSV_PATH = str(fuzz_folder / "table.csv")
    script.DATA_JSON = str(fuzz_folder / "data_vl.json")
    script.tqdm = lambda checks, **_: checks  # thousands of progress bars
    return script


def must_be_refused(text: str) -> bool:
    return any(token in text for token in SPECIAL) or "\0" in text


def shows_nothing(text: str) -> bool:
    without_ink = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    for letter in text:
        selects_a_form = "\ufe00" <= letter <= "\ufe0f" or "\U000e0000" <= letter <= "\U000e0fff"
        nothing = unicodedata.category(letter) in "Zs Zl Zp Cc Cf" or letter in without_ink
        if not nothing and not selects_a_form:
            return False
    return True


@settings(FUZZ, max_examples=FUZZ.max_examples // 4)  # it takes longer than the others
@given(st.lists(st.tuples(captions | harmless, captions | harmless), min_size=1, max_size=12))
def test_text_through_csv2json(csv2json, fuzz_folder, rows):
    """Text arrives letter for letter or is refused. Otherwise captions change or get lost."""
    table = [("one.jpg", "first", ""), *(("one.jpg", *texts) for texts in rows)]
    with open(csv2json.CSV_PATH, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image_path", "caption", "question"), *table])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        read = csv2json.read_rows()
        csv2json.write_json(csv2json.sort_out(read, csv2json.check_images(read)))
    expected, refused = {}, 0
    for (_, caption, question), row in zip(table, read, strict=True):
        harm = must_be_refused(caption + "\n" + question) or shows_nothing(caption)
        assert row.fault or not harm, f"{row} must not be accepted"
        look_alike = csv2json.SPECIAL_TOKEN.search(caption + "\n" + question)
        assert harm or not row.fault or look_alike, f"{row} is refused"
        refused += bool(row.fault)
        if not row.fault:
            asked = csv2json.PROMPT if shows_nothing(question) else question.strip()
            expected[asked, caption.strip()] = None
    assert printed.getvalue().count("\n  line ") == refused, "each bad row is listed"
    records = json.loads(Path(csv2json.DATA_JSON).read_text(encoding="utf-8"))
    marker = "<|vision_start|>one.jpg<|vision_end|>"
    assert [record["conversations"] for record in records] == [
        [{"from": "user", "value": asked + marker}, {"from": "assistant", "value": answer}]
        for asked, answer in expected
    ]


@pytest.fixture(scope="module", params=["small vocabulary", "real vocabulary"])
def training(request, train, base):
    """train.py with images of 4 tokens, as a module, and its base with one of two vocabularies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "IMAGE_SIZE", SIDE)
        if request.param == "real vocabulary":
            base = base._replace(processor=real_processor(base.processor))
        yield train, base


@contextlib.contextmanager
def an_image_named(name: str, folder: Path):
    """The image under another name as well, where this system takes such a name."""
    path = folder / name.strip().replace("\\", "/")
    made = False
    # too long, in no such folder, or not a name at all
    with contextlib.suppress(OSError, ValueError):
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
def test_conversations_through_the_training(training, fuzz_folder, turns, name):
    """Each answer is learned letter for letter, and special tokens are those of the structure.

    Whatever can't be learned is refused with a reason. Otherwise a caption could forge a turn.
    """
    (train, base), conversation = training, []
    for number, (question, answer) in enumerate(turns):
        question += f"<|vision_start|>{name}<|vision_end|>" * (number == 0)
        conversation.append({"from": "user", "value": question})
        conversation.append({"from": "assistant", "value": answer})
    with an_image_named(name, fuzz_folder):
        try:
            read = train.read_turns({"conversations": conversation})
            images = {}
            for turn in read:
                for marked in train.IMAGE_MARKER.findall(turn.question):
                    path = train.locate_image(marked, fuzz_folder)
                    images[marked] = train.inspect_image(path, base.side)
            examples = train.make_examples(read, images, base)
        except ValueError as reason:
            event("refused")
            assert str(reason)
            return
    event("accepted")
    # nothing accepted is half of a surrogate pair
    json.dumps(conversation, ensure_ascii=False).encode("utf-8")
    assert len(examples) == len(turns)
    tokenizer = base.processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    for number, (example, (_, answer)) in enumerate(zip(examples, turns, strict=True), start=1):
        found = example.prompt + example.answer
        # the system's turn, then two for each question; an image is 4 tokens between its two marks
        expected = dict.fromkeys(SPECIAL, 0)
        expected["<|im_start|>"] = expected["<|im_end|>"] = 1 + 2 * number
        expected["<|vision_start|>"] = expected["<|vision_end|>"] = 1
        expected["<|image_pad|>"] = 4
        assert {token: found.count(ids[token]) for token in SPECIAL} == expected
        # Qwen's tokenizer writes accents as one letter: e and an accent come back as é
        learned = unicodedata.normalize("NFC", answer) + "<|im_end|>"
        assert tokenizer.decode(example.answer) == learned
        assert example.reference == answer


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | broken,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "conversations", "id"]), inner)
    ),
    max_leaves=8,
)


@FUZZ
@given(junk)
def test_records_that_are_anything_at_all(train, record):
    """Whatever JSON can hold is read or refused with a reason, and ends nothing."""
    try:
        turns = train.read_turns(record)
    except ValueError as reason:
        assert str(reason)
        return
    assert all(isinstance(text, str) for turn in turns for text in turn)


@FUZZ
@given(broken, st.booleans())
def test_words_are_found_in_any_text(train, text, prose):
    """Words are parts of the text, in its order, without blanks, which would part them anew."""
    words = train.find_words(text, prose)
    rest = unicodedata.normalize("NFC", text.lower())
    for word in words:
        assert word.split() == [word]
        found = rest.find(word)
        assert found >= 0
        rest = rest[found + len(word) :]


people = st.lists(st.lists(captions, min_size=1, max_size=3), min_size=1, max_size=4)


@pytest.mark.slow
@FUZZ
@given(people, st.lists(captions, min_size=4, max_size=4))
def test_scores_of_any_text(train, references, texts):
    """Scores are numbers, and a perfect caption never has a 0 that nobody explains."""
    scores = train.Scores(references)
    perfect, _ = scores.score([train.Caption(texts[0], True) for texts in references])
    assert perfect["exact match"] == 1 and scores.headline in perfect
    for name in ("CIDEr", "BLEU-4", "ROUGE-L"):
        assert (name in perfect) != (name in scores.notes)
        assert perfect.get(name, 1) > 0
    said = [train.Caption(text, False) for text in texts[: len(references)]]
    found, ciders = scores.score(said)
    assert found.keys() == perfect.keys()
    assert all(map(math.isfinite, [*found.values(), *ciders]))


@FUZZ
@given(captions, st.lists(captions, max_size=3))
def test_marked_captions_keep_every_letter(train, caption, references):
    """Without its marks a caption of the report is what the model said, escaped."""
    marked = str(train.mark_words_of(caption, references))
    assert html.unescape(re.sub("</?b>", "", marked)) == caption
    assert set(re.findall("<[^>]*>?", marked)) <= {"<b>", "</b>"}


@settings(FUZZ, max_examples=FUZZ.max_examples // 4)  # it takes longer than the others
@given(people, captions, captions)
def test_the_report_stays_text(train, tmp_path_factory, references, caption, question):
    """Whatever people or models wrote, the page has the elements of its template and no others."""
    rows = []
    for texts in references:
        said = {"text": caption, "ended": True, "CIDEr": 1.0}
        row = {"images": [], "question": question, "references": texts}
        rows.append({**row, "base": said, "fine_tuned": said})
    others = [{"images": [], "question": question, "base": caption, "fine_tuned": caption}]
    scores = {"CIDEr": 1.0}
    results = {
        "images": len(rows),
        "headline": "CIDEr",
        "step": 1,
        "scores": {"base": scores, "fine_tuned": scores},
        "intervals": {"base": [0, 2], "fine_tuned": [0, 2]},
        "gain": [0.0, -1.0, 1.0],
        "notes": {"BLEU-4": caption},
        "reference_words": 4.0,
        "captions": rows,
        "others": others,
    }
    state = SimpleNamespace(global_step=1, max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda results, state: "")
        patch.setattr(train, "OUTPUT_FOLDER", str(tmp_path_factory.getbasetemp()))
        path = train.write_report(results, state, {"versions": {}, "constants": {"A": caption}})
    text = path.read_bytes().decode("utf-8")
    page = Page(text)
    expected = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr"}
    assert {tag for tag, _ in page.elements} <= expected | {"td", "th", "span", "b", "br"}
    classes = [{}, {"class": "quiet"}, {"class": "number"}, {"lang": "en"}, {"charset": "utf-8"}]
    assert all(attributes in classes for _, attributes in page.elements)
    assert page.cells.count(caption.strip()) >= 2 * len(rows) + 3
