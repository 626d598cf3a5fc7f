"""Shared by all tests: single-threaded torch, so that two cores serve two test processes."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
