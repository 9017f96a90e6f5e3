"""What a model is, read from its config and class: nothing here runs a model."""
