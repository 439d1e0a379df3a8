"""Run one of the project's scripts with constants set from outside, its code unmodified.

    python tests/support/launch.py train.py EPOCHS=1 'MODEL_FOLDER="some/folder"'

The script is looked for in the current folder, then in the project's. Values are JSON. A name that
the script does not define is an error, so that a renamed constant cannot leave a test running on
the default.
"""

import importlib.util
import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def load(script: str, assignments: list[str]):
    """Import `script` under its stem and set the constants of `assignments` ("NAME=JSON")."""
    path = Path(script) if Path(script).is_file() else PROJECT / script
    if not path.is_file():
        raise SystemExit(f"{script}: no such script, neither here nor in {PROJECT}.")
    sys.path.insert(0, str(path.resolve().parent))  # a spawned worker imports the module by name
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name.isupper() or not hasattr(module, name):
            raise SystemExit(f"{assignment}: {path.name} has no constant named {name}.")
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{assignment}: the value is not JSON ({error}).") from None
        setattr(module, name, like(getattr(module, name), value))
    return module


def like(default, value):
    """JSON knows no tuples and no paths: give `value` the type that the constant has."""
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, Path) and isinstance(value, str):
        return Path(value)
    return value


# A spawned worker imports this file as "__mp_main__" with the same arguments: the same constants.
if __name__ in ("__main__", "__mp_main__"):
    if len(sys.argv) < 2:
        raise SystemExit("Usage: python tests/support/launch.py SCRIPT.py NAME=JSON ...")
    script_module = load(sys.argv[1], sys.argv[2:])

if __name__ == "__main__":
    script_module.main()
