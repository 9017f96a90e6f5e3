"""Bytes of weights that a forward reads."""

import torch
from torch import nn
from transformers import PreTrainedModel


def num_bytes_per_step(target: PreTrainedModel) -> int:
    """
    Count the bytes of weights that a step of a target reads: those of its decoder, experts that no token is sent to
    among them, and of its head. Of embeddings that are not the head, it reads only the rows of its tokens.
    """
    read = _weights_of(target.get_decoder()) - _weights_of(target.get_input_embeddings())
    return sum(weight.nbytes for weight in read | _weights_of(target.get_output_embeddings()))


def num_bytes_per_draft(draft: PreTrainedModel, target: PreTrainedModel) -> int:
    """
    Count the bytes of weights that a forward of a draft on features reads: all but tables, of which it reads rows, and
    the target's head, where it has none.
    """
    tables = {module.weight for module in draft.modules() if isinstance(module, nn.Embedding)}
    read = {weight for name, weight in draft.named_parameters() if not name.startswith("edge_")} - tables
    if draft.head is None:
        read |= _weights_of(target.get_output_embeddings())
    return sum(weight.nbytes for weight in read)


def _weights_of(module: nn.Module | None) -> set[torch.Tensor]:
    """Return the parameters of a module, where there is one: what is quantised may keep its weights otherwise."""
    return set() if module is None else set(module.parameters())
