"""The tokens of one call: how they are chosen, handed over, returned and counted."""
