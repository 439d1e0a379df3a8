"""train.py, judging: scores and their intervals, captions before and after, report, model card."""

import html
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from support.page import Page
from support.training import MARKER, about, draw_scene, make_samples, record

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # double precision has none


def said(train, *texts: str) -> list:
    return [train.Caption(text, ended=True) for text in texts]


def score(train, references: list[list[str]], *texts: str) -> dict[str, float]:
    """Return the scores of captions, one for each image."""
    return train.Scores(references).score(said(train, *texts))[0]


# ---- Scores

# Captions, each with three references. The official numbers below come from one run of
# pycocoevalcap 1.2 with its Java tokenizer (PTBTokenizer of Stanford CoreNLP 3.4.1, OpenJDK 17):
#     tokenizer = PTBTokenizer()
#     people, said = tokenizer.tokenize(references), tokenizer.tokenize(captions)
#     Cider().compute_score(people, said), Bleu(4).compute_score(people, said), Rouge()...
OFFICIAL = {"CIDEr": 2.1213729819685088, "BLEU-4": 0.3172996067221177, "ROUGE-L": 0.698358816005806}
SENTENCES = {
    "A man riding a wave on top of a surfboard.": [
        "A surfer rides a large wave in the ocean.",
        "A man on a surfboard riding a wave.",
        "Man surfing on a big, breaking wave!",
    ],
    "a kitchen with a stove, a sink and a refrigerator": [
        "A kitchen with a refrigerator, stove and sink.",
        "The kitchen has a stove next to a sink.",
        "A small kitchen with white appliances",
    ],
    "Two dogs playing with a frisbee in the grass.": [
        "Two dogs are playing with a frisbee.",
        "A pair of dogs run after a Frisbee in a grassy field.",
        "dogs playing in the grass",
    ],
    "a red bus driving down a street": [
        "A red bus is driving down the street.",
        "A bus in London: red, with two floors.",
        "The red bus drives past a row of shops.",
    ],
    "A cat that is sitting on a couch.": [
        "A cat sitting on top of a couch.",
        "The cat is awake; it looks at the camera.",
        "a grey cat on a sofa",
    ],
    "A stop sign on the corner of a street": [
        'A sign that says "STOP" on a street corner.',
        "Red stop sign, with trees behind it...",
        "A stop sign at an intersection.",
    ],
    "a group of people standing on a snowy slope": [
        "A group of skiers stands on a snowy slope.",
        "People on skis at the top of a mountain.",
        "Several people standing in the snow",
    ],
    "A bathroom with a toilet and a sink.": [
        "A bathroom with a toilet, sink, and mirror.",
        "White toilet beside a sink in a bathroom",
        "A small bathroom has a toilet and a tub.",
    ],
    "a train on a track near a platform": [
        "A train is stopped at the platform of a station.",
        "A passenger train pulling into a train station.",
        "The train on track 4",
    ],
    "A woman holding a tennis racket on a court.": [
        "A woman is holding a tennis racquet on a tennis court.",
        "Woman playing tennis, about to serve.",
        "A female tennis player swings her racket.",
    ],
    "a bunch of bananas hanging from a tree": [
        "A bunch of green bananas hangs from the tree.",
        "Bananas growing on a tree.",
        "several bunches of unripe bananas",
    ],
    "A young boy flying a kite at the beach.": [
        "A boy flies a kite on the beach.",
        "Is that a kite? A boy holds its string.",
        "a child with a kite near the ocean",
    ],
}
REFERENCES = list(SENTENCES.values())


