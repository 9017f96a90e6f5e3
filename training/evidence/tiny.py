"""Tiny models of random weights of any architecture of the installed Transformers, and prompts for them."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from training.evidence.tiny_fields import (
    FIELDS,
    FRAMES,
    IDS,
    KINDS,
    LEFT_OUT,
    NUM_FRAMES,
    NUM_ROWS,
    ONES,
    PATCHES,
    SIZES,
    TOWERS,
    VIDEOS,
)


SIZE_OF = {name: size for size, names in SIZES.items() for name in names}
TOWER_SIZE_OF = SIZE_OF | {name: size for size, names in TOWERS.items() for name in names}
FIRST_SPECIAL = min(token_id for token_id in IDS.values() if token_id is not None and token_id > 2)


def model_types() -> dict[str, str]:
    """Map the types of all models that answer in text to the names of their classes."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {name: found if isinstance(found, str) else found[0] for name, found in sorted(names.items())}


def cut(fields: dict[str, Any], size_of: dict[str, int] = SIZE_OF) -> dict[str, Any]:
    """Cut the sizes of a config, and of those inside it, by their names."""
    small = {}
    for name, value in fields.items():
        if name == "layer_types" and value:
            # One layer of each of two kinds, where there are two.
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[0], kinds[-1]]
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict) and ("model_type" in value or name.endswith("config")):
            is_tower = any(part in name for part in ("vision", "vit", "vq", "image"))
            small[name] = cut(value, TOWER_SIZE_OF if is_tower else SIZE_OF)
            if "model_type" in value:
                small[name]["model_type"] = value["model_type"]
        elif name in IDS:
            small[name] = IDS[name]
        elif name == "num_key_value_heads" and "kv_lora_rank" in fields:
            small[name] = SIZE_OF["num_attention_heads"]  # latent attention: as many as of queries
        elif name in size_of and isinstance(value, int) and not isinstance(value, bool):
            small[name] = size_of[name]
        elif name in size_of and isinstance(value, list | tuple) and name.endswith("_size"):
            small[name] = [size_of[name]] * len(value)
        else:
            small[name] = value
    return small


