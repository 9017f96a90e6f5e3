"""What only a run tells of a model: whether the states that its layers keep can be run on from."""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from transformers_msd.compat import CACHE, is_stateful
from transformers_msd.traits.support import device_of, keeps_states


# Tokens of the probe: a prompt, which makes most of the state, and what is run behind it at once and one by one.
_PROMPT, _BEHIND = 8, 2
# Largest differences that are rounding, in shares of the largest value: of features, and of the first layer's states.
_ROUNDING = {"exact": (1e-4, 1e-4), "half": (0.15, 0.02)}

# Of each model in the dtype that it had.
_found: WeakKeyDictionary[nn.Module, tuple[torch.dtype, str | None]] = WeakKeyDictionary()


def states_fact(model: PreTrainedModel) -> str | None:
    """
    State what keeps the states of a target from being run on from, as [`unsupported_fact`] does. It is tried: some
    tokens are run at once and one by one, once for each model. A model that trains is taken at its word.
    """
    if model.training or not keeps_states(model.config):
        return None
    dtype, fact = _found.get(model, (None, None))
    if dtype != model.dtype:
        with torch.no_grad(), torch.autocast(device_of(model).type, enabled=False):
            fact = _probe(model)
        _found[model] = (model.dtype, fact)
    return fact


def _probe(model: PreTrainedModel) -> str | None:
    decoder, device = model.get_decoder(), device_of(model)
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(1, 1 + _PROMPT + _BEHIND, device=device)[None] % config.vocab_size

    def run(*lengths: int) -> tuple[torch.Tensor, Cache]:
        cache, parts, start = DynamicCache(config=config), [], 0
        for part in ids.split(lengths, dim=1):
            # Positions are given as `generate` gives them: left to themselves, some hybrids miscount.
            position_ids = torch.arange(start, start + part.shape[1], device=device)[None]
            # Not called, so as to wake no hook of the user's; some decoders have a head, and return logits first.
            outputs = decoder.forward(
                input_ids=part, position_ids=position_ids, use_cache=True, return_dict=True, **{CACHE: cache}
            )
            parts.append(outputs[0])
            start += part.shape[1]
        return torch.cat(parts, dim=1)[:, _PROMPT:], cache

    features, cache = run(_PROMPT, _BEHIND)
    own_features, own_cache = run(_PROMPT, *[1] * _BEHIND)
    if is_stateful(model) and not any(_recurrent_states(layer) for layer in cache.layers):
        return "has a recurrent state outside of its cache, which can't be put back"
    is_half = any(weight.dtype.itemsize == 2 for weight in decoder.parameters())
    # The matrices of a GPU may be rounded to TF32.
    is_rounded = device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"
    most, most_of_states = _ROUNDING["half" if is_half or is_rounded else "exact"]
    of_features, of_states = _difference([features], [own_features]), _difference(*map(_states, (cache, own_cache)))
    if of_features <= most and of_states <= most_of_states:
        return None
    return (
        f"has states that {_BEHIND} tokens at once leave otherwise than one by one: features differ by "
        f"{of_features:.1e} of the largest, states by {of_states:.1e}"
    )


def _recurrent_states(layer: object) -> list[torch.Tensor]:
    states = getattr(layer, "recurrent_states", {})
    return [state for state in states.values() if state is not None]


def _states(cache: Cache) -> list[torch.Tensor]:
    """Return the states of the first layer that keeps any: those of later ones are of rounded features."""
    layer = next(layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin))
    return [*(state for state in layer.conv_states.values() if state is not None), *_recurrent_states(layer)]


def _difference(at_once: list[torch.Tensor], one_by_one: list[torch.Tensor]) -> float:
    """Return the largest difference of tensors, each in shares of its largest value."""
    pairs = [(own.float(), other.float()) for own, other in zip(at_once, one_by_one, strict=True)]
    return max(float((own - other).abs().max() / other.abs().max().clamp(min=1e-30)) for own, other in pairs)
