"""Token trees as plain tensors, and which of their tokens stand: nothing here knows a model."""
