"""Where a figure comes from: what is written beside everything that was measured."""

import subprocess

import torch


def hardware() -> str:
    """Name the hardware that this process computes on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """Name the commit that is checked out in the working directory."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"
