"""README.md: its code captions an image as train.py does, and it names only what exists."""

import ast
import contextlib
import io
import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from conftest import TESTS
from PIL import Image
from support.runs import OUTPUT, SMALL, another, read_results
from test_train_images import AWKWARD, TOO_DEEP, photo, saved  # noqa: F401, photo is a fixture

ROOT = TESTS.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LANGUAGES = dict(zip(["Chinese", "English"], README.split("\n# English\n"), strict=True))
SCRIPTS = ["data2csv.py", "csv2json.py", "load_model.py", "train.py"]
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}
# What README names, and others have made
OTHERS_FILES = {"convert_hf_to_gguf.py"}
OTHERS_VARIABLES = {"HF_ENDPOINT"}
# What the code blocks name, in place of an image of the reader's own
PLACEHOLDER = '"coco_2014_caption/9.jpg"'


def code_blocks(language: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", LANGUAGES[language], re.DOTALL)


def run_code(language: str, folder: Path, image: str) -> tuple[str, dict]:
    """Run README's code in a folder after train.py; return what it printed, and its names."""
    code = "\n".join(code_blocks(language))
    assert code.count(PLACEHOLDER) == 1 and code.count("max_new_tokens=128") == 1
    code = code.replace(PLACEHOLDER, repr(image))
    code = code.replace("max_new_tokens=128", f"max_new_tokens={SMALL['MAX_NEW_TOKENS']}")
    printed, names = io.StringIO(), {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    return printed.getvalue().strip(), names


# ---- Its code


@pytest.fixture(scope="module", params=LANGUAGES)
def code_run(request, undisturbed) -> tuple[str, dict]:
    """What README's code printed of the first held-out image, and its names."""
    folder, _ = undisturbed
    [image] = read_results(folder)["captions"][0]["images"]
    return run_code(request.param, folder, image["path"])


@pytest.mark.slow
def test_its_code_captions_as_the_evaluation_does(code_run, undisturbed):
    """A held-out image gets the caption that results.json has of it."""
    row = read_results(undisturbed[0])["captions"][0]
    assert code_run[0] == row["fine_tuned"]["text"] != row["base"]["text"]


@pytest.mark.slow
@pytest.mark.parametrize("side", [112, 100, None])
def test_its_code_opens_images_as_train_py_does(code_run, train, monkeypatch, side, tmp_path):
    """Turned, transparent, moving images: the same pixels. Otherwise users caption other images."""
    _, names = code_run
    monkeypatch.setattr(train, "IMAGE_SIZE", side)
    monkeypatch.setattr(train, "MAX_PIXELS", 60 * 80)
    monkeypatch.setitem(names["constants"], "IMAGE_SIZE", side)
    monkeypatch.setitem(names["constants"], "MAX_PIXELS", 60 * 80)
    for name, (content, _) in AWKWARD.items():
        path = tmp_path / name
        path.write_bytes(content)
        check_pixels(train, names["open_image"], path)


def check_pixels(train, open_image, path: Path) -> None:
    """Compare a function of README with the one in train.py, at the size that train.py takes."""
    with Image.open(path) as image:
        size = train.model_size(*train.upright_size(image), side=28)
    ours, theirs = train.open_image(str(path), *size), open_image(str(path))
    assert (theirs.mode, theirs.size) == (ours.mode, ours.size), path.name
    assert theirs.tobytes() == ours.tobytes(), path.name


@pytest.mark.slow
def test_its_code_opens_large_photos_as_train_py_does(code_run, train, photo, tmp_path):  # noqa: F811
    """A photo of 12 megapixels is decoded at a fraction of its size, upright or not."""
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "photo.jpg"
        path.write_bytes(saved(photo, "JPEG", quality=92, exif=exif))
        check_pixels(train, code_run[1]["open_image"], path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOO_DEEP)
def test_its_code_refuses_what_train_py_refuses(code_run, tmp_path, name):
    """16 bits of grey would all become white."""
    path = tmp_path / name
    path.write_bytes(TOO_DEEP[name])
    with pytest.raises(ValueError, match="more than 8 bits"):
        code_run[1]["open_image"](str(path))


@pytest.mark.slow
def test_its_code_knows_images_of_unequal_sizes(prepared, run_train, tmp_path):
    """With IMAGE_SIZE = None, too, a held-out image gets the caption of results.json."""
    folder = another(prepared, tmp_path)
    for number, path in enumerate(sorted((folder / "coco_2014_caption").glob("[0-9]*.jpg"))):
        with Image.open(path) as image:
            image.resize((224, 100 + 28 * (number % 5))).save(path)
    done = run_train(folder, IMAGE_SIZE=None, MAX_PIXELS=30 * 28 * 28)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_results(folder)["captions"]
    assert len({(row["images"][0]["height"], row["images"][0]["width"]) for row in rows}) > 1
    for row in rows[:2]:
        said, _ = run_code("English", folder, row["images"][0]["path"])
        assert said == row["fine_tuned"]["text"]


# ---- What it names


def quoted(text: str) -> set[str]:
    """Return what stands between backticks, outside of code blocks."""
    return set(re.findall("`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def constants_of(script: str) -> set[str]:
    return set(re.findall(r"^([A-Z][A-Z0-9_]+): .* = ", SOURCES[script], re.MULTILINE))


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_names_constants_that_exist(language):
    """In upper case it quotes constants of the scripts, and little else."""
    known = set().union(*map(constants_of, SCRIPTS))
    assert {"IMAGE_SIZE", "CSV_PATH", "MODEL_ID", "MAX_DATA_NUMBER"} <= known
    named = set()
    for text in quoted(LANGUAGES[language]):
        named.update(re.findall(r"^([A-Z][A-Z0-9_]{2,})(?: = .*)?$", text))
    assert len(named) > 10
    assert named - known - OTHERS_VARIABLES == set()


@pytest.mark.slow
def test_values_that_it_advises_are_accepted(train):
    """What it quotes as NAME = VALUE passes the rule of that constant."""
    from typing import get_type_hints

    from pydantic import ConfigDict, TypeAdapter
    from support.launch import load

    rules = {}
    for script in SCRIPTS[:3]:
        rules |= get_type_hints(load(script, []), include_extras=True)
    rules |= get_type_hints(train, include_extras=True)
    value = r"\"[^\"]*\"|\[[^\]]*\]|True|False|None|\d[\d.e-]*"
    advised = re.findall(rf"\b([A-Z][A-Z0-9_]+) = ({value})", README)
    advised = [(name, value) for name, value in advised if name in rules]
    assert len(advised) > 5
    for name, value in advised:
        adapter = TypeAdapter(rules[name], config=ConfigDict(strict=True))
        adapter.validate_python(ast.literal_eval(value))


def test_it_names_scripts_that_exist():
    """Scripts of the project, of its tests too, are where README says."""
    named = set(re.findall(r"(?:[\w-]+/)*\w+\.py\b", README)) - OTHERS_FILES
    assert set(SCRIPTS) <= named and "tests/demo.py" in named
    for name in named:
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_it_names_files_that_a_run_makes(undisturbed, tmp_path):
    """What it quotes as a file or a folder is there after the four scripts."""
    folder, _ = undisturbed
    on_request = {f"{OUTPUT.as_posix()}/captions.csv", f"{OUTPUT.as_posix()}/merged/"}
    for text in quoted(README):
        name = re.fullmatch(r"[\w./-]*(?:/|\.(?:json|csv|html|jpg|md|txt))", text)
        if not name or text in on_request:
            continue
        places = [ROOT, folder, folder / OUTPUT, folder / "coco_2014_caption"]
        assert any((place / text).exists() for place in places), text


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_its_links_lead_somewhere():
    """Files, images and headings that it links to exist, and web addresses are safe ones."""
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", README)
    targets = [markdown or tag for markdown, tag in targets]
    assert len(targets) > 10
    for target in targets:
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / name if name else ROOT / "README.md"
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_it_pins_the_versions_of_the_requirements():
    """Each package==version in it is in requirements.txt or in tests/requirements.txt."""
    pins = ""
    for path in (ROOT / "requirements.txt", TESTS / "requirements.txt"):
        pins += path.read_text(encoding="utf-8")
    named = re.findall(r"^[\w-]+==[\d.]+$", README, re.MULTILINE)
    assert len(named) > 5
    for pin in named:
        package, version = pin.split("==")
        pattern = rf"^{package}(\[\w+\])?=={re.escape(version)}(\s|$)"
        assert re.search(pattern, pins, re.MULTILINE), pin


def literals() -> list[str]:
    """Return all texts in the scripts, in pieces where values are filled in."""
    found = []
    for source in SOURCES.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_messages_that_it_explains_are_printed_by_a_script(language):
    """The first column of its table of messages has words of the scripts' own."""
    rows = re.findall(r"^\| (`.*?`) \|", LANGUAGES[language], re.MULTILINE)
    messages = re.findall("`(.*?)`", " ".join(rows))
    assert len(messages) > 5
    texts = literals()
    for message in messages:
        # what the longest piece without a number, a name or an ellipsis has in common with them
        piece = max(re.split(r"\.\.\.|\(|\d+|\S*/\S*|[:.]", message), key=len).strip()
        longest = 0
        for text in texts:
            match = SequenceMatcher(None, piece, text, autojunk=False)
            longest = max(longest, match.find_longest_match().size)
        assert longest >= min(len(piece), 12), message


def test_it_is_finished():
    """No placeholder is left of a number that was to be measured, and tables fit on a screen."""
    assert not re.search(r"@\w+@", README)
    for line in README.splitlines():
        assert not line.startswith("|") or len(line) <= 160, line
