"""Which caches can take rows back."""

from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from transformers_msd.caches.blocks import holds_rows
from transformers_msd.traits.refusal import Refusal


# Layers whose rows can be taken back, those that share the rows of others, and those whose states are put back.
LAYERS = {
    DynamicCache: {
        DynamicLayer,
        DynamicSlidingWindowLayer,
        DummyLayer,
        LinearAttentionLayer,
        LinearAttentionAndFullAttentionLayer,
    },
    StaticCache: {StaticLayer, StaticSlidingWindowLayer, DummyLayer},
}


def check_cache(cache: Cache) -> None:
    """Raise a [`Refusal`] unless single rows can be taken out of a cache."""
    if not isinstance(cache, Cache):
        raise Refusal(
            f"The cache must be a `DynamicCache` or `StaticCache`, got {type(cache).__name__}. Pass the one that the "
            "turn before returned, or none."
        )
    layer_types = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:
        layer_types.add(cache.layer_class_to_replicate)
    expected = LAYERS.get(type(cache), set())
    unsupported = sorted(layer_type.__name__ for layer_type in layer_types - expected)
    if unsupported or not expected or cache.offloading:
        raise Refusal(
            "Drafting needs a `DynamicCache` or `StaticCache` of attention layers that stays on its device, got "
            f"{type(cache).__name__}{f' with layers {unsupported}' if unsupported else ''}"
            f"{' with offloading' if cache.offloading else ''}. Quantised and offloaded caches, and "
            "static ones of recurrent layers, can't take back rejected rows: drop `cache_implementation` and the "
            "cache, or generate without `assistant_model`."
        )
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) and layer.record_past for layer in cache.layers):
        raise Refusal(
            "The states of the cache must be those behind its last token, got layers that record what was before "
            "(`activate_past_recording`), as Transformers' own assisted generation leaves them. Pass the cache of a "
            "plain or drafted call, or none."
        )


def check_rows(cache: Cache, batch_size: int, prompt_length: int, num_steps: int) -> None:
    """
    Raise a [`Refusal`] if a cache has no place for a call.

    Args:
        cache (`Cache`):
            The cache before the prompt is run.
        batch_size (`int`):
            Sequences of the call.
        prompt_length (`int`):
            Columns of the whole prompt, those that the cache has already included.
        num_steps (`int`):
            Most new tokens.
    """
    needed = prompt_length + num_steps - 1
    most = min((layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer), default=needed)
    if needed > most:
        raise Refusal(
            f"The static cache needs {needed} columns for the prompt and the new tokens, got {most}. Make it with a "
            "larger `max_cache_len`, or ask for fewer tokens."
        )
    layers = [layer for layer in cache.layers if holds_rows(layer)]
    batch_sizes, lengths = {len(layer.keys) for layer in layers}, {int(layer.get_seq_length()) for layer in layers}
    way_out = "Pass the cache that the turn before returned, or none."
    if batch_sizes - {batch_size}:
        raise Refusal(f"The cache must hold {batch_size} sequences, got {sorted(batch_sizes)}. {way_out}")
    if len(lengths) > 1:
        raise Refusal(f"The layers of the cache must have the same length, got {sorted(lengths)}. {way_out}")
    if any(length > prompt_length for length in lengths):
        raise Refusal(
            f"The prompt must go on from the {lengths.pop()} columns of the cache, got {prompt_length} tokens in all. "
            "Pass the whole conversation as `input_ids`, or a cropped cache."
        )
