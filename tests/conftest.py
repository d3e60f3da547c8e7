"""Where LATEPHASE_REQUIRE_BACKENDS lists backends ("native triton"), a missing one fails the run.

Every test draws from generators seeded anew, alone or among others; LATEPHASE_TEST_SEED (0) chooses other numbers.
"""

import importlib.util
import os
import random

import numpy as np
import pytest
import torch

import latephase_kernels as lp


@pytest.fixture(autouse=True)
def _seed():
    seed = int(os.environ.get("LATEPHASE_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _threads():
    """A test may set the number of threads: the next one has what there was before."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """Tensors of small networks gain nothing from threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def poison_unwritten_memory():
    """In deterministic mode torch fills its new tensors with NaN; the ops' own are filled by GLIBC_TUNABLES."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    """Each backend of a CPU in turn."""
    lp.set_backend(request.param)
    yield request.param
    lp.set_backend("auto")


@pytest.fixture
def native_backend():
    lp.set_backend("native")
    yield
    lp.set_backend("auto")


@pytest.fixture
def triton_backend():
    lp.set_backend("triton")
    yield
    lp.set_backend("auto")


def pytest_sessionstart(session):
    required = os.environ.get("LATEPHASE_REQUIRE_BACKENDS", "").split()
    if "native" in required and lp.backend_for(torch.zeros(1)) != "native":
        pytest.exit("the native CPU backend is required, but did not load", returncode=1)
    if "triton" in required and importlib.util.find_spec("triton") is None:
        pytest.exit("triton is required, but not installed", returncode=1)
