"""The four scripts read as if by one hand: what has one name in several of them is one text."""

import ast
from itertools import combinations
from pathlib import Path

import pytest
from conftest import TESTS

SCRIPTS = ["data2csv.py", "csv2json.py", "load_model.py", "train.py"]
# What may differ under one name, and why
DIFFERENT = {
    "main": "each script tells its own story",
    "WORD": "csv2json.py counts words for its summary, train.py splits them as COCO's scores do",
    "IMAGE_FORMATS": "data2csv.py takes what COCO's hosts serve, the others what users have",
    "CACHE_FOLDER": "each script keeps its own things, which can be deleted apart",
    "DOWNLOAD_THREADS": "data2csv.py fetches many small files, load_model.py a few of gigabytes",
    "Pixels": "a rule for the preview's sides in data2csv.py, for an image's area in train.py",
    "ImageSide": "load_model.py counts whole image tokens, train.py takes the next multiple",
    "Texts": "load_model.py refuses a pattern without a letter",
    "read_rows": "of the hub's table in data2csv.py, of the user's in csv2json.py",
    "check_proxy": "data2csv.py looks at the proxy that a request failed on, load_model.py before",
    "find_damage": "of a model's files in load_model.py, of a checkpoint in train.py",
}
IN_ALL = {"check_path", "check_constants", "prepare_console", "handle_stop_signals"}


def read_names(script: str) -> dict[str, str]:
    """Return each function and class of a script as its source, each constant as its default."""
    source = (TESTS.parent / script).read_text(encoding="utf-8")
    names = {}
    for part in ast.parse(source).body:
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
            # comments included
            lines = source.splitlines()[first - 1 : part.end_lineno]
            names[part.name] = "\n".join(lines)
        elif isinstance(part, ast.AnnAssign | ast.Assign):
            target = part.target if isinstance(part, ast.AnnAssign) else part.targets[0]
            default = ast.unparse(part.value)
            # MODEL_FOLDER = MODEL_ID stands for what MODEL_ID is
            names[ast.unparse(target)] = names.get(default, default)
    return names


def follows_the_conventions(script: str) -> bool:
    """Tell whether a script has its constants checked by their rules."""
    return "TypeAdapter(" in read_names(script).get("check_constants", "")


CONVERTED = [script for script in SCRIPTS if follows_the_conventions(script)]


@pytest.mark.parametrize(("one", "other"), list(combinations(CONVERTED, 2)))
def test_what_has_one_name_is_one_text(one, other):
    """Functions, classes and constants of one name are the same, comments and defaults included.

    Otherwise a reader of the second script has to read them again, and a fault is repaired once.
    """
    ours, theirs = read_names(one), read_names(other)
    for name in sorted(ours.keys() & theirs.keys() - DIFFERENT.keys()):
        assert ours[name] == theirs[name], f"{name} differs between {one} and {other}"


@pytest.mark.parametrize("script", CONVERTED)
def test_what_all_scripts_share_is_there(script):
    """Constants, paths, consoles and signals are handled by the same functions in all scripts."""
    assert set(read_names(script)) >= IN_ALL


def test_exceptions_are_still_needed():
    """What is listed as different does differ somewhere. Otherwise the list would hide a fault."""
    for name, reason in DIFFERENT.items():
        texts = {read_names(script).get(name) for script in CONVERTED} - {None}
        assert len(texts) > 1, f"{name} ({reason}) is one text"


def test_the_scripts_that_follow_the_conventions():
    """At least these two; the others are compared as soon as they have check_constants, too."""
    assert {"csv2json.py", "train.py"} <= set(CONVERTED)
    assert all(Path(TESTS.parent / script).is_file() for script in SCRIPTS)
