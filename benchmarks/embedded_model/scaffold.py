"""Writes the model folder with random weights: `python -m benchmarks.embedded_model.scaffold --output DIR`."""

import argparse
from pathlib import Path

from benchmarks.embedded_model.export import check_sizes, export, modules
from benchmarks.embedded_model.models import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="shapes")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = MODELS[args.model]
    pipeline = model.build(args.seed)
    export(pipeline, args.output, model.preset)
    for name, module in modules(pipeline).items():
        print(f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters")
    print(f"{args.output}: {check_sizes(args.output):,} bytes")


if __name__ == "__main__":
    main()
