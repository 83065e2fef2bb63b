"""Other people's parallel programs, in the way that torchrun starts them: one process a rank, NCCL between them.

Owns the processes' life: a rank that fails, or a deadline, ends all of them. What rank 0 printed until then is kept.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from tetrion.entrypoints.bench.line_process import Message, tail

POLL_S = 0.1
GRACE_S = 3.0
"""How long other ranks may go on after one has failed: the first to fail is not always the one that knows why."""


class RankResult(NamedTuple):
    """`answers`: the JSON lines of rank 0. `reason`: why it did not come to its end; None if it did."""

    answers: list[Message]
    reason: str | None


def run_ranks(module: str, job: Message, devices: Sequence[int], timeout_s: float) -> RankResult:
    """Run `module` with `job` as its argument: a rank for each of `devices` (CUDA's numbers), seen there as 0, 1, …"""
    common = os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(_visible_names(devices)),
        "WORLD_SIZE": str(len(devices)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with contextlib.ExitStack() as files:
        errors = [files.enter_context(tempfile.TemporaryFile()) for _ in devices]
        answers = files.enter_context(tempfile.TemporaryFile())
        ranks = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", module, json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=answers if rank == 0 else subprocess.DEVNULL,
                stderr=errors[rank],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(len(devices))
        ]
        reason = _wait(ranks, errors, timeout_s)
        answers.seek(0)
        return RankResult([json.loads(line) for line in answers.read().splitlines() if line.endswith(b"}")], reason)


def _wait(ranks: list[subprocess.Popen[bytes]], errors: Sequence[IO[bytes]], timeout_s: float) -> str | None:
    until_s = time.monotonic() + timeout_s
    try:
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes):
                until_s = min(until_s, time.monotonic() + GRACE_S)
            if time.monotonic() > until_s:
                break
            time.sleep(POLL_S)
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank}: {tail(errors[rank])}"
        return f"not done within {timeout_s:.0f} s" if None in codes else None
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _visible_names(devices: Sequence[int]) -> list[str]:
    """What to call these devices in CUDA_VISIBLE_DEVICES, of which they are numbers themselves."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [names.split(",")[device] if names else str(device) for device in devices]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: Any = listener.getsockname()[1]
        return int(port)
