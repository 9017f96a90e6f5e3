"""Rows of a tree behind a key-value cache: the only place that knows how caches are laid out."""
