"""All figures of a machine: what is left is done, what is whole is not, a failure keeps nothing else back."""

from pathlib import Path

from benchmarks.gpu_figures import Done, Stage, run, stages
from benchmarks.proof_folder import Budget

TOUCH = "import sys; open(sys.argv[1], 'a').write('x')"


def stage(name: str, *line: str, seconds: float = 1.0, **more: object) -> Stage:
    return Stage(name, ("python", "-c", *line), seconds, **more)  # type: ignore[arg-type]


def test_stages_are_done_once_and_a_failed_one_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    todo = [
        stage("bad", "import sys; print('no'); sys.exit(3)"),
        stage("good", TOUCH, str(marks)),
        stage("long", TOUCH, str(marks), seconds=1e6),
    ]
    for _ in range(2):
        assert run(tmp_path, todo, Budget(100.0)) == ["bad"]
    assert marks.read_text() == "x"
    assert (tmp_path / "bad.log").read_text() == "no\n"
    done = Done(tmp_path)
    assert done.is_whole("good") and not done.is_whole("bad") and "long" not in done.tries
    assert done.tries["bad"]["code"] == 3


def test_a_stage_that_goes_on_is_told_what_is_left_until_it_is_whole(tmp_path: Path) -> None:
    wholes = iter([False, True])
    told = tmp_path / "told"
    script = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + ';')"
    todo = [stage("step", script, str(told), goes_on=True, is_whole=lambda _: next(wholes))]
    run(tmp_path, todo, Budget(100.0, lambda: 0.0))
    assert not Done(tmp_path).is_whole("step")
    run(tmp_path, todo, Budget(None))
    run(tmp_path, todo, Budget(None))
    assert Done(tmp_path).is_whole("step")
    assert told.read_text() == "--budget-s 80;;"


def test_the_stages_of_two_and_of_eight_devices(tmp_path: Path) -> None:
    def names(num_devices: int, degrees: tuple[int, ...]) -> list[str]:
        return [s.name for s in stages(tmp_path, f"cpu:{num_devices}", ("--model", "shapes"), degrees, num_devices)]

    assert names(2, (1, 2)) == [
        "profile", "step", "energy-1", "energy-2", "links", "gemms", "decode", "encode", "meter", "bf16", "served",
        "served-embedded", "live", "saving",
    ]  # fmt: skip
    assert names(8, (1, 2, 3, 4, 6, 8))[-1] == "paper"
    lines = {s.name: s.line for s in stages(tmp_path, "cpu:8", ("--model", "shapes"), (1, 8), 8)}
    assert "cpu:1" in lines["energy-1"] and "cpu:8" in lines["energy-8"]
    assert str(tmp_path / "profile.json") in lines["live"] and str(tmp_path / "profile.json") in lines["paper"]
