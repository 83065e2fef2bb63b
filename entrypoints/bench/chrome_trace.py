"""A recorded run in Chrome's trace event format, which chrome://tracing and Perfetto (ui.perfetto.dev) open.

One track for each device with a slice for each command; one process of its own with an async slice for each request
from arrival to finish, and an instant for its deadline. Times are microseconds. Format: "Trace Event Format", Google.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tetrion.entrypoints.bench.recording import Recording

DEVICES, REQUESTS = 1, 2
"""Process ids of the two groups of tracks."""


def write_chrome_trace(recording: Recording, path: Path) -> None:
    document = {
        "displayTimeUnit": "ms",
        "otherData": {"policy": recording.policy, "mode": recording.mode, "mix": recording.mix},
        "traceEvents": [*_names(recording), *_slices(recording), *_requests(recording)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def _names(recording: Recording) -> Iterator[dict[str, Any]]:
    for pid, name in ((DEVICES, "devices"), (REQUESTS, "requests")):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    for device in range(recording.run.num_devices):
        yield {"ph": "M", "name": "thread_name", "pid": DEVICES, "tid": device, "args": {"name": f"GPU {device}"}}


def _slices(recording: Recording) -> Iterator[dict[str, Any]]:
    for chunk in recording.chunks:
        request = recording.run.outcomes[chunk.request].request
        degree = f" ×{len(chunk.members)}" if chunk.stage == "denoise" else f" {chunk.stage}"
        for member in chunk.members:
            yield {
                "ph": "X",
                "pid": DEVICES,
                "tid": member,
                "ts": 1e6 * chunk.start_s,
                "dur": 1e6 * (chunk.end_s - chunk.start_s),
                "name": f"#{chunk.request} {request.width}x{request.height}{degree}",
                "cat": chunk.stage,
                "args": {
                    "request": chunk.request,
                    "members": chunk.members,
                    "step_index": chunk.step_index,
                    "chunk_steps": chunk.chunk_steps,
                    "failed": chunk.failed,
                },
            }


def _requests(recording: Recording) -> Iterator[dict[str, Any]]:
    for number, outcome in enumerate(recording.run.outcomes):
        request = outcome.request
        common = {"pid": REQUESTS, "tid": 0, "cat": "request", "id": number}
        name = f"#{number} {request.width}x{request.height}"
        end_s = recording.run.end_s if outcome.finished_s is None else outcome.finished_s
        args = {
            "slo_s": request.slo_s,
            "latency_s": outcome.latency_s,
            "met": outcome.is_met,
            "degrees": outcome.degrees,
        }
        yield {**common, "ph": "b", "name": name, "ts": 1e6 * request.arrival_s, "args": args}
        if request.slo_s is not None:
            deadline_us = 1e6 * (request.arrival_s + request.slo_s)
            if deadline_us <= 1e6 * end_s:
                yield {**common, "ph": "n", "name": "deadline", "ts": deadline_us}
        yield {**common, "ph": "e", "name": name, "ts": 1e6 * end_s}