def test_scores_are_the_official_ones(train):
    """CIDEr, BLEU-4 and ROUGE-L agree with COCO's own program, its Java tokenizer included.

    Otherwise nobody could compare them with published numbers.
    """
    found = score(train, REFERENCES, *SENTENCES)
    assert found["CIDEr"] == pytest.approx(OFFICIAL["CIDEr"], abs=0.0015)
    assert found["BLEU-4"] == pytest.approx(OFFICIAL["BLEU-4"], abs=0.0005)
    assert found["ROUGE-L"] == pytest.approx(OFFICIAL["ROUGE-L"], abs=0.0005)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_reference_counts(train, place):
    """A caption that equals any of its references scores. Otherwise four fifths are ignored."""
    captions = [references[place] for references in REFERENCES]
    found = score(train, REFERENCES, *captions)
    assert found["BLEU-4"] == pytest.approx(1) and found["ROUGE-L"] == pytest.approx(1)
    assert found["exact match"] == 1 and found["CIDEr"] > 2
    alone = score(train, [references[:1] for references in REFERENCES], *captions)
    assert (alone["BLEU-4"] > 0.99) == (place == 0)


def test_scores_compare_image_by_image(train):
    """Captions are compared with the references of their own image, and counted by hand."""
    references = [["a cat on a mat", "a feline"], ["Two dogs, in the snow!"]]
    captions = said(train, "A cat on a mat.")
    captions.append(train.Caption("two dogs in the snow", ended=False))
    found, ciders = train.Scores(references).score(captions)
    assert (found["BLEU-4"], found["ROUGE-L"]) == (pytest.approx(1), pytest.approx(1))
    assert found["CIDEr"] > 5 and found["CIDEr"] == pytest.approx(sum(ciders) / 2)
    assert all(value > 4 for value in ciders), "each caption has its own"
    assert (found["words per caption"], found["ended by itself"]) == (5, 0.5)
    assert found["exact match"] == 0, "letter for letter"
    swapped, _ = train.Scores(references[::-1]).score(captions)
    assert swapped["CIDEr"] < 0.1 and swapped["BLEU-4"] < 0.1


def test_captions_that_repeat_each_other_are_counted(train):
    """A model that says the same about every image is found out."""
    references = [["a red star"], ["a blue circle"], ["a green star"], ["a pink square"]]
    assert score(train, references, "a star", "a star", "a square", "a star")["repeated"] == 0.75
    assert score(train, references, "a", "b", "a", "d")["repeated"] == 0.5
    assert score(train, references, "a", "b", "c", "d")["repeated"] == 0
    # the same answer to two questions about an image is none that another image got
    of_two_images = train.Scores(references, ["one", "one", "two", "two"])
    assert of_two_images.score(said(train, "a", "a", "b", "c"))[0]["repeated"] == 0
    assert of_two_images.score(said(train, "a", "b", "a", "c"))[0]["repeated"] == 0.5


def test_labels_are_judged_by_exact_match(train):
    """References of one to three words make exact match the headline, all longer ones CIDEr."""
    labels = [["cat"], ["dog"], ["two dogs"]]
    assert train.Scores(labels).headline == "exact match"
    found = score(train, labels, "cat", "dog", "dogs")
    assert found["exact match"] == pytest.approx(2 / 3) and "BLEU-4" not in found
    assert train.Scores([["a red car here"], ["a blue bus there"]]).headline == "CIDEr"


@pytest.mark.parametrize(
    ("reference", "caption"),
    [("cafe\u0301", "caf\u00e9"), (" cat\n", "cat"), ("\u1112\u1161\u11ab", "\ud55c")],
)
def test_a_label_matches_however_it_is_written(train, reference, caption):
    """One letter in two parts, or blanks at the ends, still match: so the model gives it back."""
    found = score(train, [[reference], ["dog"]], caption, "dog")
    assert found["exact match"] == 1


