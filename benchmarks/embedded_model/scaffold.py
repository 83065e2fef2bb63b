"""Writes the model folder with random weights: `python -m benchmarks.embedded_model.scaffold --output DIR`."""

import argparse
from pathlib import Path

from benchmarks.embedded_model.architecture import build
from benchmarks.embedded_model.export import check_sizes, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    components = build(args.seed)
    export(components, args.output)
    for name, module in components.modules().items():
        print(f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters")
    print(f"{args.output}: {check_sizes(args.output):,} bytes")


if __name__ == "__main__":
    main()
