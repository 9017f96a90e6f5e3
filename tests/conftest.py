import pytest
import torch

import transformers_msd  # noqa: F401  `generate` takes our assistants from here on


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are quickest on one thread, and the workers of a parallel run don't get in each other's way."""
    torch.set_num_threads(1)
