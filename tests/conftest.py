import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import sum_in_order

    sum_in_order()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    # What takes long begins first, so that no worker of a parallel run is left with it at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
