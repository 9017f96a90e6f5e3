"""What drafts: assistants, which a user passes to `generate`, and what surrounds them."""

from transformers_msd.drafters.assistants import assistant_for


__all__ = ["assistant_for"]
