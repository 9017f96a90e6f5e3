"""How long a training step takes at least: its operations, over what a device does in a second."""

import time

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.loading import auto_class


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
    weights, attention, head = _operations_of_token(target_config)
    draft_weights, draft_attention, draft_head = _operations_of_token(draft)
    steps = args.num_unroll_steps
    # The losses compute all logits twice, so as to keep none of them, and the draft's go back through the head.
    of_target = length * (weights + attention * length) + num_supervised * 2 * head
    # Each unrolled step attends to the keys of all steps before.
    of_layers = draft_weights * steps + draft_attention * length * steps * (steps + 1) / 2
    of_draft = length * 3 * of_layers + num_supervised * 3 * draft_head * steps
    return num_rows * of_target, num_rows * of_draft


def _operations_of_token(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Count what a token costs forward: in layers, in attention for each key, and in the head."""
    text, model = config.get_text_config(), without_weights(config)
    decoder = model if isinstance(config, MSDConfig) else model.get_decoder()
    # Tables over the vocabulary are heads, or embeddings, which are looked up.
    sizes = [weight.numel() for weight in decoder.parameters() if text.vocab_size not in weight.shape]
    return 2 * sum(sizes), 4 * text.num_hidden_layers * text.hidden_size, 2 * text.hidden_size * text.vocab_size


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
