"""What a model multiplies its embeddings by before its layers, and what it does to its logits behind its head."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


# Fields of configs. Which of them a model's `forward` heeds, its logits tell.
_FACTORS, _DIVISORS = ("logit_scale", "output_multiplier", "lm_head_multiplier"), ("logits_scaling",)
_CAP = "final_logit_softcapping"


@dataclass(frozen=True)
class Scales:
    """
    How a model's layers see embeddings, and how its logits leave it.

    Args:
        embeddings (`float`, *optional*, defaults to 1.0):
            Factor of the embeddings.
        logits (`float`, *optional*, defaults to 1.0):
            Factor of what the head returns.
        cap (`float`, *optional*):
            What logits are then held below, by a hyperbolic tangent.
    """

    embeddings: float = 1.0
    logits: float = 1.0
    cap: float | None = None

    def of_embeddings(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Turn rows of the embedding table into what the layers read."""
        return inputs_embeds if self.embeddings == 1.0 else inputs_embeds * self.embeddings

    def of_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn what the head returns into the model's logits."""
        if self.logits != 1.0:
            logits = logits * self.logits
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


_found: WeakKeyDictionary[nn.Module, Scales] = WeakKeyDictionary()


def are_found(model: PreTrainedModel) -> bool:
    """Tell whether the scales of a model are known."""
    return model in _found


def scales_of(model: PreTrainedModel) -> Scales:
    """Return the scales of a model, all 1 until they are found."""
    return _found.get(model, Scales())


def logits_of(model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
    """Return a model's logits of features that are on the device of its head."""
    return scales_of(model).of_logits(model.get_output_embeddings()(features))


@torch.no_grad()
def find_scales(
    model: PreTrainedModel,
    table_rows: torch.Tensor,
    inputs_embeds: torch.Tensor,
    features: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """
    Find the scales of a model from what it computed, once.

    Args:
        model (`PreTrainedModel`):
            The model.
        table_rows (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Rows of its embedding table.
        inputs_embeds (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            What its layers read of these tokens.
        features (`torch.Tensor` of shape `(batch_size, hidden_size)`):
            What its head read.
        logits (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Its logits there.
    """
    if model in _found or not len(table_rows) or table_rows.shape != inputs_embeds.shape:
        return
    raw, seen = table_rows.double().flatten(), inputs_embeds.to(table_rows.device).double().flatten()
    # As it stands in a config: no model is told a factor of more digits.
    factor = float(f"{(seen @ raw / (raw @ raw)).item():.4g}")
    tolerance = 0.02 if inputs_embeds.element_size() < 4 else 1e-4
    embeddings = factor if torch.allclose(seen, raw * factor, rtol=tolerance, atol=tolerance * seen.std()) else 1.0
    head = model.get_output_embeddings()
    weight = next(head.parameters())  # which may be quantised
    own = head(features.to(weight.device, weight.dtype if weight.is_floating_point() else None)).float()
    logits = logits.to(own)
    for scales in (Scales(embeddings), *_said_scales(model.config, embeddings)):
        expected = scales.of_logits(own)
        known = logits > torch.finfo(logits.dtype).min / 2  # a model may forbid tokens
        if torch.allclose(expected[known], logits[known], rtol=tolerance, atol=tolerance * expected.std()):
            _found[model] = scales
            return
    _found[model] = Scales(embeddings)


def _said_scales(config: PreTrainedConfig, embeddings: float) -> list[Scales]:
    """List what the fields of a config may mean."""
    found = []
    for part in (config, config.get_text_config()):
        logits = 1.0
        for name in _FACTORS:
            logits *= _number(part, name) or 1.0
        for name in _DIVISORS:
            logits /= _number(part, name) or 1.0
        found += [Scales(embeddings, logits, cap) for cap in dict.fromkeys((None, _number(part, _CAP)))]
    return found


def _number(config: PreTrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else None
