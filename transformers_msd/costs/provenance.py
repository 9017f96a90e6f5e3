"""Where a figure comes from: what is written beside everything that was measured."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def hardware(device: torch.device, num_devices: int = 1) -> str:
    """Name the hardware that computes: so many devices of one kind, or the CPU that all processes share."""
    if device.type == "cuda":
        return f"{num_devices} x {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"CPU {_cpu_name()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"
    return f"{num_devices} x {device.type.upper()}"


def _cpu_name() -> str:
    """Return the name of the CPU; of its kind, where the system does not tell."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Name the commit that is checked out in the working directory."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"
