"""Pictures of a prompt, as a page holds them."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_transforms import to_pil_image


# What `generate` is given of pictures, and of how they are cut up.
PIXELS = ("pixel_values", "image_grid_thw", "image_sizes")
LONGEST_SIDE = 640
# Pictures of more colours are photographs.
MOST_COLOURS = 4096


def data_url(picture: Any) -> str:
    """Write a picture of PIL's, scaled down where it is large, into a URL."""
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind = "JPEG" if picture.getcolors(MOST_COLOURS) is None else "PNG"
    file = io.BytesIO()
    picture.save(file, kind, optimize=True, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def seen_pictures(pixels: dict[str, Any], processor: Any) -> list[Any]:
    """
    Turn what the target is given back into pictures: one for each, of tiles the first, which shows the whole.

    Args:
        pixels (`dict[str, Any]`):
            `pixel_values` of a call, and what says how their patches lie.
        processor (`Any`):
            The processor that made them, or a tokenizer, which makes none.

    Returns:
        `list[PIL.Image.Image]`: None where the values are in an order that is not known here.
    """
    values, making = pixels.get("pixel_values"), getattr(processor, "image_processor", None)
    if not torch.is_tensor(values) or making is None:
        return []
    values = values.detach().float().cpu()
    if values.ndim == 2 and torch.is_tensor(pixels.get("image_grid_thw")):
        values = _from_patches(values, pixels["image_grid_thw"].tolist(), making)
    elif values.ndim == 5 and "image_sizes" in pixels:
        values = values[:, 0]
    elif values.ndim != 4:
        return []
    return [_picture(own, making) for own in values if own.shape[0] == 3]


def _picture(values: torch.Tensor, making: Any) -> Any:
    """Take back the normalisation of values `(3, height, width)`."""
    if getattr(making, "do_normalize", False):
        mean, std = (torch.tensor(own)[:, None, None] for own in (making.image_mean, making.image_std))
        values = values * std + mean
    pixels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return to_pil_image(pixels, do_rescale=False, input_data_format="channels_last")


def _from_patches(values: torch.Tensor, grids: Sequence[Sequence[int]], making: Any) -> list[torch.Tensor]:
    """Join patches in the order of Qwen2-VL: blocks of them that are merged later, the same picture for two times."""
    sizes = [getattr(making, name, None) for name in ("patch_size", "merge_size", "temporal_patch_size")]
    if not all(isinstance(size, int) for size in sizes) or values.shape[1] != 3 * sizes[0] ** 2 * sizes[2]:
        return []
    patch, merged, times = sizes
    pictures, start = [], 0
    for num_times, height, width in grids:
        own = values[start : start + num_times * height * width]
        start += len(own)
        own = own.view(num_times, height // merged, width // merged, merged, merged, 3, times, patch, patch)
        own = own[0].permute(4, 5, 0, 2, 6, 1, 3, 7)[:, 0]
        pictures.append(own.reshape(3, height * patch, width * patch))
    return pictures