# What people write, one image each; a caption that repeats the first reference is perfect
LANGUAGES = {
    "Chinese": [["一只猫在垫子上。"], ["两只狗在雪地里跑。"]],
    "Japanese": [["猫がマットの上にいます。"], ["二匹の犬が雪の中を走っている。"]],
    "kana": [["ねこがねている"], ["いぬがはしる"]],
    "Korean": [["고양이가 매트 위에 있다"], ["개 두 마리가 눈 속을 달린다"]],
    "Thai": [["แมวอยู่บนเสื่อ"], ["สุนัขสองตัววิ่งในหิมะ"]],
    "Hindi": [["एक बिल्ली चटाई पर बैठी है"], ["दो कुत्ते बर्फ में दौड़ रहे हैं"]],
    "Tamil": [["ஒரு பூனை பாயில் உள்ளது"], ["இரண்டு நாய்கள் பனியில் ஓடுகின்றன"]],
    "Arabic with vowels": [["قِطَّةٌ عَلَى الحَصِيرَةِ الحمراء"], ["كلبان يركضان في الثلج"]],
    "Vietnamese": [["một con mèo trên tấm thảm"], ["hai con chó chạy trong tuyết"]],
    "LaTeX": [[r"\frac{a}{b} + c = d"], [r"x^{2} - y_{1} < \sum_{i} z_i"]],
    "emoji": [["🐈"], ["🐕🐕"]],
    "signs": [["..."], ["!!!"]],
    "labels": [["cat"], ["dog"], ["cat"]],
    "numbers": [["7"], ["12"], ["7"]],
    "one image": [["a cat on a mat"]],
    "equal references": [["a cat on a mat"], ["A cat on a mat."]],
    "equal references, one twice": [["a cat on a mat"], ["A cat on a mat.", "a cat on a mat"]],
    "all words everywhere": [["a dog", "a cat"], ["a dog"]],
    "first short, then long": [
        ["a cat", "a very large cat sits on a mat in the hall"],
        ["a dog", "two small dogs run through the deep white snow"],
    ],
    "words for one image alone": [["🐈"], ["a dog runs in the snow"]],
    "an accent alone": [["\u0301"], ["a\u0301"]],
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_score_is_never_an_error_and_never_a_silent_zero(train, name):
    """Perfect captions have a good value of every score that is shown; the others have a reason.

    Otherwise a perfect model looks useless, or a training ends in its last minute.
    """
    references = LANGUAGES[name]
    scores = train.Scores(references)
    perfect, ciders = scores.score(said(train, *[texts[0] for texts in references]))
    for measure in ("CIDEr", "BLEU-4", "ROUGE-L"):
        assert (measure in perfect) != (measure in scores.notes), measure
    assert perfect.get("CIDEr", 1) > 0.5 and len(ciders) == len(references)
    assert perfect.get("BLEU-4", 1) == pytest.approx(1)
    assert perfect.get("ROUGE-L", 1) == pytest.approx(1)
    assert perfect["exact match"] == 1 and scores.headline in perfect
    assert perfect["words per caption"] > 0
    for text in ("", " ", "🐈", "a cat", "一只猫"):
        found, ciders = scores.score(said(train, *[text] * len(references)))
        values = [*found.values(), *ciders]
        assert numpy.isfinite(values).all() and found.keys() == perfect.keys()


def test_why_a_score_means_nothing_is_said(train):
    """The reason fits: no words at all, no difference to tell apart, or too few words."""
    assert "no words" in train.Scores([["\u0301"], ["\u0300"]]).notes["ROUGE-L"]
    assert "differ" in train.Scores([["a cat on a mat"]]).notes["CIDEr"]
    assert "shorter than four words" in train.Scores([["cat"], ["dog"]]).notes["BLEU-4"]
    assert train.Scores(REFERENCES).notes == {}


def test_words_of_every_script(train):
    """Words are what blanks part; where there are none, a letter with its marks is a word."""
    words = {
        "一只猫,在A4纸上": ["一", "只", "猫", "在", "a4", "纸", "上"],
        "ねこ ネコ": ["ね", "こ", "ネ", "コ"],
        "고양이가 있다": ["고양이가", "있다"],
        "एक बिल्ली है": ["एक", "बिल्ली", "है"],
        "อยู่": ["อ", "ยู่"],
        "cafe\u0301 Ärger": ["café", "ärger"],
        "it's 3.5 x_1": ["it", "s", "3", "5", "x", "1"],
        "🐈 ... ": [],
    }
    for text, expected in words.items():
        assert train.find_words(text, prose=True) == expected
    assert train.find_words("x^2 ≠ 🐈!", prose=False) == ["x", "^", "2", "≠", "🐈", "!"]


def test_chinese_captions_agree_in_part(train):
    """Characters count as words. Otherwise nothing Chinese would ever agree but as a whole."""
    references = [["一只猫"], ["两只狗"]]
    found = score(train, references, "一只猫", "一只猫")
    assert 0.5 < found["ROUGE-L"] < 1 and found["words per caption"] == 3
    assert found["CIDEr"] > 0 and found["exact match"] == 0.5


def test_signs_count_in_formulas(train):
    """Where references are no sentences a wrong sign is a wrong word."""
    formulas = [["x + y = z"], [r"\frac{a}{b} \neq c"]]
    right = score(train, formulas, "x + y = z", r"\frac{a}{b} \neq c")
    wrong = score(train, formulas, "x - y = z", r"\frac{a}{b} \leq c")
    assert right["ROUGE-L"] == pytest.approx(1) and wrong["ROUGE-L"] < 0.95
    prose = [["a cat, on a mat."], ["2 + 2 dogs in the snow"]]
    assert score(train, prose, "a cat on a mat", "2 2 dogs in the snow")["ROUGE-L"] == 1


# ---- Intervals


def test_the_interval_holds_the_mean_and_is_the_same_each_time(train, monkeypatch):
    """It is drawn with SEED, holds the mean, and shrinks with the number of images."""
    values = numpy.random.default_rng(1).gamma(2, 0.5, 200).tolist()
    images = range(200)
    low, high = train.interval(values, images)
    mean = sum(values) / len(values)
    assert low < mean < high and (low, high) == train.interval(values, images)
    spread = 1.96 * numpy.std(values) / len(values) ** 0.5  # of a normal distribution
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    few = train.interval(values[:20], images[:20])
    assert few[1] - few[0] > 2 * (high - low)
    # ten questions about each image say no more than one
    assert train.interval(values * 10, [*images] * 10) == pytest.approx((low, high))
    monkeypatch.setattr(train, "SEED", 7)
    assert train.interval(values, images) != (low, high)
    assert train.interval([0.5], ["one.jpg"]) == (0.5, 0.5)


def test_the_gain_has_a_narrower_interval_than_the_scores(train, collator, judge):
    """Base and fine-tuned are compared image by image. Otherwise noise hides a real gain."""
    base = [f"{references[0]} and more" for references in judge.scores.references]
    tuned = [references[0] for references in judge.scores.references]
    results = judge.compare({"base": said(train, *base), "fine_tuned": said(train, *tuned)})
    gain, low, high = results["gain"]
    scores, intervals = results["scores"], results["intervals"]
    assert gain == pytest.approx(scores["fine_tuned"]["CIDEr"] - scores["base"]["CIDEr"])
    assert low < gain < high
    for column in ("base", "fine_tuned"):
        assert intervals[column][0] < scores[column]["CIDEr"] < intervals[column][1]
        assert high - low < intervals[column][1] - intervals[column][0]


# ---- Judge

CAPTIONS = {
    "one.jpg": ["a red star on blue", "one red star in front of a blue ground", "red star, blue"],
    "two.jpg": ["a pink circle on black", "one pink circle"],
    "three.jpg": ["a green square on white", "the square is green"],
    "four.jpg": ["a white triangle on a purple ground", "a triangle"],
}


@pytest.fixture
def judge(train, exact, collator, image_folder, tmp_path, monkeypatch):
    """A Judge of four images, with OUTPUT_FOLDER in a place of its own."""
    draw_scene(image_folder / "three.jpg", "square", "green", "white")
    draw_scene(image_folder / "four.jpg", "triangle", "white", "purple")
    records = []
    for name, captions in CAPTIONS.items():
        records += [about(name, caption) for caption in captions]
    rows = make_samples(train, exact, image_folder, *records)
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(tmp_path / "output"))
    monkeypatch.setattr(train, "MAX_NEW_TOKENS", 6)
    (tmp_path / "output").mkdir()
    return train.Judge(train.datasets.Dataset.from_list(rows), collator)


