"""What it costs to hand a picture on: our encoder beside Pillow's, and a served picture's way from engine to socket.

    python -m benchmarks.delivery benchmarks/results/delivery-cpu.json

*Encoders*: CPU time of one thread for one megapixel, Pillow's default and ours in turn, medians; size against Pillow's;
wall time with a thread for each processor. Photographs are made: fractal noise with edges and some noise of a sensor.
`shapes` are the embedded model's own pictures, cut out of `demo-sheet.png`.

*Served*: `tetrion serve` on CPU workers with random weights, one picture after another. `deliver_ms`: from the finished
picture to its last byte, as `/metrics` has it; `after_engine_ms`: what the client waits after the time that the engine
states; `cpu_ms`: of the server's process for each picture, its workers apart. `--baseline FOLDER` holds another
version's `tetrion` package, whose server is measured in the same run.
"""

import argparse
import asyncio
import io
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving import server
from tetrion.entrypoints import pictures
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.record import make_record, write_record

Row = dict[str, Any]
SIDE = 1024
PHOTOGRAPHS = {"smooth": (0.0, 2.3), "clean": (0.4, 2.1), "noisy": (1.5, 1.9), "noisier": (3.0, 1.7)}
"""Standard deviation of the sensor's noise, in levels, and the exponent of the fall of amplitudes with frequency."""
SHEET = Path(__file__).parent / "results" / "demo-sheet.png"
SHEET_GAP, SHEET_CELL, FRAME = 16, 256, 200
SHAPES = Path(__file__).parents[1] / "configs" / "models" / "shapes"
SERVED_SIDES = (512, 1024)


# Pictures -----------------------------------------------------------------------------------------------------------


def photograph(noise: float, exponent: float, side: int = SIDE) -> np.ndarray:
    """uint8 [side, side, 3]."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0

    def fractal() -> np.ndarray:
        spectrum = random.standard_normal((2, *frequency.shape))
        field = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) / frequency**exponent, s=(side, side))
        return field / field.std()

    light = fractal()
    image = np.stack([0.8 * light + 0.2 * fractal() for _ in range(3)], axis=-1)
    rows, columns = np.mgrid[:side, :side] / side
    image = 118 + 38 * image + 80 * (rows - 0.5)[..., None] + 40 * (columns - 0.5)[..., None]
    for y, x, radius in random.uniform((0, 0, 0.05), (1, 1, 0.2), (8, 3)):
        image[np.hypot(rows - y, columns - x) < radius] += random.uniform(-60, 60, 3)
    return np.clip(np.rint(image + random.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)


def shapes() -> list[np.ndarray]:
    """The pictures of the sheet, uint8 [256, 256, 3] each."""
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    lefts = range(SHEET_GAP, sheet.shape[1] - SHEET_CELL, SHEET_CELL + SHEET_GAP)
    framed = (sheet[:, SHEET_GAP : SHEET_GAP + SHEET_CELL] == FRAME).all(axis=(1, 2))
    tops = np.flatnonzero(framed)[::2] + 1
    return [sheet[top : top + SHEET_CELL, left : left + SHEET_CELL] for top in tops for left in lefts]


# Encoders -----------------------------------------------------------------------------------------------------------


def pillows(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def cpu_ms(encode: Callable[[], object]) -> float:
    begun_s = time.thread_time()
    encode()
    return 1e3 * (time.thread_time() - begun_s)


def measure_encoders(num_rounds: int) -> Iterator[Row]:
    kinds = {f"photograph, {name}": [photograph(*values)] for name, values in PHOTOGRAPHS.items()}
    kinds["shapes, 256x256"] = shapes()
    large = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for one in shapes()[:3]]
    kinds["shapes, enlarged"] = large
    encoders = Encoders()
    for kind, images in kinds.items():
        megapixels = sum(image.shape[0] * image.shape[1] for image in images) / 1e6
        theirs_ms, ours_ms, wall_ms = [], [], []
        for _ in range(num_rounds):
            theirs_ms.append(sum(cpu_ms(lambda image=image: pillows(image)) for image in images))  # type: ignore[misc]
            ours_ms.append(sum(cpu_ms(lambda image=image: pictures.encode(image)) for image in images))  # type: ignore[misc]
            wall_ms.append(1e3 * asyncio.run(wall_s(encoders, images)))
        pillow_ms, ms = statistics.median(theirs_ms) / megapixels, statistics.median(ours_ms) / megapixels
        pillow_bytes = sum(len(pillows(image)) for image in images)
        yield {
            "what": "encoder",
            "picture": kind,
            "pillow_ms_per_megapixel": round(pillow_ms, 1),
            "ms_per_megapixel": round(ms, 1),
            "time_ratio": round(ms / pillow_ms, 3),
            "threads": encoders.num_threads,
            "wall_ms_per_megapixel": round(statistics.median(wall_ms) / megapixels, 1),
            "size_ratio": round(sum(len(pictures.encode(image)) for image in images) / pillow_bytes, 3),
        }
    for picture_format in ("jpeg", "webp"):
        image = photograph(*PHOTOGRAPHS["noisy"])
        times_ms = [cpu_ms(lambda: pictures.encode(image, picture_format)) for _ in range(num_rounds)]  # type: ignore[arg-type]  # noqa: B023
        ms = statistics.median(times_ms) / (SIDE * SIDE / 1e6)
        yield {
            "what": "encoder",
            "picture": "photograph, noisy",
            "format": picture_format,
            "ms_per_megapixel": round(ms, 1),
        }


async def wall_s(encoders: Encoders, images: list[np.ndarray]) -> float:
    begun_s = time.perf_counter()
    for image in images:
        await encoders.run(lambda each, image=image: pictures.encode(image, each=each))  # type: ignore[misc]
    return time.perf_counter() - begun_s


# Served -------------------------------------------------------------------------------------------------------------


@contextmanager
def model_of_any_size() -> Iterator[Path]:
    """The embedded model's folder with larger sizes allowed; weights are random."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "shapes"
        shutil.copytree(SHAPES, model, ignore=shutil.ignore_patterns("__pycache__"))
        preset = json.loads((model / "preset.json").read_text())
        (model / "preset.json").write_text(json.dumps(preset | {"max_size": max(SERVED_SIDES)}))
        yield model


