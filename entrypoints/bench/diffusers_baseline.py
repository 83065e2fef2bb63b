"""The process beside which `tetrion bench step` measures on CPUs: diffusers' own FluxPipeline, timed on request.

Arguments: checkpoint folder, threads, text tokens. Answers `{"px", "num_steps", "seed"}` with `{"seconds"}`.
"""

import sys
import time

import torch
from diffusers import FluxPipeline

from tetrion.engine.measure.probe import PROMPT
from tetrion.entrypoints.bench.line_process import Message, answer_lines


def main() -> None:
    path, num_threads, max_text_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(num_threads)
    pipeline = FluxPipeline.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw(job: Message) -> Message:
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
        return {"seconds": time.perf_counter() - started_s}

    answer_lines(draw)


if __name__ == "__main__":
    main()
