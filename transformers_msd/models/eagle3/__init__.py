"""Drafts that read several of the target's layers: EAGLE-3 (arXiv 2503.01840)."""