def test_base_captions_are_those_of_the_untouched_model(train, model, judge):
    """The adapter is off for the base, on for the others, and before training changes nothing."""
    untrained = judge.judge(model, trained=False)
    trained = judge.judge(model, trained=True)
    texts = {}
    for name, results in (("untrained", untrained), ("trained", trained)):
        for column in ("base", "base_short", "fine_tuned"):
            texts[name, column] = [row[column]["text"] for row in results["captions"]]
    assert texts["untrained", "fine_tuned"] == texts["untrained", "base"]
    assert texts["trained", "base"] == texts["untrained", "base"]
    assert texts["trained", "fine_tuned"] != texts["trained", "base"]
    assert texts["trained", "base_short"] == texts["untrained", "base_short"]
    with model.disable_adapter():
        direct = train.generate_captions(model, judge.collator, judge.samples, "Captions")
    assert [caption.text for caption in direct] == texts["trained", "base"]
    assert all(text.startswith("The image") for text in texts["trained", "base"])


def test_a_row_of_results_holds_all_that_is_known_of_an_image(train, model, judge):
    """results.json names images with digest and size, references, and each column's caption."""
    results = json.loads(json.dumps(judge.judge(model, trained=True)))
    assert [row["references"] for row in results["captions"]] == list(CAPTIONS.values())
    assert list(results["scores"]) == ["base", "base_short", "fine_tuned"]
    for row, name in zip(results["captions"], CAPTIONS, strict=True):
        [image] = row["images"]
        assert os.path.basename(image["path"]) == name and len(image["digest"]) == 64
        assert (image["height"], image["width"]) == (112, 112)
        for column in results["scores"]:
            assert set(row[column]) == {"text", "ended", "CIDEr"}
    ciders = [row["fine_tuned"]["CIDEr"] for row in results["captions"]]
    assert sum(ciders) / 4 == pytest.approx(results["scores"]["fine_tuned"]["CIDEr"])
    assert [row["question"] for row in results["others"]] == sorted(
        train.OTHER_QUESTIONS * 3, key=train.OTHER_QUESTIONS.index
    )


