import gc
import math
import os
from collections import defaultdict
from zlib import crc32

import pytest
import torch


# Nobody asks the Hub or is told of a run: what is read when libraries are imported, before they are.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import transformers_msd.costs.calibration  # and `generate` takes our assistants from here on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="of each table one of so many cases, drawn by their names")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but a share of each table. What each process of a run leaves out is the same."""
    tables = defaultdict(list)
    for item in items:
        tables[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for table in tables.values():
        table.sort(key=lambda item: crc32(item.nodeid.encode()))
        kept.update(table[: math.ceil(len(table) / config.getoption("every"))])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
    for item in items:
        if any(item.iter_markers("slow")) or any(item.iter_markers("gpu")):
            item.add_marker(pytest.mark.timeout(0))  # they may take as long as they do


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
