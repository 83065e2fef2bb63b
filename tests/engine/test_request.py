"""Results as programs and notebooks take them, and the names that a program imports."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tetrion.engine
from tetrion.engine.request import ImageResult

PICTURE = np.random.default_rng(3).integers(0, 256, (48, 32, 3), dtype=np.uint8)


@pytest.fixture
def result() -> ImageResult:
    return ImageResult(
        request_id="r1",
        model="shapes",
        image=PICTURE,
        prompt="a red circle",
        width=32,
        height=48,
        num_steps=4,
        seed=7,
        degrees=(1, 1, 2, 2),
        num_text_tokens=3,
        latency_s=0.5,
        queue_s=0.1,
        encode_s=0.1,
        denoise_s=0.2,
        decode_s=0.1,
        slo_met=None,
    )


def test_a_result_is_a_pil_image_and_a_notebooks_picture(result: ImageResult) -> None:
    assert np.array_equal(np.asarray(result.pil), PICTURE)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(result._repr_png_()))), PICTURE)


@pytest.mark.parametrize(("name", "image_format"), [("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.webp", "WEBP")])
def test_a_result_is_saved_as_its_name_says(result: ImageResult, tmp_path: Path, name: str, image_format: str) -> None:
    result.save(tmp_path / name)
    result.save(str(tmp_path / name))
    saved = Image.open(tmp_path / name)
    assert saved.format == image_format and saved.size == (32, 48)


def test_an_ending_that_is_no_format_is_refused(result: ImageResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown file extension"):
        result.save(tmp_path / "picture.what")


def test_a_result_is_shown_in_a_line(result: ImageResult) -> None:
    assert repr(result) == "ImageResult('r1', shapes 32x48, 4 steps, seed 7, 0.500 s)"


def test_every_name_of_the_engine_can_be_imported() -> None:
    for name in tetrion.engine.__all__:
        assert getattr(tetrion.engine, name).__name__ == name
    assert tetrion.engine.__version__.count(".") >= 2
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        _ = tetrion.engine.Motor


def test_a_request_can_be_made_without_torch() -> None:
    program = "import sys; from tetrion.engine import ImageRequest, EngineConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0
