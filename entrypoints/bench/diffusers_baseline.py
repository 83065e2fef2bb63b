"""The baseline process of `tetrion bench step`: diffusers' own FluxPipeline, timed on request.

Reads one JSON object a line from standard input (`{"px", "num_steps", "seed"}`), answers each with `{"seconds"}`.
"""

import json
import sys
import time

import torch
from diffusers import FluxPipeline

PROMPT = "a red circle left of a large blue star"


def main() -> None:
    path, num_threads, max_text_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(num_threads)
    pipeline = FluxPipeline.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for line in sys.stdin:
        job = json.loads(line)
        started_s = time.perf_counter()
        pipeline(
            PROMPT,
            width=job["px"],
            height=job["px"],
            num_inference_steps=job["num_steps"],
            max_sequence_length=max_text_tokens,
            generator=torch.Generator("cpu").manual_seed(job["seed"]),
            output_type="pil",
        )
        print(json.dumps({"seconds": time.perf_counter() - started_s}), flush=True)


if __name__ == "__main__":
    main()
