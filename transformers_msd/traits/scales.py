"""What a model multiplies its embeddings by before its layers, and what it does to its logits behind its head."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.traits.support import dtype_of


# Fields of configs. A model divides by some that another multiplies by, and one may heed what its text model's config
# says where another does not: what it computed tells.
_OF_EMBEDDINGS = ("embedding_multiplier", "embedding_scale")
_OF_LOGITS = ("logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping",)
_MOST_ROWS = 64  # that embeddings are compared on


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


def scales_of(model: PreTrainedModel) -> Scales:
    """Return the scales of a model, all 1 where it has none or they are not found yet."""
    return _found.get(model, Scales())


def wants_scales(model: PreTrainedModel) -> bool:
    """Tell whether a model's config names scales, and it is not found out yet whether they are heeded."""
    return model not in _found and any(_numbers(model.config, (*_OF_EMBEDDINGS, *_OF_LOGITS, *_CAPS)))


def scales_embeddings(model: PreTrainedModel) -> bool:
    """Tell whether a model may multiply what it looks up of its embeddings; it may be without weights."""
    return type(model.get_input_embeddings()) is not nn.Embedding or bool(_numbers(model.config, _OF_EMBEDDINGS))


def look_up(model: PreTrainedModel, token_ids: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """
    Return embeddings of tokens.

    Args:
        model (`PreTrainedModel`):
            The model.
        token_ids (`torch.Tensor` of shape `(...)`):
            Tokens.
        scale (`float`, *optional*):
            What rows of its table, as they are stored, are multiplied by; what its layers read when not given.
    """
    table = model.get_input_embeddings()
    if scale is None:
        return scales_of(model).of_embeddings(table(token_ids))
    hook = getattr(table, "_hf_hook", None) if table.weight.is_meta else None
    if hook is not None:  # accelerate's, which brings offloaded weights and takes them away
        (token_ids,), _ = hook.pre_forward(table, token_ids)
    rows = nn.functional.embedding(token_ids.to(table.weight.device), table.weight) * scale
    return rows if hook is None else hook.post_forward(table, rows)


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
    Find out which of the scales that its config names a model heeds, by what it computed. Where nothing that they may
    mean fits, they are not found, and looked for again in the next prompt.

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
    table_rows, inputs_embeds = table_rows[-_MOST_ROWS:], inputs_embeds[-_MOST_ROWS:].to(table_rows.device)
    own = model.get_output_embeddings()(features.to(dtype_of(model)))
    if table_rows.shape != inputs_embeds.shape or own.shape != logits.shape:
        return
    # A model may forbid tokens, and rows of a prompt may be no token's.
    known = logits.isfinite() & (logits > torch.finfo(logits.dtype).min / 2)
    own, logits = own.to(logits.device).float()[known], logits.float()[known]
    if not own.any() or not table_rows.any():  # zeros fit all factors
        return
    tolerance = 0.02 if inputs_embeds.element_size() < 4 else 1e-4
    for factor in (*_numbers(model.config, _OF_EMBEDDINGS), 1.0):
        is_close = _is_close(table_rows.float() * factor, inputs_embeds.float(), tolerance).all(-1)
        if 2 * int(is_close.sum()) <= len(is_close):
            continue
        for scales in _candidates(model.config, factor):
            if _is_close(scales.of_logits(own), logits, tolerance).all():
                _found[model] = scales
                return


def _is_close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> torch.Tensor:
    return (a - b).abs() <= tolerance * (b.abs() + b.square().mean().sqrt())


def _candidates(config: PreTrainedConfig, embeddings: float) -> Iterator[Scales]:
    """List what the fields of a config may mean, what they say before what they don't."""
    named = _numbers(config, _OF_LOGITS)
    factors = [*named, *(1 / number for number in named), 1.0]
    for cap, factor in product([*_numbers(config, _CAPS), None], factors):
        yield Scales(embeddings, factor, cap)


def _numbers(config: PreTrainedConfig, names: tuple[str, ...]) -> list[float]:
    """List the values of fields that are numbers other than 0 and 1, of a config and of its text part."""
    values = (getattr(part, name, None) for part in (config, config.get_text_config()) for name in names)
    numbers = (float(value) for value in values if isinstance(value, int | float) and value not in (0, 1))
    return list(dict.fromkeys(numbers))
