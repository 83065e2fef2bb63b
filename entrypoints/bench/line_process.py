"""Another process of a benchmark that answers questions: one JSON object a line each way.

Owns both ends of the pipe. Its life ends with `close`; what goes wrong becomes `ProcessFailed` with the reason.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

TAIL_CHARS = 400
LAST_WORDS_S = 5.0
EXCEPTION = re.compile(r"(\[rank\d+\]:\s*)?[\w.]+(Error|Exception): ")
LIMIT_BYTES = 1 << 24
Message = dict[str, Any]


class ProcessFailed(RuntimeError):
    """The process ended, was too slow or said that it cannot."""


class LineProcess:
    """The asking side. Make one with `start`."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Any) -> None:
        self._process, self._errors = process, errors

    @classmethod
    async def start(cls, module: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> "LineProcess":
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", module, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
            limit=LIMIT_BYTES,
        )
        return cls(process, errors)

    async def ask(self, question: Message, timeout_s: float) -> Message:
        """Raises ProcessFailed with the end of what it wrote to standard error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            await self._process.stdin.drain()
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            self._process.kill()  # what it would say later would answer the wrong question
            raise ProcessFailed(f"no answer within {timeout_s:.0f} s") from None
        except ConnectionError:
            line = b""
        if not line:
            with contextlib.suppress(TimeoutError):  # its last words come after the end of its answers
                await asyncio.wait_for(self._process.wait(), LAST_WORDS_S)
            raise ProcessFailed(tail(self._errors))
        answer: Message = json.loads(line)
        if "error" in answer:
            raise ProcessFailed(answer["error"])
        return answer

    async def close(self) -> None:
        """End the process, which may be busy, and wait for its end."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._errors.close()


def tail(errors: Any) -> str:
    """What a file of standard error says last: the last line that names an exception, else the last line; shortened."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if EXCEPTION.match(line)]
    return (named or lines or ["the process ended without a word"])[-1][:TAIL_CHARS]


def answer_lines(answer: Callable[[Message], Message]) -> None:
    """The answering side: until standard input ends. What libraries print goes to standard error."""
    with claim_stdout() as answers:
        for line in sys.stdin:
            try:
                reply = answer(json.loads(line))
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"[:TAIL_CHARS]}
            print(json.dumps(reply), file=answers, flush=True)


def claim_stdout() -> Any:
    """Standard output for answers alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
