"""Evaluates a model folder: diffusers draws held-out prompts in float32, the checker judges every picture.

`python -m benchmarks.embedded_model.evaluate --output benchmarks/results/embedded-model.json`

Of a folder that can edit also what the engine makes of instructions (`--sets edit`), and with `--against FOLDER`
whether it draws the same prompts from the same seeds as well as another one.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.embedded_model.checker import Verdict, look
from benchmarks.embedded_model.draw_prompts import batch_size_for, draw_prompts, evaluate_set, judge, sampling_of, sheet
from benchmarks.embedded_model.evaluate_edits import EDIT_SETS, compare_from_text, evaluate_edits, sheet_of
from benchmarks.embedded_model.export import load, read_preset
from benchmarks.embedded_model.prompts import PROMPT_SETS
from benchmarks.embedded_model.world import Scene, Thing

NEGATIVE_PROMPT = "blue"
"""Of `evaluate_negative_prompt`: a colour."""
OPEN_PROMPT = "a circle"
"""Leaves the colour open."""


def evaluate_negative_prompt(
    pipeline: DiffusionPipeline, n: int, preset: Mapping[str, Any], pixels_per_batch: int
) -> tuple[dict, list[tuple[str, np.ndarray, Verdict]]]:
    """How often n seeds draw something blue, without and with `blue` as the negative prompt; some with it.

    `right`: share of pictures that show one circle of any known colour on white, of medium size.
    """
    row = {"set": "negative prompt", "prompt": OPEN_PROMPT, "negative_prompt": NEGATIVE_PROMPT, "num_seeds": n}
    row |= {"num_steps": preset["num_steps"], "guidance": preset["guidance"]}
    for name, negative in (("without", None), ("with", NEGATIVE_PROMPT)):
        sampling = sampling_of(preset, negative_prompt=negative)
        batch_size = batch_size_for(sampling["width"], sampling["height"], pixels_per_batch)
        pictures = draw_prompts(pipeline, [OPEN_PROMPT] * n, sampling, batch_size)
        verdicts = judge(pictures, [most_like_it(picture) for picture in pictures])
        colours = Counter(colour for v in verdicts for colour in {thing.colour if thing else None for thing in v.seen})
        row[name] = {
            "blue": round(colours[NEGATIVE_PROMPT] / n, 4),
            "right": round(sum(verdict.is_right for verdict in verdicts) / n, 4),
            "colours": {str(colour): count for colour, count in colours.most_common()},
        }
    row["ratio"] = round(row["with"]["blue"] / max(row["without"]["blue"], 1 / n), 4)
    return row, [(OPEN_PROMPT, *drawn) for drawn in zip(pictures, verdicts, strict=True)]


def most_like_it(picture: np.ndarray) -> Scene:
    """The scene of `OPEN_PROMPT`, in the colour of the first thing that is seen in the picture."""
    things = look(picture)[1]
    return Scene((Thing(things[0].colour if things and things[0] else "red", "circle"),))


def host_name() -> str:
    accelerator = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    )
    return f"{platform.machine()}, {accelerator}, torch {torch.__version__}"


def evaluate_editing(
    args: argparse.Namespace,
    devices: str,
    keep_row: Callable[[dict[str, Any]], None],
    keep_sheet: Callable[[str, Image.Image], None],
) -> None:
    """The chosen sets of edits, by an engine on `devices`."""
    sets = [edits for edits in EDIT_SETS if not args.sets or edits.name in args.sets]
    for row, drawn in evaluate_edits(args.model, devices, sets, args.num_prompts):
        keep_row(row)
        wrong = [one for one in drawn if not one.verdict.is_right]
        keep_sheet(row["set"], sheet_of([*drawn[:40], *wrong[:24]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("configs/models/shapes"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--num-prompts", type=int, default=400)
    parser.add_argument("--num-steps", type=int, help="default: the preset's")
    parser.add_argument("--guidance", type=float, help="default: the preset's")
    parser.add_argument("--negative-seeds", type=int, default=0, help="of the negative prompt's test; 0: leave it out")
    parser.add_argument("--sets", nargs="*", help="names of prompt sets and sets of edits, default all")
    parser.add_argument("--against", type=Path, help="another model folder, to be compared with in pairs")
    parser.add_argument("--num-pairs", type=int, default=500, help="of each set that is compared")
    parser.add_argument("--commit", help="commit of the code, if known")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = read_preset(args.model)
    preset |= {"num_steps": args.num_steps or preset["num_steps"], "guidance": args.guidance or preset["guidance"]}
    pipeline = load(args.model, args.device)
    engine_devices = "cuda:0" if args.device == "cuda" else "cpu:1"
    pixels_per_batch = (128 if args.device == "cuda" else 4) * 256 * 256
    command = " ".join(["python -m benchmarks.embedded_model.evaluate", *sys.argv[1:]])
    result = {"host": host_name(), "commit": args.commit, "command": command, "dtype": "float32", "rows": []}

    def keep_row(row: dict) -> None:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")  # after every set, in case that it is cut off

    def keep_sheet(name: str, page: Image.Image) -> None:
        if args.sheets:
            page.save(args.sheets / f"{''.join(c if c.isalnum() else '-' for c in name)}.png")

    def keep(row: dict, drawn: list[tuple[str, np.ndarray, Verdict]]) -> None:
        keep_row(row)
        keep_sheet(row["set"], sheet(drawn[:40] + [item for item in drawn if not item[2].is_right][:24]))

    for folder in (args.output.parent, args.sheets):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    for prompts in PROMPT_SETS:
        if not args.sets or prompts.name in args.sets:
            keep(*evaluate_set(pipeline, prompts, args.num_prompts, preset, pixels_per_batch))
    if preset.get("references"):
        evaluate_editing(args, engine_devices, keep_row, keep_sheet)
    if args.against:
        keep_row(compare_from_text(load(args.against, args.device), pipeline, args.num_pairs, preset, pixels_per_batch))
    if args.negative_seeds:
        keep(*evaluate_negative_prompt(pipeline, args.negative_seeds, preset, pixels_per_batch))


if __name__ == "__main__":
    main()
