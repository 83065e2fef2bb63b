"""What `make demo` shows of editing: `shapes` draws pictures and edits them. Nothing, if it has not learnt to.

`python -m benchmarks.embedded_model.demo_edits --edits configs/demo_edits.txt --output out/demo/edits.png`
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.embedded_model.before_after import before_after_sheet
from tetrion.engine.config import EngineConfig
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.request import ImageRequest
from tetrion.engine.sync_engine import Engine


@dataclass(frozen=True)
class Edit:
    """A picture, an instruction, and what came of them."""

    before: np.ndarray
    text: str
    after: np.ndarray


def read_edits(path: Path) -> list[tuple[str, str]]:
    """Prompt and instruction of every line, "a red circle | make the circle blue"; ValueError for another one."""
    edits = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        prompt, bar, instruction = (part.strip() for part in line.partition("|"))
        if not (prompt and bar and instruction):
            raise ValueError(f"{path}:{number}: expected a prompt, | and an instruction, got {line!r}")
        edits.append((prompt, instruction))
    return edits


def make_edits(engine: Engine, edits: list[tuple[str, str]], seed: int) -> list[Edit]:
    """All pictures from one seed."""
    drawn = engine.generate([ImageRequest(prompt=prompt, seed=seed) for prompt, _ in edits])
    asked = [
        ImageRequest(prompt=instruction, pictures=(result.image,), seed=seed)
        for (_, instruction), result in zip(edits, drawn, strict=True)
    ]
    results = zip(edits, drawn, engine.generate(asked), strict=True)
    return [Edit(before.image, instruction, after.image) for (_, instruction), before, after in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--edits", type=Path, default=Path("configs/demo_edits.txt"))
    parser.add_argument("--output", type=Path, required=True, help="PNG file of the sheet")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--devices", help="default: all GPUs, else CPU workers")
    args = parser.parse_args()
    if not read_model_spec(resolve_model(args.model)).refers(None):
        return
    with Engine(EngineConfig(models=(args.model,), devices=args.devices)) as engine:
        drawn = make_edits(engine, read_edits(args.edits), args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    before_after_sheet(drawn).save(args.output)
    print(f"What came of instructions is in {args.output.resolve()}")


if __name__ == "__main__":
    main()
