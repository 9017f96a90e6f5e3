"""Drafts and targets on other devices, on one or apart: the same tokens as on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch


TESTS = Path(__file__).parent
SECOND_DEVICE = TESTS.parents[1] / "shared/tools/second_device"


@pytest.mark.skipif(not SECOND_DEVICE.exists(), reason="needs ../shared")
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs a compiler")
def test_tokens_on_other_devices_equal_plain_generate() -> None:
    command = [sys.executable, "-W", "ignore", str(TESTS / "other_devices.py"), str(SECOND_DEVICE)]
    # Built once for each torch; whoever was killed while it built has left a lock that nobody would ever open.
    folder = Path(tempfile.gettempdir(), f"second_device_{torch.__version__}")
    folder.mkdir(exist_ok=True)
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            lock.unlink()
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_cases"] > 100
    assert result["faults"] == {}
