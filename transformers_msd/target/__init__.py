"""The target as one call decodes with it, and what it hands to a draft."""
