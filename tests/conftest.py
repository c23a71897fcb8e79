import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """For the tests and the processes that they start: sums in one order, and no threads waiting for each other, which on a
    busy machine makes products this small 20 times slower."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
