"""The distance from diffusers in fp32, where ours is fp32 too."""

import pytest

from benchmarks import bf16_distance


@pytest.mark.usefixtures("fork_server")
def test_in_fp32_ours_are_diffusers_latents_and_bf16_is_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_distance, "PROMPTS", bf16_distance.PROMPTS[:1])
    (row,) = bf16_distance.measure("cpu:1", "shapes", [(128, 96)], num_steps=2)
    assert (row["px"], row["num_steps"]) == ("128x96", 2)
    assert row["ours"] < 1e-4 < row["diffusers"]
    assert row["ratio"] == row["ours"] / row["diffusers"]
