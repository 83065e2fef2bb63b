"""A process that answers questions, and every way in which it may not."""

import io
from pathlib import Path

import pytest

from tetrion.entrypoints.bench.line_process import LineProcess, ProcessFailed, tail

ANSWERER = """
import sys, time
from tetrion.entrypoints.bench.line_process import answer_lines

def answer(question):
    print("chatter of a library")
    if question.get("die"):
        sys.exit("no more of this")
    time.sleep(question.get("sleep", 0))
    return {"sum": question["a"] + question["b"]}

answer_lines(answer)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answerer.py").write_text(ANSWERER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("path")
async def test_questions_errors_and_the_end() -> None:
    process = await LineProcess.start("answerer")
    assert await process.ask({"a": 1, "b": 2}, 60) == {"sum": 3}
    with pytest.raises(ProcessFailed, match="KeyError: 'b'"):
        await process.ask({"a": 1}, 60)
    assert await process.ask({"a": 3, "b": 4}, 60) == {"sum": 7}
    with pytest.raises(ProcessFailed, match="no more of this"):
        await process.ask({"die": True}, 60)
    with pytest.raises(ProcessFailed, match="no more of this"):
        await process.ask({"a": 1, "b": 2}, 60)
    await process.close()


@pytest.mark.usefixtures("path")
async def test_a_late_answer_is_never_taken_for_the_next_one() -> None:
    process = await LineProcess.start("answerer")
    assert await process.ask({"a": 1, "b": 2}, 60) == {"sum": 3}
    with pytest.raises(ProcessFailed, match="no answer within 0 s"):
        await process.ask({"a": 1, "b": 2, "sleep": 0.5}, 0.1)
    with pytest.raises(ProcessFailed):
        await process.ask({"a": 3, "b": 4}, 60)
    await process.close()


def test_the_reason_is_the_last_exception() -> None:
    said = b"warming up\n[rank0]: torch.OutOfMemoryError: 3 GB\n[rank0]: Set SOME_FLAG for more\n\n"
    assert tail(io.BytesIO(said)) == "[rank0]: torch.OutOfMemoryError: 3 GB"
    assert tail(io.BytesIO(b"loading\nno model there\n")) == "no model there"
    assert tail(io.BytesIO(b"")) == "the process ended without a word"
