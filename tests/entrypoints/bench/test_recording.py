"""What a recorder writes down of a run, and files of it."""

import gzip
import itertools
from collections import Counter
from pathlib import Path

import pytest

from tests.entrypoints.bench.conftest import recorded
from tetrion.entrypoints.bench.recording import read_recordings, write_recordings
from tetrion.entrypoints.bench.simulation import Loss


def test_every_step_of_every_request_is_there_once_and_no_device_is_in_two_places() -> None:
    (recording,) = recorded()
    steps: Counter[int] = Counter()
    for chunk in recording.chunks:
        steps[chunk.request] += chunk.chunk_steps
    assert set(steps.values()) == {28} and len(steps) == 25
    assert Counter(chunk.request for chunk in recording.chunks if chunk.stage == "decode") == Counter(range(25))
    for device in range(4):
        times = sorted((chunk.start_s, chunk.end_s) for chunk in recording.chunks if device in chunk.members)
        assert all(end_s <= next_s + 1e-9 for (_, end_s), (next_s, _) in itertools.pairwise(times))


def test_gpu_seconds_are_those_of_the_chunks_and_finish_is_the_end_of_the_decode() -> None:
    (recording,) = recorded()
    run = recording.run
    assert run.gpu_s == pytest.approx(sum(len(c.members) * (c.end_s - c.start_s) for c in recording.chunks))
    for chunk in recording.chunks:
        if chunk.stage == "decode":
            assert run.outcomes[chunk.request].finished_s == pytest.approx(chunk.end_s)
    assert run.loop is not None and run.loop.num_commands == len(recording.chunks) and len(run.decision_s) > 25


def test_what_a_lost_worker_cost_is_recorded_as_failed() -> None:
    whole, torn = recorded()[0], recorded(losses=(Loss(time_s=20.0, device_id=1),))[0]
    failed = [chunk for chunk in torn.chunks if chunk.failed]
    assert failed and all(chunk.end_s == pytest.approx(20.0, abs=0.2) for chunk in failed)
    assert all(1 not in chunk.members for chunk in torn.chunks if chunk.start_s > 20.0)
    assert not any(chunk.failed for chunk in whole.chunks)


def test_a_file_returns_what_was_written(tmp_path: Path) -> None:
    recordings = tuple(recorded(("horizon", "fixed-2")))
    write_recordings(tmp_path / "r.jsonl", recordings)
    assert read_recordings(tmp_path / "r.jsonl") == recordings


def test_a_compressed_file_returns_what_was_written_and_a_torn_one_is_named(tmp_path: Path) -> None:
    recordings = tuple(recorded())
    plain, packed = tmp_path / "r.jsonl", tmp_path / "r.jsonl.gz"
    write_recordings(plain, recordings)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_recordings(packed) == recordings
    for torn in (packed.read_bytes()[:-9], packed.read_bytes()[:2], packed.read_bytes()[:200] + bytes(300)):
        packed.write_bytes(torn)
        with pytest.raises(ValueError, match=r"r\.jsonl\.gz: not a recording"):
            read_recordings(packed)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('\n{"policy": "horizon"}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl: line 2: not a recording: .*missing required field"):
        read_recordings(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no recording"):
        read_recordings(path)