def test_several_questions_about_an_image_are_one_image(train, judge, model, no_curves):
    """Images are counted as images, and other questions are asked about three of them."""
    again = [
        train.ask_instead(sample, "What colour?", judge.collator.base) for sample in judge.samples
    ]
    table = train.datasets.Dataset.from_list(
        [each for pair in zip(judge.samples, again, strict=True) for each in pair]
    )
    results = train.Judge(table, judge.collator).judge(model, trained=False)
    assert len(results["captions"]) == 8 and results["images"] == 4
    results["step"] = 0
    assert "4 held-out images with 8 questions, step 0" in write_report(train, results)[0]
    asked_about = [row["images"][0]["digest"] for row in results["others"]]
    assert len(set(asked_about)) == 3 and len(asked_about) == 3 * len(train.OTHER_QUESTIONS)


def test_base_captions_are_made_once(train, model, judge, monkeypatch):
    """Evaluations and resumes reuse them. Otherwise each epoch would caption twice as much."""
    first = judge.caption_base(model)
    monkeypatch.setattr(train, "generate_captions", lambda *_: pytest.fail("captioned again"))
    assert judge.caption_base(model) == first


CHANGES = {
    "MAX_NEW_TOKENS": ("MAX_NEW_TOKENS", 3),
    "STYLE_PROMPT": ("STYLE_PROMPT", "In one word."),
    "no STYLE_PROMPT": ("STYLE_PROMPT", None),
    "LOAD_IN_4BIT": ("LOAD_IN_4BIT", True),
}


@pytest.mark.parametrize("what", [*CHANGES, "model", "damaged"])
def test_base_captions_are_those_of_this_model_and_question(train, model, judge, monkeypatch, what):
    """Another model or question is captioned anew. Otherwise the gain is that of another run."""
    judge.caption_base(model)
    if what == "damaged":
        path = f"{train.OUTPUT_FOLDER}/base.json"
        with open(path, "r+", encoding="utf-8") as file:
            file.truncate(40)
    elif what == "model":
        monkeypatch.setattr(judge.collator.features, "rule", "of another model folder")
    else:
        monkeypatch.setattr(train, *CHANGES[what])
    asked = []

    def generate_captions(model, collator, samples, title):
        asked.append(title)
        return said(train, *["new"] * len(samples))

    monkeypatch.setattr(train, "generate_captions", generate_captions)
    captions = judge.caption_base(model)
    assert asked and captions["base"][0].text == "new"


