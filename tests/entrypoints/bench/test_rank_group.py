"""Ranks of another system: what rank 0 says, and how a group ends."""

from pathlib import Path

import pytest

from tetrion.entrypoints.bench.rank_group import run_ranks

RANK = """
import json, os, sys, time
job, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
seen = os.environ["CUDA_VISIBLE_DEVICES"]
print(json.dumps({"rank": rank, "of": os.environ["WORLD_SIZE"], "sees": seen}), flush=True)
if rank == job.get("fails"):
    sys.exit("this rank cannot")
time.sleep(job.get("sleep", 0))
"""


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_only_rank_0_answers_and_ranks_see_their_devices() -> None:
    assert run_ranks("some_rank", {}, [2, 0], 100) == ([{"rank": 0, "of": "2", "sees": "2,0"}], None)


def test_devices_are_numbers_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    answers, _ = run_ranks("some_rank", {}, [2, 1], 100)
    assert answers[0]["sees"] == "GPU-c,GPU-b"


def test_a_rank_that_fails_ends_the_others() -> None:
    answers, reason = run_ranks("some_rank", {"fails": 1, "sleep": 1000}, [0, 1], 100)
    assert len(answers) == 1 and reason == "rank 1: this rank cannot"


def test_a_deadline_keeps_what_was_said() -> None:
    answers, reason = run_ranks("some_rank", {"sleep": 1000}, [0], 5)
    assert len(answers) == 1 and reason == "not done within 5 s"