def measure_served(model: Path, version: str, num_pictures: int, baseline: Path | None) -> Iterator[Row]:
    environment = dict(os.environ) | ({} if baseline is None else {"PYTHONPATH": str(baseline)})
    line = ("--model", str(model), "--load-format", "dummy", "--devices", "cpu:1")
    with (
        server(line, start_timeout_s=600, environment=environment) as (url, process),
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        for side in SERVED_SIDES:
            yield {"what": "served", "version": version, "size": f"{side}x{side}"} | of_size(
                client, psutil.Process(process.pid), side, num_pictures
            )


def of_size(client: httpx.Client, process: psutil.Process, side: int, num_pictures: int) -> Row:
    draw(client, side)  # what happens once
    before, used_s = delivered(client), cpu_s(process)
    found = [draw(client, side) for _ in range(num_pictures)]
    used_s, after = cpu_s(process) - used_s, delivered(client)
    row: Row = {
        "pictures": num_pictures,
        "after_engine_ms": round(1e3 * statistics.median(after_s for after_s, _ in found), 1),
        "cpu_ms": round(1e3 * used_s / num_pictures, 1),
        "body_bytes": round(statistics.mean(num_bytes for _, num_bytes in found)),
    }
    if after is not None and before is not None:
        row["deliver_ms"] = round(1e3 * (after[0] - before[0]) / (after[1] - before[1]), 1)
    return row


def draw(client: httpx.Client, side: int) -> tuple[float, int]:
    """How long the client has waited after the engine's own time, and how much it got."""
    begun_s = time.perf_counter()
    body = {"prompt": "a red circle", "size": f"{side}x{side}", "num_inference_steps": 1, "seed": 1}
    response = client.post("/v1/images/generations", json=body)
    waited_s = time.perf_counter() - begun_s
    (picture,) = response.raise_for_status().json()["data"]
    engine_s = picture["latency_s"] - picture.get("deliver_s", 0.0)
    return waited_s - engine_s, len(response.content)


def delivered(client: httpx.Client) -> tuple[float, float] | None:
    """Sum of seconds and number of the deliveries so far; None of a version that counts none."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = {sample.name: sample.value for family in families for sample in family.samples}
    name = "tetrion_picture_deliver_seconds"
    return (found[f"{name}_sum"], found[f"{name}_count"]) if f"{name}_sum" in found else None


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=7, help="Of encoding each picture.")
    parser.add_argument("--pictures", type=int, default=10, help="To serve of each size.")
    parser.add_argument("--baseline", type=Path)
    given = parser.parse_args()
    rows = list(measure_encoders(given.rounds))
    with model_of_any_size() as model:
        if given.baseline is not None:
            rows += measure_served(model, "baseline", given.pictures, given.baseline.resolve())
        rows += measure_served(model, "this", given.pictures, None)
    arguments = ["FOLDER" if one == str(given.baseline) else one for one in sys.argv[1:]]
    record = make_record(f"python -m benchmarks.delivery {shlex.join(arguments)}", rows)
    print(write_record(record, given.output))


if __name__ == "__main__":
    main()
