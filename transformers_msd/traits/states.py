"""Layers that keep a state in place of rows: whether a model has any, and whether they can be run on from it."""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from transformers_msd.compat import CACHE


# Tokens of the probe: a prompt, and what is run behind it at once and one by one.
_PROMPT, _BEHIND = 3, 4
# Largest differences of features that are rounding, in shares of the largest: in float32, and in half precision.
_ROUNDING, _ROUNDING_OF_HALF = 1e-4, 0.05

_found: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def keeps_states(config: PreTrainedConfig) -> bool:
    """Tell whether the cache of a model has layers that keep a state in place of rows."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def states_fact(model: PreTrainedModel) -> str | None:
    """
    State what keeps the states of a target from being run on from, as [`unsupported_fact`] does. It is tried: some
    tokens are run at once and one by one, once for each model.
    """
    if not keeps_states(model.config):
        return None
    if model not in _found:
        _found[model] = _probe(model)
    return _found[model]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str | None:
    decoder, device = model.get_decoder(), model.get_input_embeddings().weight.device
    ids = torch.arange(1, 1 + _PROMPT + _BEHIND, device=device)[None] % model.config.get_text_config().vocab_size

    def run(*lengths: int) -> torch.Tensor:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        parts = [
            # Not called, so as to wake no hook of the user's; some decoders have a head, and return logits first.
            decoder.forward(input_ids=part, use_cache=True, **{CACHE: cache}, return_dict=True)[0]
            for part in ids.split(lengths, dim=1)
        ]
        return torch.cat(parts, dim=1)[:, _PROMPT:].float()

    at_once, one_by_one = run(_PROMPT, _BEHIND), run(_PROMPT, *[1] * _BEHIND)
    difference = float((at_once - one_by_one).abs().max() / one_by_one.abs().max())
    is_half = model.get_input_embeddings().weight.dtype.itemsize < 4
    if difference <= (_ROUNDING_OF_HALF if is_half else _ROUNDING):
        return None
    return (
        f"has states that {_BEHIND} tokens at once leave otherwise than one by one, its features differ by "
        f"{difference:.1e} of the largest"
    )
