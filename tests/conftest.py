import gc

import pytest
import torch

import transformers_msd.costs.calibration  # and `generate` takes our assistants from here on


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are quickest on one thread, and the workers of a parallel run don't get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> None:
    """What was imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_calibration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `transformers-msd tune` measured on this machine must not size the trees of tests."""
    transformers_msd.costs.calibration.HF_HOME = str(tmp_path_factory.mktemp("hf_home"))
