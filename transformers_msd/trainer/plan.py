"""What a recipe will do and need, told before anything large is loaded."""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.trainer.arithmetic import measure_throughput, operations_of_step, without_weights
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.curriculum import EpochSampler
from transformers_msd.trainer.dataset import row_length, split_rows, undecoded
from transformers_msd.trainer.progress import duration


GIB = 2**30
_FLOAT = 4  # bytes of a number in float32


def num_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of a model by its config, without its weights."""
    return without_weights(config).num_parameters()


def memory_of_step(
    target_config: PreTrainedConfig,
    draft: PreTrainedConfig,
    args: MSDTrainingConfig,
    target_dtype: torch.dtype,
    length: int,
) -> dict[str, int]:
    """
    Estimate the peak memory of a training step on one device, unsharded, in bytes by part.

    Counted are the tensors that are alive at once, for rows padded to a length. It is a sum of shapes, not a
    measurement, and leaves out what the allocator wastes.
    """
    text, theirs = draft.get_text_config(), target_config.get_text_config()
    batch_size = args.per_device_train_batch_size
    rows, steps = batch_size * length, args.num_unroll_steps
    width, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    half = target_dtype.itemsize
    computed = 2 if args.bf16 or args.fp16 else _FLOAT
    of_target = rows * (6 * theirs.hidden_size + 3 * theirs.intermediate_size)
    their_scores = 2 * batch_size * theirs.num_attention_heads * length**2
    # What a layer keeps for its backward: inputs of norms and projections, q, k, v and output, thrice the MLP's width.
    layer_rows, keys = rows, length
    if isinstance(draft, BlockDraftConfig):
        layer_rows = batch_size * args.num_blocks * draft.block_size
        keys = length + args.num_blocks * draft.block_size
    layer = layer_rows * (10 * width + 3 * inner) * computed
    # Scores and their softmax, where attention has no kernel that does without; unrolled steps see the keys of all
    # steps before.
    scores = 2 * heads * layer_rows * keys * computed
    num_taps = len(getattr(draft, "feature_layers", ()))  # beside its features, which are compared
    losses = 1 + sum(map(bool, (args.token_loss_weight, args.top_k_loss_weight, args.probability_loss_weight)))
    return {
        "target": num_parameters(target_config) * half,
        "draft, gradients and AdamW's moments": num_parameters(draft) * 4 * _FLOAT,
        "features and embeddings": rows * theirs.hidden_size * (2 * half + 3 * _FLOAT + num_taps * (half + _FLOAT)),
        "a layer of the target": (of_target + their_scores) * half,
        "layers of the draft": steps * text.num_hidden_layers * layer,
        "attention scores of the draft": text.num_hidden_layers * scores * steps * (steps + 1) // 2,
        "logits of a chunk": min(rows, args.head_chunk_size) * text.vocab_size * _FLOAT * (2 + 2 * losses),
    }


@dataclass(frozen=True)
class Plan:
    """
    A run, resolved.

    Args:
        num_text_rows, num_visual_rows (`int`):
            Rows without and with pictures.
        num_steps, rows_per_step (`int`):
            Optimizer steps, and rows each of them sees.
        lengths (`list[int]`):
            Tokens of a sample of the rows, those that are longer cut.
        target_parameters, draft_parameters (`int`):
            Sizes.
        memory (`dict[str, int]`):
            Bytes, of [`memory_of_step`].
        checkpoint_bytes (`int`):
            A checkpoint with its optimizer states.
        num_operations (`float`):
            Floating-point operations of the run, of [`operations_of_step`].
        seconds (`float`):
            What they take at the speed of matrix products alone.
        device (`str`):
            Where that speed was measured.
    """

    num_text_rows: int
    num_visual_rows: int
    num_steps: int
    rows_per_step: int
    lengths: list[int]
    target_parameters: int
    draft_parameters: int
    memory: dict[str, int]
    checkpoint_bytes: int
    num_operations: float
    seconds: float
    device: str

    def __str__(self) -> str:
        mean, longest = sum(self.lengths) / len(self.lengths), max(self.lengths)
        sample = f"by {len(self.lengths)} rows"
        speed = self.num_operations / self.seconds / 1e12
        lines = [
            f"target: {self.target_parameters:,} parameters",
            f"draft: {self.draft_parameters:,} parameters",
            f"rows: {self.num_text_rows:,} of text, {self.num_visual_rows:,} with pictures",
            f"steps: {self.num_steps:,} of {self.rows_per_step} rows",
            f"tokens: {self.num_steps * self.rows_per_step * mean:,.0f} ({mean:.0f} a row, {sample})",
            f"time: at least {duration(self.seconds)} by arithmetic, {self.num_operations / 1e12:,.3g} TFLOP at "
            f"{speed:.3g} TFLOP/s",
            f"  as {self.device} here multiplies matrices; data, evaluation and saving are not in it",
            f"memory of a step on one device, unsharded: {sum(self.memory.values()) / GIB:.2f} GiB by shapes, padded "
            f"to {longest} tokens (the longest, {sample})",
            *(f"  {name}: {size / GIB:.2f} GiB" for name, size in self.memory.items()),
            f"checkpoint: {self.checkpoint_bytes / GIB:.2f} GiB",
        ]
        return "\n".join(lines)


def make_plan(
    target_config: PreTrainedConfig,
    draft: PreTrainedConfig,
    args: MSDTrainingConfig,
    target_dtype: torch.dtype,
    rows: Dataset,
    lengths: list[int],
    num_supervised: float,
    device: str,
    num_processes: int,
) -> Plan:
    """
    Resolve a recipe.

    Args:
        target_config (`PreTrainedConfig`):
            Config of the target.
        draft (`PreTrainedConfig`):
            Config of the draft, of one on features or of a draft VLM.
        args ([`MSDTrainingConfig`]):
            Settings of the run.
        target_dtype (`torch.dtype`):
            Dtype of the target.
        rows (`Dataset`):
            What is trained on.
        lengths (`list[int]`):
            Tokens of a sample of the rows.
        num_supervised (`float`):
            Tokens of a row that are learned from, by the same sample.
        device (`str`):
            Device that trains, as far as it is here.
        num_processes (`int`):
            Processes that will train.
    """
    text_rows, visual_rows = split_rows(rows)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    per_epoch = {"text": len(text_rows), "multimodal": len(rows), "ramp": min(len(text_rows), len(visual_rows))}
    # As the trainer draws them: an epoch fills whole steps.
    rows_per_epoch = len(EpochSampler(per_epoch[args.stage], rows_per_step))
    steps = math.ceil(math.ceil(rows_per_epoch / rows_per_step) * args.num_train_epochs)
    num_steps = args.max_steps if args.max_steps > 0 else steps
    draft_parameters = num_parameters(draft)
    lengths = [min(length, args.max_length or length) for length in lengths]
    padded = longest_of(lengths, args.per_device_train_batch_size)
    operations = operations_of_step(target_config, draft, args, rows_per_step, padded, num_supervised)
    computed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    speeds = {dtype: measure_throughput(device, dtype) for dtype in {target_dtype, computed}}
    # Processes on one CPU share it.
    num_devices = 1 if device == "cpu" else num_processes
    seconds = sum(number / speeds[dtype] for number, dtype in zip(operations, (target_dtype, computed), strict=True))
    return Plan(
        num_text_rows=len(text_rows),
        num_visual_rows=len(visual_rows),
        num_steps=num_steps,
        rows_per_step=rows_per_step,
        lengths=lengths,
        target_parameters=num_parameters(target_config),
        draft_parameters=draft_parameters,
        memory=memory_of_step(target_config, draft, args, target_dtype, max(lengths)),
        checkpoint_bytes=draft_parameters * _FLOAT * (1 if args.save_only_model else 3),
        num_operations=num_steps * sum(operations),
        seconds=num_steps * seconds / num_devices,
        device=device,
    )


def longest_of(lengths: list[int], num_rows: int) -> int:
    """Return the length of the longest of some rows, on average over all draws of so many lengths."""
    ordered, number = sorted(lengths), len(lengths)
    shares = [((i + 1) / number) ** num_rows - (i / number) ** num_rows for i in range(number)]
    return round(sum(length * share for length, share in zip(ordered, shares, strict=True)))


def sample_rows(rows: Dataset, num_rows: int = 64) -> Dataset:
    """Choose rows spread over a dataset."""
    return rows.select(range(0, len(rows), max(len(rows) // num_rows, 1)))


def lengths_of(rows: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Count the tokens of rows."""
    pictures = undecoded(rows)
    return [row_length(pictures[row], row, processing_class) for row in range(len(rows))]
