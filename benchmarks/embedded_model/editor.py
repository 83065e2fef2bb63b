"""Teaches `shapes` to edit, in one command on one GPU: trains, evaluates, compares, writes results and a sheet.

`python -m benchmarks.embedded_model.editor --budget-s 900` writes `checkpoints/shapes-editor`, the results and the
sheet. Given again after it was cut off, it goes on: with the training from its last report, then with what is missing.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.embedded_model.evaluate_edits import EDIT_SETS

EVALUATION_S = 280.0
"""Kept of the budget for the evaluation: two loads, an engine's start, 1,200 edits, 6,000 pictures from text."""


def main() -> None:
    args = parse_arguments()
    stages = args.output.with_name(f"{args.output.name}-stages.json")
    spent: dict[str, float] = json.loads(stages.read_text()) if stages.exists() else {}
    left = args.budget_s - sum(spent.values())
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for name, command in commands(args).items():
        if name in spent:
            continue
        began = time.time()
        print(json.dumps({"stage": name, "left_s": round(left), "command": " ".join(command)}), flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)
        spent[name] = round(time.time() - began, 1)
        left -= spent[name]
        stages.write_text(json.dumps(spent) + "\n")
    if args.sheet:
        (args.sheets / "edit--canonical-wording.png").replace(args.sheet)
    print(json.dumps({"stage": "all", **spent, "results": summary(args.results)}), flush=True)


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Stage -> module and arguments."""
    training_s = args.budget_s - args.evaluation_s
    device = ["--device", args.device]
    train = ["--stages", "edit", "--resume", str(args.resume), "--seconds", f"{training_s:g}", "--output"]
    train += [str(args.output), "--text-seconds", f"{args.text_s:g}", "--peak-rate", f"{args.peak_rate:g}"]
    train += ["--compile", str(args.compile), "--scale", f"{args.scale:g}", *device]
    train += ["--report-interval", f"{args.report_interval:g}"]
    if args.only_size:
        train += ["--only-size", str(args.only_size)]
    judged = ["--model", str(args.output), "--against", str(args.resume), "--num-pairs", str(args.num_pairs)]
    judged += ["--num-prompts", str(args.num_instructions), "--output", str(args.results), "--sheets", str(args.sheets)]
    judged += ["--sets", *args.sets, *(["--commit", args.commit] if args.commit else []), *device]
    package = "benchmarks.embedded_model"
    return {"train": [f"{package}.train", *train], "evaluate": [f"{package}.evaluate", *judged]}


def summary(results: Path) -> dict[str, object]:
    """Set -> share right, or the difference with its interval."""
    rows = json.loads(results.read_text())["rows"]
    return {row["set"]: row["rate"] if "rate" in row else [row["difference"], row["ci95"]] for row in rows}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, required=True, help="of everything, in seconds")
    parser.add_argument("--evaluation-s", type=float, default=EVALUATION_S, help="kept of it for the evaluation")
    parser.add_argument("--text-s", type=float, default=60.0, help="of the training, for the text encoders")
    parser.add_argument("--resume", type=Path, default=Path("configs/models/shapes"), help="model folder to start from")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/shapes-editor"), help="model folder to write")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/embedded-model-edits.json"))
    parser.add_argument("--sheets", type=Path, default=Path("checkpoints/editor-sheets"), help="folder for sheets")
    parser.add_argument("--sheet", type=Path, help="where the sheet of instructions in canonical wording goes instead")
    parser.add_argument("--sets", nargs="+", default=[edits.name for edits in EDIT_SETS])
    parser.add_argument("--num-instructions", type=int, default=300, help="of each set")
    parser.add_argument("--num-pairs", type=int, default=500, help="of each of six sets of prompts")
    parser.add_argument("--peak-rate", type=float, default=0.5)
    parser.add_argument("--report-interval", type=float, default=150.0, help="seconds between what can be gone on from")
    parser.add_argument("--compile", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on batch and data set sizes, for rehearsals")
    parser.add_argument("--only-size", type=int, help="train on squares of so many pixels, for rehearsals")
    parser.add_argument("--commit", help="commit of the code, if known")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.budget_s <= args.evaluation_s:
        parser.error(f"--budget-s: must be more than --evaluation-s {args.evaluation_s:g}, got {args.budget_s:g}")
    return args


if __name__ == "__main__":
    main()