def test_an_image_is_one_question_whatever_its_number_of_rows(train, judge):
    """A question that takes several rows is asked once, and scored with all its references."""
    rows = []
    for sample in judge.samples:
        rows += [{**sample, "references": [text]} for text in ("first", "second", "third")]
    questions = train.held_out_questions(train.datasets.Dataset.from_list(rows))
    assert [question["references"] for question in questions] == [["first", "second", "third"]] * 4


def test_another_question_is_asked_about_all_images(train, exact, collator, model, image_folder):
    """A question of our own sees every image of a sample. Otherwise two images end the run."""
    talk = record(f"{MARKER.format('one.jpg')}{MARKER.format('two.jpg')} The same?", "no")
    [sample] = make_samples(train, exact, image_folder, talk)
    asked = train.ask_instead(sample, "Which is red?", exact)
    assert asked["prompt"].count(exact.processor.image_token_id) == 2 * 16
    batch = collator.make_batch([asked], with_answers=False)
    text = exact.processor.decode(batch["input_ids"][0])
    assert text.replace("<|image_pad|>" * 16, "x16").endswith(
        "user\nWhich is red?<|vision_start|>x16<|vision_end|><|vision_start|>x16<|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    marked = "Is <|vision_start|><|vision_end|> like <|vision_start|><|vision_end|>?"
    assert (
        train.ask_instead(sample, marked, exact)["prompt"].count(exact.processor.image_token_id)
        == 2 * 16
    )
    assert train.generate_captions(model, collator, [asked], "Captions")[0].text


# ---- Report

HARM = "<script>alert(\"1\")</script> & <b>bold</b> 'quoted'"
STATE = {
    "global_step": 4,
    "max_steps": 8,
    "log_history": [
        {"step": 0, "eval_loss": 3.0, "eval_CIDEr": 0.1, "eval_BLEU-4": 0.1, "eval_ROUGE-L": 0.2},
        {"step": 2, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4},
        {"step": 4, "loss": 1.0, "grad_norm": float("nan"), "learning_rate": 5e-5},
        {"step": 4, "eval_loss": 2.0, "eval_CIDEr": 1.1, "eval_BLEU-4": 0.3, "eval_ROUGE-L": 0.4},
    ],
}
RUN = {"constants": {"EPOCHS": 2, "OUTPUT_FOLDER": HARM}, "versions": {"torch": "2.14.1"}}


@pytest.fixture
def no_curves(train, monkeypatch):
    """Leave out the curves, which take a second to draw."""
    monkeypatch.setattr(train, "draw_curves", lambda results, state: "")


def write_report(train, results: dict) -> tuple[str, Page]:
    path = train.write_report(results, SimpleNamespace(**STATE), RUN)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def results(train, judge):
    """Results in which one caption is perfect, and another one holds HTML."""
    columns = {
        "base": said(train, "The image shows a star", "The image shows", HARM, "The image"),
        "fine_tuned": said(train, "a red star on blue", "a pink star", HARM, "a triangle"),
    }
    results = judge.compare(columns)
    results["others"] = [{**results["captions"][0], "base": "yes", "fine_tuned": HARM}]
    results["step"] = 4
    return results


def test_the_report_is_one_file_that_shows_it_all(train, results):
    """Images, captions, scores, curves and settings are in it, and nothing is fetched or run."""
    text, page = write_report(train, results)
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    # all four images three times: best, worst and all; and one with another question
    assert len(images) == 4 * 3 + 1
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe"} and "svg" in tags
    assert not re.search(r"""(src|href)=["']?https?:""", text)
    for row in results["captions"]:
        for column in ("base", "fine_tuned"):
            assert row[column]["text"] in page.cells
        assert any(all(each in cell for each in row["references"]) for cell in page.cells)
    for scores in results["scores"].values():
        for value in scores.values():
            assert any(f"{value:.3f}" in cell for cell in page.cells)
    assert "CIDEr" in page.cells and "rewards words that distinguish" in text
    low, high = results["intervals"]["fine_tuned"]
    assert f"({low:.2f} to {high:.2f})" in text
    assert "EPOCHS" in page.cells and "2.14.1" in page.cells
    assert train.describe_results(results) in html.unescape(text)


def test_the_report_escapes_what_others_wrote(train, results, no_curves):
    """Captions, references, questions and constants are text. Otherwise a caption runs as code."""
    results["captions"][1]["references"] = [HARM]
    results["captions"][2]["question"] = HARM
    results["captions"][3]["images"][0]["path"] = f"{HARM}.jpg"
    text, page = write_report(train, results)
    assert "<script" not in text and "<b>bold</b>" not in text
    assert page.cells.count(HARM) >= 4, "caption, reference, question, constant"
    assert any(f"{HARM}.jpg" in cell for cell in page.cells), "the name of an image that is gone"


def test_the_curves_have_names(train, results):
    """Loss, scores, rate and gradient over the steps, and how long captions are."""
    text, _ = write_report(train, results)
    drawn = re.findall("<!-- (.*?) -->", text)  # matplotlib notes beside the outlines what it drew
    for label in ("loss", "held-out loss", "CIDEr", "BLEU-4", "ROUGE-L"):
        assert label in drawn
    assert {"learning rate", "gradient norm", "words per caption", "references"} <= set(drawn)


def test_words_that_people_used_are_marked(train):
    """Words of any reference are marked, letters of other scripts too, and nothing is lost."""
    marked = train.mark_words_of("Two <dogs> in 雪地", ["Dogs IN it", "雪"])
    assert marked == "Two &lt;<b>dogs</b>&gt; <b>in</b> <b>雪</b>地"
    assert train.mark_words_of("", ["a"]) == ""


def test_questions_are_shown_where_they_differ(train, results, no_curves):
    """A column for the question appears only where images are asked different things."""
    _, page = write_report(train, results)
    assert page.cells.count("question") == 1, "above the other questions"
    results["captions"][0]["question"] = "What colour? <|vision_start|><|vision_end|>"
    _, page = write_report(train, results)
    assert page.cells.count("question") == 1 + 3, "and in each gallery"
    assert "What colour?" in page.cells


def test_the_best_and_the_worst_are_shown_first(train, results, no_curves):
    """Galleries go by the CIDEr of the fine-tuned caption, the best from above."""
    text, _ = write_report(train, results)
    best, worst, everything = re.findall(
        r"<h2>(Best five|Worst five|All)</h2>(.*?)</table>", text, re.S
    )
    shown = []
    for heading, table in (best, worst, everything):
        numbers = re.findall(r'<td class="number">([\d.]+)</td>', table)
        shown.append((heading, [float(number) for number in numbers]))
    ciders = [round(row["fine_tuned"]["CIDEr"], 3) for row in results["captions"]]
    assert shown[0] == ("Best five", sorted(ciders, reverse=True))
    assert shown[1] == ("Worst five", sorted(ciders))
    assert shown[2] == ("All", ciders)


@pytest.mark.parametrize("references", [["cat", "dog", "cat", "cow"], ["🐈"] * 4])
def test_scores_that_mean_nothing_are_explained(train, judge, references, capsys, no_curves):
    """Terminal, report and model card say why a score is missing, and none of them fails."""
    judge.scores = train.Scores([[text] for text in references])
    captions = said(train, *references)
    results = judge.compare({"base": captions, "base_short": captions, "fine_tuned": captions})
    results["step"] = 4
    _, page = write_report(train, results)
    train.print_results(results, None)
    printed = capsys.readouterr().out
    for name, reason in results["notes"].items():
        assert (
            any(reason in cell for cell in page.cells) and f"{name} means nothing here" in printed
        )
    assert printed.splitlines()[-1].startswith("exact match 1.000 before, 1.000 now")
    run = {**RUN, "prompt": "?", "size": "112x112 pixels", "constants": {"MODEL_FOLDER": "m"}}
    train.write_model_card(Path(train.OUTPUT_FOLDER), results, run)


def test_samples_are_printed_with_their_references(train, results, capsys, monkeypatch):
    """SAMPLES_SHOWN captions of each column, a table of scores, the headline, and where to look."""
    monkeypatch.setattr(train, "SAMPLES_SHOWN", 2)
    train.print_results(results, "output/report.html")
    lines = capsys.readouterr().out.splitlines()
    assert "base:       The image shows a star" in lines
    assert "fine_tuned: a red star on blue" in lines and "reference:  a red star on blue" in lines
    assert sum(line.startswith("reference:") for line in lines) == 2
    [cider] = [line for line in lines if line.startswith("CIDEr  ")]
    values = [results["scores"][column]["CIDEr"] for column in ("base", "fine_tuned")]
    assert cider.split()[1:] == [f"{value:.3f}" for value in values]
    assert lines[-2] == train.describe_results(results) and "95 % interval" in lines[-2]
    assert lines[-1] == "See output/report.html"


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), KeyError("Exif")])
def test_an_image_that_was_damaged_is_named_in_the_report(train, monkeypatch, error):
    """Pillow raises a dozen kinds of errors, and none of them may end a training."""

    def fail(*_):
        raise error

    monkeypatch.setattr(train, "open_image", fail)
    shown = train.make_thumbnail({"path": "a.jpg", "height": 56, "width": 56})
    assert shown.startswith("<p>a.jpg (")


