"""Numbers between the host and a device, and when one waits for the other."""

from typing import Any

import torch


def has_to_wait(device: torch.device) -> bool:
    """Tell whether the host has to wait for a device that it asks for numbers: a CPU has computed them already."""
    return device.type != "cpu"


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if has_to_wait(device):
        torch.accelerator.synchronize(device)


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    Bring numbers of the host to a device, which takes them when it comes to them: the host does not wait.

    Args:
        values (`Any`):
            Numbers in lists, or a tensor on the CPU that nobody changes any more.
        device (`torch.device`):
            Where they are needed.
        dtype (`torch.dtype`, *optional*):
            Their dtype; by default as `torch.as_tensor` has it.
    """
    if torch.compiler.is_compiling():
        return torch.as_tensor(values, dtype=dtype, device=device)  # a constant of the compiled code
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        host = host.pin_memory()  # what is not pinned would be copied at once
    return host.to(device, non_blocking=True)


def keep_rows(tensor: torch.Tensor, kept: list[bool], dim: int = 0) -> torch.Tensor:
    """
    Copy some rows of a tensor, without asking its device how many there are.

    Args:
        tensor (`torch.Tensor`):
            The tensor.
        kept (`list[bool]`):
            Of each row whether it stays.
        dim (`int`, *optional*, defaults to 0):
            The dimension of the rows.
    """
    return tensor.index_select(
        dim, to_device([row for row, stays in enumerate(kept) if stays], tensor.device, torch.long)
    )
