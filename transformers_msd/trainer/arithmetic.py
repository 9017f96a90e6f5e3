"""How long a training step takes at least: its operations, over what a device does in a second."""

import time

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.drafters.loading import auto_class
from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.models.configuration import DraftConfig
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.trainer.configuration import MSDTrainingConfig


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model of shapes alone."""
    with init_empty_weights():
        return auto_class(config).from_config(config)


def operations_of_step(
    target_config: PreTrainedConfig,
    draft: PreTrainedConfig,
    args: MSDTrainingConfig,
    num_rows: int,
    length: int,
    num_supervised: float,
) -> tuple[float, float]:
    """
    Count the floating-point operations of an optimizer step, those of the frozen target and those of the draft.

    Every weight of a decoder costs two operations a token and thrice as many where it is trained; so do heads on
    supervised tokens, and attention for every key. Vision towers are left out.

    Args:
        target_config (`PreTrainedConfig`):
            Config of the target.
        draft (`PreTrainedConfig`):
            Config of the draft.
        args ([`MSDTrainingConfig`]):
            Settings of the run.
        num_rows (`int`):
            Rows of the step.
        length (`int`):
            Tokens of each, padded.
        num_supervised (`float`):
            Tokens of a row that are learned from.
    """
    target, model = without_weights(target_config), without_weights(draft)
    text, own = target_config.get_text_config(), draft.get_text_config()
    own_head = _head(own)
    once, decoder = 0, model
    if not isinstance(draft, DraftConfig):
        decoder = model.get_decoder()
    elif model.head is not None:
        own_head = 2 * model.head.weight.numel()
    if isinstance(model, Eagle3DraftModel):  # fuses what the target says, and not what it says itself
        once, decoder = 2 * model.fc.weight.numel(), model.model
    steps = args.num_unroll_steps
    if isinstance(draft, BlockDraftConfig):
        num_blocks = min(args.num_blocks, num_supervised)
        num_rows_of_blocks, num_supervised = num_blocks * draft.block_size, num_blocks * draft.num_levels
        # Keys and values of what is known, in all layers, and blocks that see it.
        known = 2 * (model.fc.weight.numel() + _keys_and_values(model))
        joining = 0 if model.join is None else 2 * model.join.weight.numel()
        of_blocks = joining + _weights(model.model, own) + _attention(own) * (length + num_rows_of_blocks)
        of_heads = num_supervised * 3 * (own_head + 2 * draft.edge_rank * own.vocab_size)
        of_draft = 3 * (length * known + num_rows_of_blocks * of_blocks) + of_heads
        return num_rows * _of_target(target, text, length, num_supervised), num_rows * of_draft
    # Each unrolled step attends to the keys of all steps before.
    of_layers = once + _weights(decoder, own) * steps + _attention(own) * length * steps * (steps + 1) / 2
    of_draft = length * 3 * of_layers + num_supervised * 3 * own_head * steps
    return num_rows * _of_target(target, text, length, num_supervised), num_rows * of_draft


def _of_target(target: PreTrainedModel, text_config: PreTrainedConfig, length: int, num_supervised: float) -> float:
    """Count what a row costs the target: its layers, and its head where something is learned."""
    # The losses compute all logits twice, so as to keep none of them, and the draft's go back through the head.
    of_heads = num_supervised * 2 * _head(text_config)
    return length * (_weights(target.get_decoder(), text_config) + _attention(text_config) * length) + of_heads


def _head(text_config: PreTrainedConfig) -> int:
    return 2 * text_config.hidden_size * text_config.vocab_size


def _keys_and_values(model: PreTrainedModel) -> int:
    names = ("k_proj.weight", "v_proj.weight")
    return sum(weight.numel() for name, weight in model.named_parameters() if name.endswith(names))


def _weights(decoder: PreTrainedModel, text_config: PreTrainedConfig) -> int:
    """Count what a token costs forward in the weights of layers."""
    own = [weight for name, weight in decoder.named_parameters() if not name.startswith("head.")]
    # Tables over the vocabulary are heads, or embeddings, which are looked up.
    return 2 * sum(weight.numel() for weight in own if text_config.vocab_size not in weight.shape)


def _attention(text_config: PreTrainedConfig) -> int:
    """Count what a token costs forward in attention for each key."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return 4 * text_config.num_hidden_layers * text_config.num_attention_heads * head_dim


def measure_throughput(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Multiply matrices for a while; return the floating-point operations per second."""
    size = 512 if device == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        (matrix @ matrix)[0, 0].item()  # waits for the device

    multiply()
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        multiply()
        number += 1
    return number * 2 * size**3 / (time.perf_counter() - start)
