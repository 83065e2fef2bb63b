"""Words arrive in the order in which they were sent, also when the ring has gone round."""

import os

import pytest
import torch

from tetrion.engine.parallel.gpu.word_upload import NUM_ROWS, WordUpload

ON_GPU = os.environ["TRITON_INTERPRET"] == "0"


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_row_is_reused_before_its_copy_is_done(name: str) -> None:
    if name == "cuda" and not ON_GPU:
        pytest.skip("needs a GPU")
    device = torch.device(name)
    upload, count = WordUpload(device, 4), 3 * NUM_ROWS
    targets = torch.full((count, 5), -1, dtype=torch.int32, device=device)
    if name == "cuda":
        torch.cuda._sleep(50_000_000)
    for i in range(count):
        upload.copy([i, -i, 2**31 - 1, -(2**31)], targets[i])
        upload.copy([7], targets[i, 3:])
    assert targets.tolist() == [[i, -i, 2**31 - 1, 7, -1] for i in range(count)]
