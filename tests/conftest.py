"""One thread a process, a patient garbage collector, and no test that needs a GPU where there is none."""

from __future__ import annotations

import gc

import diffusers  # noqa: F401  what is frozen below: it stays for good
import pytest
import torch

torch.set_num_threads(1)

# Building graphs allocates millions of objects, and going through all that is alive each time took 6 % of test_requests.
gc.freeze()
gc.set_threshold(100_000, 20, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