@pytest.mark.parametrize("fault", ["full disk", "report in use", "SwanLab"])
def test_what_is_for_looking_never_ends_a_training(
    train, results, monkeypatch, capsys, fault, no_curves
):
    """A report that can't be written, or SwanLab's error, is said and tried again later."""

    def fail(*_):
        raise {"SwanLab": RuntimeError("no answer")}.get(fault, OSError(28, "No space left"))

    if fault == "full disk":
        monkeypatch.setattr(train.os, "fsync", fail)
    elif fault == "report in use":
        os.mkdir(f"{train.OUTPUT_FOLDER}/report.html")
    else:
        monkeypatch.setattr(train, "log_samples", fail)
    train.show_results(results, SimpleNamespace(**STATE), RUN)
    printed = capsys.readouterr().out
    start = "SwanLab does not take the samples" if fault == "SwanLab" else "report.html can't be"
    assert any(line.startswith(start) for line in printed.splitlines())
    assert train.describe_results(results) in printed
    assert not [name for name in os.listdir(train.OUTPUT_FOLDER) if name.endswith(".tmp")]


# ---- Model card


def test_the_model_card_says_how_to_ask(train, monkeypatch, results, tmp_path):
    """README.md beside the adapter has base model, scores, prompt, size and settings, no paths."""
    monkeypatch.setattr(train, "MODEL_FOLDER", "/home/li/Qwen/Qwen2-VL-2B-Instruct")
    constants = {"MODEL_FOLDER": train.MODEL_FOLDER, "CAPTION": "/home/li/new", "EPOCHS": 2}
    prompt = "<|im_start|>user\nDescribe it.<|im_end|>\n"
    run = {**RUN, "constants": constants, "prompt": prompt, "size": "112x112 pixels"}
    train.write_model_card(tmp_path, results, run)
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[:4] == [
        "---",
        "base_model: Qwen/Qwen2-VL-2B-Instruct",
        "library_name: peft",
        "---",
    ]
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| score | base | fine-tuned |" and table[1] == "|---|---|---|"
    assert {line.count("|") for line in table} == {4}
    cider = [f"{results['scores'][column]['CIDEr']:.3f}" for column in ("base", "fine_tuned")]
    assert f"| CIDEr | {cider[0]} | {cider[1]} |" in table
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table, "one table, without a gap"
    text = " ".join(lines)
    assert "`<|im_start|>user\\nDescribe it.<|im_end|>\\n`" in text and "112x112 pixels" in text
    assert "* EPOCHS: 2" in lines and "* torch: 2.14.1" in lines
    assert "/home/li" not in text, "whoever publishes the adapter publishes this too"
