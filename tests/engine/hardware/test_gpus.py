"""Finding GPUs without torch: who is asked, and what CUDA_VISIBLE_DEVICES leaves of it."""

from pathlib import Path

import pytest

from tetrion.engine.hardware import gpus


@pytest.fixture(autouse=True)
def ask_anew() -> None:
    gpus.installed_gpus.cache_clear()


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, ("A", "B", "C")),
        ("", ()),
        ("-1", ()),
        ("2,0", ("C", "A")),
        ("1, 7, 0", ("B",)),
        ("GPU-5f3a,GPU-77aa", ("A", "A")),
    ],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: tuple[str, ...]) -> None:
    monkeypatch.setattr(gpus, "installed_gpus", lambda: ("A", "B", "C"))
    assert gpus.visible_gpus({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}) == expected


def test_the_drivers_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "_ask_nvml", lambda: ())
    monkeypatch.setattr(gpus, "PROC_GPUS", tmp_path)
    for name in ("0000:1a:00.0", "0000:0a:00.0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(f"Model: \t\t NVIDIA {name}\nIRQ: 1\n")
    assert gpus.installed_gpus() == ("NVIDIA 0000:0a:00.0", "NVIDIA 0000:1a:00.0")


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpus, "_ask_nvml", lambda: ())
    monkeypatch.setattr(gpus, "PROC_GPUS", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.installed_gpus() == ("NVIDIA H100 80GB HBM3",)
