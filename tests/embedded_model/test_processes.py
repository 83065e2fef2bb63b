"""Two training processes keep one model: means of gradients, the first one's clock."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from benchmarks.embedded_model import processes

processes.join(torch.device("cpu"))
weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(1))]
weights[0].grad = torch.full((3,), 1.0 + processes.rank)
weights[1].grad = torch.arange(4.0).view(2, 2) * (1 - processes.rank)
processes.average_gradients(weights)
assert weights[0].grad.tolist() == [1.5, 1.5, 1.5]
assert weights[1].grad.tolist() == [[0.0, 0.5], [1.0, 1.5]]
assert weights[2].grad is None
assert processes.shared(7.25 + processes.rank) == 7.25
processes.wait_for_all()
processes.leave()
print("same", flush=True)
"""


def test_two_processes_average_gradients_and_share_a_value(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [sys.executable, *launch, "--rdzv-endpoint", "127.0.0.1:0", "--no-python", sys.executable, str(program)],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == 2
