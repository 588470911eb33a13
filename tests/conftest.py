import os
import signal
import sys
import threading

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

if threading.current_thread() is threading.main_thread():
    # A shell's background job ignores Ctrl-C, and its processes would too, which some tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import sum_in_order

    sum_in_order()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    # A CUDA error stays with its process and would fail every test behind it: xdist starts another worker.
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device is lost to this worker: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def pytest_collection_modifyitems(items):
    # What takes long begins first, so that no worker of a parallel run is left with it at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
