"""Recorded runs in virtual time again."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.research.replay import agreement, command, drift_of, measured_profile, replays, spread_of
from tests.entrypoints.bench.conftest import PROFILE, recorded
from tetrion.entrypoints.bench.recording import Recording, write_recordings
from tetrion.entrypoints.errors import InputError


@pytest.mark.parametrize("policy", ["horizon", "fixed-2", "rssp"])
def test_an_undisturbed_run_replays_exactly(policy: str) -> None:
    (recording,) = recorded((policy,))
    row = agreement(recording, replays(recording))
    assert row["attainment_difference"] == 0
    assert row["mean_ratio"] == pytest.approx(1.0, abs=1e-3) and row["p95_ratio"] == pytest.approx(1.0, abs=1e-3)


def test_the_measured_profile_is_what_the_run_saw() -> None:
    (recording,) = recorded(bias=0.5)
    measured = measured_profile(recording)
    for size in ("256x256", "2048x2048"):
        assert measured.classes[size].decode_ms == pytest.approx(1.5 * PROFILE.classes[size].decode_ms)
        used = {
            len(c.members) for c in recording.chunks if c.stage == "denoise" and _size(recording, c.request) == size
        }
        assert used
        for degree in used:
            step_ms = PROFILE.classes[size].step_ms[degree]
            assert measured.classes[size].step_ms[degree] == pytest.approx(1.5 * step_ms)


def _size(recording: object, number: int) -> str:
    request = recording.run.outcomes[number].request  # type: ignore[attr-defined]
    return f"{request.width}x{request.height}"


def test_a_run_that_was_slower_and_noisy_is_predicted_from_its_own_times() -> None:
    (recording,) = recorded(("fixed-1",), bias=0.3, noise=0.05)
    own, table = agreement(recording, replays(recording)), agreement(recording, replays(recording, PROFILE))
    assert own["mean_ratio"] == pytest.approx(1.0, abs=0.05) and abs(own["attainment_difference"]) <= 0.08
    assert table["mean_ratio"] < 0.9


def test_several_seeds_spread_as_the_recorded_times_did() -> None:
    (recording,) = recorded(("horizon",), noise=0.1)
    drawn = np.concatenate([ratios for (_, stage), ratios in spread_of(recording).items() if stage == "denoise"])
    assert np.std(drawn) == pytest.approx(0.1, rel=0.25) and np.mean(drawn) == pytest.approx(1.0, abs=0.05)
    runs = replays(recording, seeds=4)
    again = replays(recording, seeds=4)
    assert [run.outcomes for run in again] == [run.outcomes for run in runs] and len(runs) == 4
    row = agreement(recording, runs)
    least_s, most_s = row["mean_s"]["range"]
    assert row["simulated_runs"] == 4 and least_s < row["mean_s"]["simulated"] < most_s
    assert least_s * 0.8 < row["mean_s"]["recorded"] < most_s * 1.25
    (exact,) = recorded()
    assert all(ratio == pytest.approx(1.0) for ratios in spread_of(exact).values() for ratio in ratios)
    assert "range" not in agreement(exact, replays(exact))["attainment"]


def test_where_arrivals_fall_in_rounds_counts_where_rounds_lie_on_the_clock() -> None:
    """Nothing but the start differs here. Where it was not recorded, it may have been anywhere."""
    for policy, on_the_clock in (("fixed-1", False), ("tetriserve", True)):
        (recording,) = recorded((policy,))
        assert recording.run.zero_s == 0.0

        def means_s(zero_s: float | None, recording: Recording = recording) -> set[float]:
            begun = msgspec.structs.replace(recording, run=msgspec.structs.replace(recording.run, zero_s=zero_s))
            row = agreement(begun, replays(begun, seeds=4))
            return {round(mean_s, 6) for mean_s in row["mean_s"]["range"]}

        assert len(means_s(0.0)) == len(means_s(1000.3)) == 1
        assert (means_s(0.0) != means_s(1000.3)) == on_the_clock
        assert len(means_s(None)) == (2 if on_the_clock else 1)


def test_with_drift_a_machine_that_slowed_down_is_followed() -> None:
    """In the second half of the run everything took three times as long."""
    (recording,) = recorded(("fixed-2",))
    middle_s = recording.run.end_s / 2
    chunks = tuple(
        msgspec.structs.replace(chunk, net_s=chunk.net_s * (3 if chunk.start_s > middle_s else 1))
        for chunk in recording.chunks
    )
    slowed = msgspec.structs.replace(recording, chunks=chunks)
    slowdown = drift_of(slowed, PROFILE)
    assert slowdown(1.0) == pytest.approx(1.0) and slowdown(middle_s + 5) == pytest.approx(3.0)
    assert slowdown(1e6) == pytest.approx(3.0)
    (with_drift,), (without,) = replays(slowed, PROFILE, drift=True), replays(slowed, PROFILE)
    pairs = [(a.finished_s or 0.0, b.finished_s) for a, b in zip(without.outcomes, with_drift.outcomes, strict=True)]
    early = [(one, other) for one, other in pairs if one < middle_s - 4]
    assert early and all(other == pytest.approx(one) for one, other in early)
    assert with_drift.end_s > without.end_s + 5


def test_the_command_reports_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recordings(tmp_path / "r.jsonl", recorded(("horizon", "fixed-2")))
    record = command(recordings=tmp_path / "r.jsonl", output=tmp_path / "a.json")
    assert [row["policy"] for row in record["rows"]] == ["horizon", "fixed-2"]
    assert (tmp_path / "a.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "(+0.0 points)" in lines[0] and "(×1.000)" in lines[0]
    (tmp_path / "bad.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"bad\.jsonl: line 1"):
        command(recordings=tmp_path / "bad.jsonl")
