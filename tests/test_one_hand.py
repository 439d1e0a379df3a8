"""The four scripts read as if by one hand: what has one name in several of them is one text."""

import ast
from itertools import combinations

import pytest
from conftest import TESTS

SCRIPTS = ["data2csv.py", "csv2json.py", "load_model.py", "train.py"]
IN_ALL = {"check_path", "check_constants", "prepare_console", "handle_stop_signals"}
OWN = {"main"}  # each script tells its own story


def read_names(script: str) -> dict[str, str]:
    """Return each function and class of a script as its source, each constant as rule and value."""
    source = (TESTS.parent / script).read_text(encoding="utf-8")
    names, values = {}, {}
    for part in ast.parse(source).body:
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
            # comments included
            names[part.name] = "\n".join(source.splitlines()[first - 1 : part.end_lineno])
        elif isinstance(part, ast.AnnAssign | ast.Assign):
            rule = ast.unparse(part.annotation) if isinstance(part, ast.AnnAssign) else ""
            target = part.target if isinstance(part, ast.AnnAssign) else part.targets[0]
            value = ast.unparse(part.value)
            # MODEL_FOLDER = MODEL_ID stands for what MODEL_ID is
            values[ast.unparse(target)] = values.get(value, value)
            names[ast.unparse(target)] = f"{rule} = {values[ast.unparse(target)]}"
    return names


@pytest.mark.parametrize(("one", "other"), list(combinations(SCRIPTS, 2)))
def test_what_has_one_name_is_one_text(one, other):
    """Functions, classes, constants and their rules are the same, comments and values included.

    Otherwise a reader of the second script has to read them again, and a fault is repaired once.
    """
    ours, theirs = read_names(one), read_names(other)
    shared = ours.keys() & theirs.keys() - OWN
    assert shared >= IN_ALL
    differing = [name for name in sorted(shared) if ours[name] != theirs[name]]
    assert differing == [], f"{one} and {other} have these in two forms"


@pytest.mark.parametrize("script", SCRIPTS)
def test_constants_are_what_check_constants_looks_at(script):
    """Every constant between the two lines of dashes has a rule, and nothing else has one.

    Otherwise it is never checked, or something that nobody should change looks as if one could.
    """
    source = (TESTS.parent / script).read_text(encoding="utf-8")
    dashes = [
        number for number, line in enumerate(source.splitlines(), 1) if line == f"# {'-' * 98}"
    ]
    assert len(dashes) == 2
    for part in ast.parse(source).body:
        if isinstance(part, ast.AnnAssign | ast.Assign):
            between = dashes[0] < part.lineno < dashes[1]
            assert between == isinstance(part, ast.AnnAssign), f"{script}, line {part.lineno}"
