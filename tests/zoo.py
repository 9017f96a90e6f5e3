"""Tiny random targets of every supported architecture, with prompts of text and pictures."""

import copy
import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    SiglipVisionConfig,
)


VOCAB_SIZE = 96
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 90, 91, 92, 93
BOS_ID, EOS_ID, PAD_ID = 1, 2, 0
FIRST_TEXT_ID = 3

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide enough that the best two logits are never close, or equal tokens would be luck.
    "initializer_range": 0.3,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": VISION_START_ID,
    "vision_end_token_id": VISION_END_ID,
}


def _config(architecture: str) -> PreTrainedConfig:
    if architecture == "llama":
        return LlamaConfig(**TEXT)
    if architecture == "llava":
        return LlavaConfig(
            text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE_ID
        )
    if architecture == "llava_next":
        return LlavaNextConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_id=IMAGE_ID,
            image_grid_pinpoints=[[8, 16], [16, 8]],
        )
    if architecture == "llava_onevision":
        return LlavaOnevisionConfig(
            text_config=Qwen2Config(**TEXT),
            vision_config=SiglipVisionConfig(**VISION),
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            image_grid_pinpoints=[[8, 16], [16, 8]],
        )
    if architecture == "gemma3":
        # Layers that see 8 columns, fewer than a prompt has, and such that see all.
        windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return Gemma3Config(
            text_config=Gemma3TextConfig(
                **TEXT | windows, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False
            ),
            vision_config=SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_index=IMAGE_ID,
            boi_token_index=VISION_START_ID,
            eoi_token_index=VISION_END_ID,
            tie_word_embeddings=False,  # or each token is followed by itself
        )
    if architecture == "qwen2_vl":
        return Qwen2VLConfig(
            text_config=TEXT | {"rope_parameters": MROPE},
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "initializer_range": 0.3,
            },
            **QWEN_IDS,
        )
    return Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        **QWEN_IDS,
    )


ARCHITECTURES = ("llama", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "gemma3")
# Those that can be shown other views of a prompt than the prompt itself.
READ_EMBEDS = ARCHITECTURES[:-1]  # `generate` of Gemma 3 takes no `inputs_embeds`


@functools.cache
def make_target(architecture: str, attn_implementation: str = "sdpa", device: str = "cpu") -> PreTrainedModel:
    """Make a target of random weights; EOS is unset, so that a test chooses when a call ends."""
    torch.manual_seed(0)
    config = _config(architecture)
    auto_class = AutoModelForCausalLM if architecture == "llama" else AutoModelForImageTextToText
    target = auto_class.from_config(config, attn_implementation=attn_implementation).eval().to(device)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = PAD_ID
    return target


@functools.cache
def make_draft_model(architecture: str, device: str = "cpu") -> PreTrainedModel:
    """Make a draft of a target's architecture whose weights are a little off the target's."""
    draft = copy.deepcopy(make_target(architecture, "sdpa", device))
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.02 * weight.std().nan_to_num() * torch.randn_like(weight))
    return draft


def make_inputs(
    architecture: str, num_images: tuple[int, ...] = (1,), seed: int = 0, lengths: tuple[int, ...] | None = None
) -> dict[str, torch.Tensor]:
    """
    Make a left-padded batch of prompts.

    Args:
        architecture (`str`):
            One of `ARCHITECTURES`; a text-only one ignores the pictures.
        num_images (`tuple[int, ...]`, *optional*, defaults to `(1,)`):
            Pictures in each prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of texts and pictures.
        lengths (`tuple[int, ...]`, *optional*):
            Text tokens of each prompt; 7, 11, 15, ... when not given.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or tuple(7 + 4 * row for row in range(len(num_images)))
    image = {
        "llama": [],
        "llava": [IMAGE_ID] * 4,
        # One tile each of the base picture and of the (8, 16) grid, unpadded, with a newline per row of patches.
        "llava_next": [IMAGE_ID] * (4 + 2 * 5),
        "llava_onevision": [IMAGE_ID] * (4 + 2 * 5),
        "qwen2_vl": [VISION_START_ID, *[IMAGE_ID] * 4, VISION_END_ID],
        "qwen2_5_vl": [VISION_START_ID, *[IMAGE_ID] * 4, VISION_END_ID],
        "gemma3": [VISION_START_ID, *[IMAGE_ID] * 4, VISION_END_ID],
    }[architecture]
    rows = []
    for images, length in zip(num_images, lengths, strict=True):
        text = torch.randint(FIRST_TEXT_ID, IMAGE_ID, (length,), generator=generator).tolist()
        rows.append([BOS_ID, text[0], *image * images, *text[1:]])
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    total = sum(num_images)
    if architecture == "llama" or total == 0:
        return inputs
    if architecture in ("llava", "gemma3"):
        inputs["pixel_values"] = torch.randn(total, 3, 8, 8, generator=generator)
    elif architecture in ("llava_next", "llava_onevision"):
        inputs["pixel_values"] = torch.randn(total, 3, 3, 8, 8, generator=generator)
        inputs["image_sizes"] = torch.tensor([[8, 16]] * total)
    else:
        inputs["pixel_values"] = torch.randn(total * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * total)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_ID).int()
    if architecture == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_ID).long()
    return inputs
