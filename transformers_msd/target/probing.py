"""What only a run tells of a model: whether the states that its layers keep can be run on from."""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from transformers_msd.compat import CACHE
from transformers_msd.traits.support import keeps_states


# Tokens of the probe: a prompt, and what is run behind it at once and one by one.
_PROMPT, _BEHIND = 3, 4
# Largest differences of features that are rounding, in shares of the largest: in float32, and in half precision.
_ROUNDING, _ROUNDING_OF_HALF = 1e-4, 0.05

_found: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


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
        cache, parts, start = DynamicCache(config=model.config.get_text_config(decoder=True)), [], 0
        for part in ids.split(lengths, dim=1):
            # Positions are given as `generate` gives them: left to themselves, some hybrids miscount.
            position_ids = torch.arange(start, start + part.shape[1], device=device)[None]
            # Not called, so as to wake no hook of the user's; some decoders have a head, and return logits first.
            outputs = decoder.forward(
                input_ids=part, position_ids=position_ids, use_cache=True, return_dict=True, **{CACHE: cache}
            )
            parts.append(outputs[0])
            start += part.shape[1]
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
