"""Runs of the study: each is kept in a file as it ends, so that the same command goes on with those that are missing.

A run is found again by its trace, its cost table, its policy with its options, and the sources that the policy is made
of: a policy that changes runs again, the others do not.
"""

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from benchmarks.research.late.points import Point
from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.policies.registry import get_planner, with_options
from tetrion.entrypoints.bench.workloads import Trace
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import planner_settings

ROOT = Path(__file__).parents[3]
KNOWN_BEFORE = ("arrival_s", "width", "height", "num_steps", "slo_s", "weight")
"""Fields of a trace that every commit knows."""
PACKAGES = ("engine", "entrypoints")
WORKER = Path(__file__).parent / "worker.py"


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """A policy with its options, of today's sources or of a commit's. `name` as rows have it."""

    name: str
    policy: str
    options: dict[str, object] = {}
    commit: str | None = None

    @property
    def code(self) -> str:
        """Changes when the policy may decide otherwise."""
        return self.commit or _source_hash(f"tetrion.engine.planning.policies.{_module(self.policy)}")


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """See `worker.py`."""

    finished_s: list[float | None]
    device_s: list[float]
    refused: list[int]
    cpu_s: float
    decision_ms: tuple[float, float]


def parse_contender(text: str) -> Contender:
    """`edf`, `horizon:late_worth=2:drop=fraction`, `horizon@c151ae8`. Raises InputError."""
    name, *settings = text.split(":")
    policy, at, commit = name.partition("@")
    try:
        get_planner(policy)
        options = planner_settings(settings, "policy")["options"]
        if commit and options:
            raise InputError(f"policy: {text!r}: a commit's policy runs with its own defaults")
        if not at:
            with_options(PlannerConfig(policy=policy, options=options))
    except ValueError as error:
        raise InputError(str(error)) from None
    return Contender(name=text, policy=policy, options=options, commit=commit or None)


class Runs:
    """The runs in a folder. `profile`: the cost table of all of them."""

    def __init__(self, folder: Path, profile: Profile) -> None:
        self.folder = folder
        for name in ("runs", "traces"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        text = msgspec.json.encode(profile)
        self._profile_hash = _hash(text)
        self._profile = folder / f"profile-{self._profile_hash}.json"
        self._profile.write_bytes(text)
        self._codes: dict[str, str] = {}
        self._traces: dict[tuple[str, int, bool], str] = {}

    def path(self, contender: Contender, point: Point, seed: int) -> Path:
        """Where the run is, or will be."""
        if contender.name not in self._codes:
            self._codes[contender.name] = contender.code
        drawn = point.name, seed, contender.commit is None
        if drawn not in self._traces:
            self._traces[drawn] = _hash(trace_bytes(point.trace(seed), with_tenants=contender.commit is None))
        key = [
            contender.policy,
            contender.options,
            self._codes[contender.name],
            point.devices,
            self._profile_hash,
            self._traces[drawn],
        ]
        return self.folder / "runs" / f"{contender.policy}-{_hash(json.dumps(key, sort_keys=True).encode())}.json"

    def read(self, contender: Contender, point: Point, seed: int) -> RunResult | None:
        """None: not run yet."""
        try:
            return msgspec.json.decode(self.path(contender, point, seed).read_bytes(), type=RunResult)
        except FileNotFoundError:
            return None

    def complete(
        self,
        tasks: Sequence[tuple[Contender, Point]],
        seeds: Sequence[int],
        *,
        jobs: int,
        budget_s: float,
        report: Callable[[str], object],
    ) -> bool:
        """Run what is missing, in `jobs` processes at a time; nothing begins after `budget_s` seconds.
        Returns whether all is there."""
        end_s = time.monotonic() + budget_s
        missing = [
            (contender, point, missing_seeds)
            for contender, point in tasks
            if (missing_seeds := [s for s in seeds if not self.path(contender, point, s).exists()])
        ]
        num = sum(len(seeds) for _, _, seeds in missing)
        report(f"{num} runs to do, in {len(missing)} processes")

        def work(task: tuple[Contender, Point, list[int]]) -> None:
            contender, point, missing_seeds = task
            if time.monotonic() < end_s:
                spent_s = self._run(contender, point, missing_seeds)
                report(f"{contender.name}: {point.group}: {point.name}: {spent_s:.1f} s a run")

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, missing))
        return all(self.path(c, p, s).exists() for c, p, _ in missing for s in seeds)

    def _run(self, contender: Contender, point: Point, seeds: Sequence[int]) -> float:
        """Returns the CPU seconds of a run."""
        lines = []
        for seed in seeds:
            output = self.path(contender, point, seed)
            data = trace_bytes(point.trace(seed), with_tenants=contender.commit is None)
            trace = self.folder / "traces" / f"{_hash(data)}.jsonl"
            if not trace.exists():
                trace.write_bytes(data)
            job = {"trace": str(trace), "devices": point.devices, "policy": contender.policy}
            lines.append(json.dumps(job | {"options": contender.options, "output": str(output)}))
        links = self._sources(contender.commit)
        environment = os.environ if links is None else os.environ | {"PYTHONPATH": str(links)}
        done = subprocess.run(
            [sys.executable, "-P", str(WORKER), str(self._profile)],
            input="\n".join(lines),
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{contender.name}: {point.name}: {done.stderr[-2000:]}")
        results = [self.read(contender, point, seed) for seed in seeds]
        return sum(result.cpu_s for result in results if result) / len(results)

    def _sources(self, commit: str | None) -> Path | None:
        """The folder to import `tetrion` of that commit from."""
        if commit is None:
            return None
        folder = self.folder / f"sources-{commit}"
        if not folder.exists():
            packed = subprocess.run(["git", "archive", commit, *PACKAGES], cwd=ROOT, capture_output=True, check=False)
            if packed.returncode:
                raise InputError(f"policy: git has no sources of {commit}: {packed.stderr.decode().strip()}")
            temporary = folder.with_suffix(f".{os.getpid()}")
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
                tar.extractall(temporary / "tetrion", filter="data")
            os.replace(temporary, folder)
        return folder


def trace_bytes(trace: Trace, *, with_tenants: bool) -> bytes:
    """JSONL without fields that an older commit does not know, unless they say something."""
    lines = []
    for request in trace:
        line = {name: getattr(request, name) for name in KNOWN_BEFORE}
        if with_tenants and request.tenant:
            line["tenant"] = request.tenant
        lines.append(msgspec.json.encode(line))
    return b"\n".join(lines) + b"\n"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _module(policy: str) -> str:
    """Of `engine/planning/policies` that has the policy."""
    names = {"edf-best-fit": "best_fit"}
    stem = policy.partition("-")[0]
    return names.get(policy, stem)


def _source_hash(module: str) -> str:
    """Of the module and all of the planner's that it imports."""
    found: dict[str, bytes] = {}
    open_ones = [module]
    while open_ones:
        name = open_ones.pop()
        place = ROOT / name.removeprefix("tetrion.").replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if name in found or not path.exists():
            continue
        found[name] = path.read_bytes()
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tetrion.engine.planning"):
                open_ones += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return _hash(b"".join(found[name] for name in sorted(found)))
