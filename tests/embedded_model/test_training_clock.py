"""A schedule that goes on from where a run was cut off."""

import pytest

from benchmarks.embedded_model.train import Progress
from benchmarks.embedded_model.training_clock import Clock


def test_a_clock_begins_at_the_share_that_is_done(monkeypatch):
    now = 100.0
    monkeypatch.setattr("benchmarks.embedded_model.training_clock.time.monotonic", lambda: now)
    clock = Clock(10.0, warmup_steps=1, hold=0.2, done=0.6)
    assert clock.tick() and clock.progress == pytest.approx(0.6)
    assert clock.rate(0) == pytest.approx(0.5)
    now = 105.0
    assert clock.tick() and clock.progress == pytest.approx(0.8)
    now = 110.0
    assert not clock.tick()


def test_a_run_that_was_cut_off_knows_what_it_spent(tmp_path):
    output = tmp_path / "model"
    first = Progress(output)
    assert not first.is_resumed and first.done == 0.0
    first._began -= 50.0
    first.save(done=0.25)
    second = Progress(output)
    assert second.is_resumed and second.done == 0.25
    assert 50.0 <= second.spent_s < 60.0
    second.finish()
    assert not Progress(output).is_resumed
