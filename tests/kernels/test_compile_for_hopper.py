"""What the compiler can tell without a GPU: every kernel's H100 code is of the kind that it was written for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_MEMORY_BYTES = 232_448  # the most that one program can have on an H100
PROGRAM = Path(__file__).with_name("compile_for_hopper.py")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: this one may run Triton's interpreter, which cannot be switched off again."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, "-P", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_spills_and_everything_fits(kernels: dict[str, Any]) -> None:
    for name, kernel in kernels.items():
        assert kernel["local"] == 0, f"{name}: {kernel['local']} bytes of registers spilled"
        assert kernel["shared"] <= SHARED_MEMORY_BYTES, f"{name}: {kernel['shared']} bytes of shared memory"


WIDE = ["qk_norm_rope_push", "qk_norm_rope_push of 3", "qk_norm_rope_push of copies", "output_push"]
WIDE += ["residual_modulate", "group_norm_silu", "state_pull", "state_read", "state_push", "velocity_push"]
WIDE += ["euler_step", "guided_step", "qk_norm_rope_push of grouped heads"]


@pytest.mark.parametrize("name", WIDE)
def test_all_stores_are_16_bytes_wide(kernels: dict[str, Any], name: str) -> None:
    ptx = kernels[name]["ptx"]
    assert ptx["store"] == ptx["wide_store"] > 0, f"{name}: {ptx}"


def test_pushing_two_segments_takes_no_more_registers_than_a_quarter_of_a_processor_allows(
    kernels: dict[str, Any],
) -> None:
    """Of 65,536; programs of 128 threads, four at a time: what it took when two segments were all it knew."""
    assert kernels["qk_norm_rope_push"]["registers"] <= 128


def test_eulers_step_is_one_multiply_add(kernels: dict[str, Any]) -> None:
    """Of each of a thread's 8 elements: so its bits are those that the arithmetic of one line has."""
    assert kernels["euler_step"]["ptx"]["multiply_add"] == 8


def test_attention_uses_tensor_cores_and_tensor_copies(kernels: dict[str, Any]) -> None:
    attention = {name: kernel["ptx"] for name, kernel in kernels.items() if name.startswith("attention")}
    assert len(attention) >= 3
    for name, ptx in attention.items():
        assert ptx["tensor_core"] > 0 and ptx["tensor_copy"] > 0 and ptx["load"] == 0, f"{name}: {ptx}"


def test_barrier_releases_and_acquires_at_system_scope(kernels: dict[str, Any]) -> None:
    ptx = kernels["barrier"]["ptx"]
    assert ptx["system_release"] == 1 and ptx["system_fence"] >= 1, ptx


def test_versions_are_released_and_acquired_at_system_scope(kernels: dict[str, Any]) -> None:
    for name in ("wait_version", "wait_for_state"):
        assert kernels[name]["ptx"]["system_fence"] >= 1
    for name in ("confirm_version", "publish_version"):
        assert kernels[name]["ptx"]["system_release"] == 1, kernels[name]["ptx"]
