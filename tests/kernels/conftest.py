"""Where the kernels run: on a GPU if there is one (marker `gpu`), otherwise in Triton's interpreter on the CPU."""

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

import tests.engine.parallel.quick_interpreter  # noqa: F401

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The tests' device; new tensors of a test are made there, from fresh random numbers (the seed is printed)."""
    seed, num_threads = secrets.randbits(32), torch.get_num_threads()
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    with torch.device(request.param) as device:
        yield device
    torch.set_num_threads(num_threads)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
