"""test_gpu.py, rehearsed on a CPU: it must not be wrong in ways that only a GPU would show."""

import os
import subprocess
import sys

import pytest
from conftest import TESTS


@pytest.mark.slow
def test_every_test_for_a_gpu_runs_through_on_a_cpu():
    """Each test of test_gpu.py passes with a small model on a CPU.

    Otherwise whoever has a GPU finds a mistake of the test in place of one of train.py.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "test_gpu.py"],
        env={**os.environ, "REHEARSE_GPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-3000:]
