"""Draft models, a folder for each family, as in `transformers.models`; none of them knows a drafter."""
