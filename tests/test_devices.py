"""Drafts and targets on other devices, on one or apart: the same tokens as on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch


TESTS = Path(__file__).parent
SECOND_DEVICE = TESTS.parents[1] / "shared/tools/second_device"


pytestmark = [
    pytest.mark.skipif(not SECOND_DEVICE.exists(), reason="needs ../shared"),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs a compiler"),
    pytest.mark.timeout(1200),  # the first builds the device
]


def run(program: str, *arguments: str, **environment: str) -> Any:
    """Run a program with the second device, and return what it prints last."""
    command = [sys.executable, "-W", "ignore", str(TESTS / program), str(SECOND_DEVICE), *arguments]
    # Built once for each torch; whoever was killed while it built has left a lock that nobody would ever open.
    folder = Path(tempfile.gettempdir(), f"second_device_{torch.__version__}")
    folder.mkdir(exist_ok=True)
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            lock.unlink()
    environment = {"PYTHONPATH": str(TESTS.parent), "TMPDIR": str(folder)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "num_cases"), [((), 130), pytest.param(("all",), 190, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_tokens_on_other_devices_equal_plain_generate(arguments: tuple[str, ...], num_cases: int) -> None:
    result = run("other_devices.py", *arguments)
    assert result["num_cases"] > num_cases
    assert result["faults"] == {}


def test_a_round_makes_the_host_wait_twice_at_most(tmp_path: Path) -> None:
    waits = run("host_waits.py", HF_HOME=str(tmp_path))
    assert len(waits) > 50
    assert {name: rounds for name, rounds in waits.items() if not rounds or max(rounds) > 2} == {}
