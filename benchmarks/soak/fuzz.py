"""Odd input of three kinds: bodies, raw HTTP, lines of `tetrion batch`. Is there a 5xx, a hang, a traceback?

Every case is known by seed and number (`mutation.py`): `--first NUMBER` with a count of 1 sends it again, alone. Among
them good requests are sent whose pictures must be right. The server draws at most two steps of 128², so that odd input
that is good after all costs little.
"""

import asyncio
import base64
import itertools
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.soak import load
from benchmarks.soak.fuzz_lines import fuzz_lines
from benchmarks.soak.mutation import body_case, stream_case
from benchmarks.soak.processes import figures_of
from benchmarks.soak.report import Check, Row, finish, none_of
from benchmarks.soak.server import Server, served

LIMITS = ("--max-steps", "2", "--max-n", "2", "--max-pixels", str(128 * 128))
QUICK = ("--head-timeout-s", "1", "--body-timeout-s", "1", "--keep-alive-s", "1")
BODIES_AT_ONCE, STREAMS_AT_ONCE = 16, 128
CONTROL_EVERY = 100
HANG_S = 30.0
"""Far above all limits of `QUICK`."""
SHOWN = 20
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Findings:
    """Outcomes, and the cases among them that should not be."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.bad: list[Row] = []

    def note(self, number: int, outcome: str, is_bad: bool, sent: bytes) -> None:
        self.outcomes[outcome] += 1
        if is_bad and len(self.bad) < SHOWN:
            self.bad.append({"number": number, "outcome": outcome, "sent": base64.b64encode(sent[:2000]).decode()})

    @property
    def num_5xx(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("5"))


async def in_parallel(numbers: range, at_once: int, one: Callable[[int], Awaitable[None]]) -> None:
    """`one(number)` for each."""
    left = iter(numbers)

    async def work() -> None:
        for number in left:
            await one(number)

    await asyncio.gather(*(work() for _ in range(at_once)))


async def fuzz_bodies(server: Server, known: Sequence[load.Picture], seed: int, numbers: range) -> tuple[Findings, int]:
    """The second value: good requests among them that did not bring the right picture."""
    findings, wrong, good = Findings(), 0, itertools.cycle(known)

    async def send(number: int) -> None:
        nonlocal wrong
        if number % CONTROL_EVERY == 0:
            outcome = await load.ask_for(server, next(good))
            wrong += outcome != "right"
        case = body_case(known[number % len(known)].body, seed, number)
        is_bad = True
        try:
            answer = await server.http.post(load.GENERATIONS, content=case.body, headers=case.headers, timeout=HANG_S)
        except httpx.TimeoutException:
            outcome = "hung"
        except httpx.TransportError as error:
            outcome = type(error).__name__
        else:
            code = "drawn" if answer.status_code == 200 else load.code_of(answer.content)
            outcome, is_bad = f"{answer.status_code} {code}", answer.status_code >= 500 or code == "?"
        findings.note(number, outcome, is_bad, case.body)

    await in_parallel(numbers, BODIES_AT_ONCE, send)
    return findings, wrong


async def fuzz_streams(server: Server, seed: int, numbers: range) -> Findings:
    findings = Findings()

    async def send(number: int) -> None:
        case = stream_case(seed, number)
        answered, is_closed = await exchange(server.address, case.pieces, case.ends)
        statuses = STATUS.findall(answered)
        outcome = b" ".join(statuses[:3]).decode() or "closed without an answer"
        if not is_closed:
            outcome = "hung"
        is_bad = not is_closed or any(status.startswith(b"5") for status in statuses)
        findings.note(number, outcome, is_bad, b"".join(case.pieces))

    await in_parallel(numbers, STREAMS_AT_ONCE, send)
    return findings


async def exchange(address: tuple[str, int], pieces: Sequence[bytes], ends: bool) -> tuple[bytes, bool]:
    """What came back until the server closed, and whether it did."""
    reader, writer = await asyncio.open_connection(*address)
    got = bytearray()

    async def talk() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if ends:
            writer.write_eof()
        while more := await reader.read(1 << 16):
            got.extend(more)

    try:
        await asyncio.wait_for(talk(), HANG_S)
    except TimeoutError:
        return bytes(got), False
    except OSError:
        pass  # reset: closed all the same
    finally:
        writer.close()
    return bytes(got), True


def row_of(kind: str, seed: int, numbers: range, findings: Findings) -> Row:
    cases = {"seed": seed, "first": numbers.start, "count": len(numbers)}
    most = dict(findings.outcomes.most_common(SHOWN))
    return {"kind": kind, **cases, "outcomes": most, "bad": findings.bad}


async def measure(*, bodies: int, streams: int, lines: int, seed: int, first: int) -> tuple[list[Row], list[Check]]:
    rows: list[Row] = []
    checks: list[Check] = []
    if bodies or streams:
        rows, checks = await _fuzz_server(bodies, streams, seed, first)
    if lines:
        row, found = await asyncio.to_thread(fuzz_lines, seed, range(first, first + lines))
        rows.append(row)
        checks += found
    return rows, checks


async def _fuzz_server(bodies: int, streams: int, seed: int, first: int) -> tuple[list[Row], list[Check]]:
    rows: list[Row] = []
    checks: list[Check] = []
    async with served("--devices", "cpu:2", *LIMITS, *QUICK) as server:
        known = await load.draw_undisturbed(server, load.catalogue(8, seed, 1, ((128, 128),)))
        before = figures_of(server.process.pid)
        if numbers := range(first, first + bodies):
            findings, wrong = await fuzz_bodies(server, known, seed, numbers)
            rows.append(row_of("bodies", seed, numbers, findings))
            checks += [*_checks("bodies", findings), none_of("good requests not right", wrong)]
        if numbers := range(first, first + streams):
            findings = await fuzz_streams(server, seed, numbers)
            rows.append(row_of("streams", seed, numbers, findings))
            checks += _checks("streams", findings)
        again = [await load.ask_for(server, picture) for picture in known]
        await asyncio.sleep(2)  # the limits of `QUICK`, after which idle connections are closed
        after = figures_of(server.process.pid)
    assert before is not None and after is not None
    rows.append({"kind": "server", "grown_mb": after.private_mb - before.private_mb, "descriptors": after.descriptors})
    checks.append(none_of("pictures afterwards that are not right", len(again) - again.count("right")))
    checks.append(none_of("tracebacks in the server's log", server.num_tracebacks))
    return rows, checks


def _checks(kind: str, findings: Findings) -> list[Check]:
    others = [bad for bad in findings.bad if not str(bad["outcome"]).startswith(("5", "hung"))]
    return [
        none_of(f"{kind}: 5xx", findings.num_5xx),
        none_of(f"{kind}: hung", findings.outcomes["hung"]),
        none_of(f"{kind}: otherwise bad", len(others)),
    ]


def command(command_line: str, output: Path, **options: Any) -> int:
    rows, checks = asyncio.run(measure(**options))
    for row in rows:
        for bad in row.get("bad", ()):
            print(f"{row['kind']}: seed {row['seed']}, number {bad['number']}: {bad['outcome']}")
    return finish(command_line, rows, checks, output)
