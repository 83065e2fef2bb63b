"""A `tetrion serve` of one's own: started on a free port, known to be ready, ended with SIGTERM."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

TETRION = (sys.executable, "-m", "tetrion.entrypoints")
READY = re.compile(r"serving .* on (?P<url>http://\S+)")
END_TIMEOUT_S = 60.0

Process = subprocess.Popen[str]


@contextmanager
def server(
    arguments: Sequence[str],
    start_timeout_s: float = 120.0,
    *,
    environment: Mapping[str, str] | None = None,
    said: Callable[[str], object] = sys.stderr.write,
) -> Iterator[tuple[str, Process]]:
    """URL and process of a server that is ready. `said` gets each line of its stderr; after the block no more come.
    Raises RuntimeError if it is not ready in time, or does not end as it should."""
    line = (*TETRION, "serve", "--port", "0", *arguments)
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, errors="replace", env=environment) as process:
        reading = None
        try:
            url = _ready_url(process, start_timeout_s, said)
            reading = threading.Thread(target=_pass_on, args=(process, said), daemon=True)
            reading.start()
            yield url, process
            process.send_signal(signal.SIGTERM)
            if code := process.wait(END_TIMEOUT_S):
                raise RuntimeError(f"the server ended with exit code {code}")
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the server did not end within {END_TIMEOUT_S:g} s") from None
        finally:
            process.kill()
            if reading is not None:
                reading.join(5)


def _ready_url(process: Process, timeout_s: float, said: Callable[[str], object]) -> str:
    """What the server names once it is ready."""
    assert process.stderr is not None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        for text in process.stderr:
            said(text)
            if ready := READY.search(text):
                return ready["url"]
    finally:
        timer.cancel()
    raise RuntimeError(f"the server ended, or was killed because it was not ready within {timeout_s:g} s")


def _pass_on(process: Process, said: Callable[[str], object]) -> None:
    assert process.stderr is not None
    for text in process.stderr:
        said(text)
