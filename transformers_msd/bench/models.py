"""Models to benchmark: loaded, or of random weights in the shapes of known ones."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from transformers_msd.drafters.loading import auto_class
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.traits.support import is_multimodal


# Text shapes of llava-hf/llava-1.5-7b-hf and llava-1.5-13b-hf.
SHAPES = {
    "llava-1.5-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llava-1.5-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}


def load_model(name: str, dtype: str, device: str) -> PreTrainedModel:
    """Load a target or a draft by what its config says it is."""
    config = AutoConfig.from_pretrained(name)
    return auto_class(config).from_pretrained(name, dtype=dtype).to(device).eval()


def outline_model(name: str, dtype: str) -> PreTrainedModel:
    """
    Make what [`load_model`] loads without its weights, on the meta device; with them, on a CPU, where only these tell
    their dtype or their number.
    """
    config = AutoConfig.from_pretrained(name)
    named = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if named is None or getattr(config, "quantization_config", None) is not None:
        return load_model(name, dtype, "cpu")
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=named)


def named_config(name: str) -> PreTrainedConfig:
    """
    Return the config of one of the known shapes, or of a file.

    Raises:
        ValueError: If it is neither, or the model reads other pictures than LLaVA does.
    """
    if name in SHAPES:
        text_config = LlamaConfig(
            **SHAPES[name], vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=32001
        )
        # CLIP ViT-L/14 at 336 pixels.
        vision_config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        return LlavaConfig(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=32000,
            image_seq_length=576,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    if not Path(name).exists():
        raise ValueError(f"`random_weights` must be one of {', '.join(SHAPES)}, or a config.json, got {name!r}.")
    config = AutoConfig.from_pretrained(name)
    if is_multimodal(config) and not isinstance(config, LlavaConfig):
        raise ValueError(
            f"Random prompts are made for LLaVA-1.5 and language models, got a config of {config.model_type!r}. "
            "Benchmark a checkpoint of it with `target_model` and `datasets`."
        )
    return config


@torch.no_grad()
def random_target(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """
    Make a target of random weights, right in its dtype and on its device.

    Embeddings are large and the head is these, moved by one token: each token is followed by the one before it in the
    vocabulary, by a margin that no rounding can close. All else is as Transformers initialises it.
    """
    with torch.device(device):
        target = auto_class(config).from_config(config, dtype=dtype).eval()
    embeddings = target.get_input_embeddings().weight
    embeddings.normal_(std=10.0)
    head = target.get_output_embeddings().weight
    if head is not embeddings:
        head.copy_(embeddings.roll(-1, 0)).mul_(0.002)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = config.get_text_config().pad_token_id or 0
    return target


def random_draft(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> MSDDraftModel:
    """Make an MSD draft of random weights for a target."""
    with torch.device(device):
        return AutoModel.from_config(MSDConfig.from_target(config), dtype=dtype).eval()
