"""Which caches can take rows back."""

from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer


def check_cache(cache: Cache) -> None:
    """Raise a `ValueError` unless single rows can be taken out of a cache."""
    layer_types = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:
        layer_types.add(cache.layer_class_to_replicate)
    expected = {DynamicCache: DynamicLayer, StaticCache: StaticLayer}.get(type(cache))
    unsupported = sorted(layer_type.__name__ for layer_type in layer_types if layer_type is not expected)
    if expected is None or unsupported or cache.offloading:
        raise ValueError(
            "Drafting needs a `DynamicCache` or `StaticCache` of full-attention layers that stays on its device, got "
            f"{type(cache).__name__}{f' with layers {unsupported}' if unsupported else ''}"
            f"{' with offloading' if cache.offloading else ''}. Sliding-window, recurrent, quantised and offloaded "
            "caches can't take back rejected rows: drop `cache_implementation` and the cache, or generate "
            "without `assistant_model`."
        )
