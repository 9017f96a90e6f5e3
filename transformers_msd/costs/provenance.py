"""Where a figure comes from: what is written beside everything that was measured."""

import subprocess

import torch


def hardware(device: torch.device) -> str:
    """Name the hardware of a device that this process computes on."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Name the commit that is checked out in the working directory."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"