def change(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change fields of a config, and of those inside it; `...` leaves one out."""
    for name, value in changes.items():
        if value is ...:
            fields.pop(name, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict) and name.endswith("config"):
            change(fields[name], value)
        else:
            fields[name] = copy.deepcopy(value)


def make_config(model_type: str) -> PreTrainedConfig:
    """Make the config of a tiny model."""
    config_class = getattr(transformers, model_types()[model_type]).config_class or CONFIG_MAPPING[model_type]
    fields = cut(config_class().to_dict())
    change(fields, FIELDS.get(model_type, {}))
    return config_class(**fields)


def make_model(model_type: str) -> PreTrainedModel:
    """Make a tiny model of random weights, large enough that an answer depends on all tokens."""
    model_class = getattr(transformers, model_types()[model_type])
    if not issubclass(model_class, GenerationMixin):
        raise ValueError("it has no `generate`")
    config = make_config(model_type)
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if num_weights > 3e8:
        raise ValueError(f"its config has sizes that are not cut here, {num_weights} weights")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def inputs_of(model: PreTrainedModel) -> set[str]:
    """Names of what a model takes."""
    return set(inspect.signature(type(model).forward).parameters)


def sees_pictures(model: PreTrainedModel) -> bool:
    """Tell whether a model takes pictures."""
    return any("pixel_values" in name or name == "image_patches" for name in inputs_of(model))


def make_pictures(model: PreTrainedModel, num_pictures: int) -> dict[str, torch.Tensor]:
    """Make pictures of 16 x 16 pixels, or of 4 x 4 patches, as a model takes them: the names of its inputs tell."""
    names, config, n = inputs_of(model), model.config, num_pictures
    vision = getattr(config, "vision_config", None)
    patch = PATCHES.get(config.model_type, (48 * getattr(vision, "temporal_patch_size", 1),))
    generator = torch.Generator().manual_seed(11)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kinds: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "image_patches": lambda: {"image_patches": noise(n, 4, 48)},
        "pixel_values_images": lambda: {"pixel_values_images": noise(n, 3, 16, 16)},
        "image_pixel_values": lambda: {
            "image_pixel_values": noise(n, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16]] * n),
            "image_attention_mask": torch.ones(n, 2, 4, 4, dtype=torch.long),
        },
        "image_token_pooling": lambda: {
            "pixel_values": noise(n, 16, 48),
            "image_token_pooling": torch.arange(n * 16).view(n * 4, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]] * n),
            "image_num_crops": torch.ones(n, dtype=torch.long),
        },
        "high_res_pixel_values": lambda: {
            "pixel_values": noise(n, 3, 16, 16),
            "high_res_pixel_values": noise(n, 3, 64, 64),
        },
        "spatial_shapes": lambda: {
            "pixel_values": noise(n, 16, 48),
            "spatial_shapes": torch.tensor([[4, 4]] * n),
            "pixel_attention_mask": torch.ones(n, 16, dtype=torch.long),
        },
        "target_sizes": lambda: {
            "pixel_values": noise(1, 3, 4, n * 4 * 16),  # all pictures side by side
            "target_sizes": torch.tensor([[4, 4]] * n),
        },
        "image_grid_thw": lambda: {
            "pixel_values": noise(n * 16, *patch),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * n),
        },
        "pixel_attention_mask": lambda: {"pixel_values": noise(n, 1, 3, 16, 16)},
        "qformer_input_ids": lambda: {
            "pixel_values": noise(n, *FRAMES.get(config.model_type, ()), 3, 16, 16),
            "qformer_input_ids": torch.tensor([[1, 2, 3]] * n),
            "qformer_attention_mask": torch.ones(n, 3, dtype=torch.long),
        },
        "image_sizes": lambda: (
            {"pixel_values": noise(n, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]] * n)}
            if hasattr(config, "image_grid_pinpoints")
            else {"pixel_values": noise(n, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * n)}
        ),
        "pixel_values": lambda: {"pixel_values": noise(n, 3, 16, 16)},
    }
    told = {KINDS[config.model_type]} if config.model_type in KINDS else names
    made = next(make for name, make in kinds.items() if name in told)()
    made |= {name: torch.ones(n, *shape, dtype=torch.bool) for name, shape in ONES.get(config.model_type, {}).items()}
    if "image_merge_sizes" in names:
        made["image_merge_sizes"] = torch.tensor([2] * n)
    return made


def num_rows_of(model: PreTrainedModel, pictures: dict[str, torch.Tensor]) -> int:
    """Count the rows that a picture becomes."""
    if model.config.model_type in NUM_ROWS:
        return NUM_ROWS[model.config.model_type]
    owner = model if hasattr(model, "get_image_features") else model.model
    names = inspect.signature(getattr(model, "model", owner).get_image_features).parameters
    with torch.no_grad():
        found = owner.get_image_features(**{name: value for name, value in pictures.items() if name in names})
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(part.reshape(-1, part.shape[-1]).shape[0] for part in parts)


def make_videos(model: PreTrainedModel, num_videos: int) -> dict[str, torch.Tensor]:
    """Make videos of few frames of 16 x 16 pixels, or of 4 x 4 patches, as a model takes them."""
    names, n = inputs_of(model), num_videos
    generator = torch.Generator().manual_seed(13)
    if "video_grid_thw" in names:
        patch = 48 * getattr(model.config.vision_config, "temporal_patch_size", 1)
        videos = {"pixel_values_videos": (n * 32, patch), "video_grid_thw": [[2, 4, 4]] * n}
        videos |= {name: [1.0] * n for name in names & {"second_per_grid_ts", "video_second_per_grid"}}
    else:
        videos = {"pixel_values_videos": (n, NUM_FRAMES.get(model.config.model_type, 2), 3, 16, 16)}
    videos["pixel_values_videos"] = torch.randn(videos["pixel_values_videos"], generator=generator)
    return {name: torch.as_tensor(values) for name, values in videos.items()}


def make_prompts(
    model: PreTrainedModel, seen: str = "", lengths: tuple[int, ...] = (8, 12)
) -> dict[str, torch.Tensor]:
    """
    Make prompts of given lengths, padded on the left, of text alone or with a picture or a video each.

    Args:
        model (`PreTrainedModel`):
            The model that will read them.
        seen (`str`, *optional*, defaults to `""`):
            "pictures", "videos" or nothing.
        lengths (`tuple[int, ...]`, *optional*, defaults to `(8, 12)`):
            Tokens of text in each prompt.
    """
    generator = torch.Generator().manual_seed(3)
    config, block = model.config, []
    levels = (config, getattr(config, "vision_config", None))
    found = [getattr(level, name, None) for name in ("image_token_id", "video_token_id") for level in levels]
    image_id = next((token_id for token_id in found if token_id is not None), None)
    if seen == "pictures":
        block = [image_id] * num_rows_of(model, make_pictures(model, 1))
        if getattr(config, "vision_start_token_id", None) is not None:
            block = [config.vision_start_token_id, *block, config.vision_end_token_id]
    elif seen == "videos":
        block = VIDEOS[config.model_type]
    texts = [torch.randint(3, FIRST_SPECIAL, (length,), generator=generator).tolist() for length in lengths]
    rows = [[text[0], *block, *text[1:]] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    prompts = {"input_ids": ids, "attention_mask": mask}
    if seen:
        prompts |= (make_pictures if seen == "pictures" else make_videos)(model, len(rows))
        seen_ids = [token_id for token_id in (image_id, IDS["video_token_id"]) if token_id is not None]
        kinds = torch.isin(ids, torch.tensor(seen_ids)).int() * (1 + (seen == "videos"))
        prompts |= {name: kinds for name in inputs_of(model) if name.endswith("token_type_ids")}
    return prompts
