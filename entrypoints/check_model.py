"""`tetrion check-model`: one picture of a checkpoint as this engine draws it, held against diffusers' own pipeline.

What only a published checkpoint can show is whether templates, token counts and configs were read as its authors mean
them. So the same prompt, seed and steps go through both on this machine, one after the other (so that weights are in
memory once at a time), and what they begin with and come to is compared: text rows, embeddings, starting noise, noise
levels, the picture. The parity tests (tests/engine/families) compare tiny checkpoints of their own, with what is inside
a pipeline; they share no code with this, which knows of a pipeline only what is public.
"""

import gc
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import diffusers
import msgspec
import numpy as np
import numpy.typing as npt
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.hardware.gpus import visible_gpus
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.ops import Ops, ReferenceOps
from tetrion.engine.models.registry import all_components, load_on_device
from tetrion.engine.params import Params
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.entrypoints.arguments import parse_size
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.session import open_engine, run_async
from tetrion.entrypoints.terminal import say

PROMPT, SEED, NUM_STEPS = "a red circle left of a large blue star", 7, 4
TEXT_OUTPUT = {
    "flux": "context_embedder",
    "flux2": "context_embedder",
    "krea2": "txt_in",
    "qwenimage": "txt_in",
    "qwenimage21": "txt_in",
    "sd3": "context_embedder",
    "zimage": "context_refiner",
}
"""By family: the module of diffusers' transformer (of a list the last one) that gives what a slot's field `text` has.
Of families that are not here embeddings are not compared."""
CLIP_ROWS = 77
"""Of SD3's text rows, those before T5's, which alone `max_sequence_length` counts."""
LEVELS_TOLERANCE = 1e-4
"""Of timesteps from 0 to 1000: their last bit in fp32."""


class Tolerances(msgspec.Struct, frozen=True):
    """`embeddings`: relative to the largest value. `noise`: absolute. `most`, `mean`: of a picture's values, 0 to 255;
    in bf16 a step's rounding moves single values far, so that only their mean says something."""

    embeddings: float
    noise: float
    mean: float
    most: float | None = None


TOLERANCES = {
    "float32": Tolerances(embeddings=1e-4, noise=1e-6, mean=0.1, most=2.0),
    "bfloat16": Tolerances(embeddings=0.05, noise=0.02, mean=3.0),
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison. `is_equal` None: not compared."""

    what: str
    found: str
    allowed: str
    is_equal: bool | None


class Theirs(msgspec.Struct):
    """What diffusers' pipeline had: text as its transformer reads it and the first step's latents, of each of its
    batch; timesteps; the picture, uint8 [height, width, 3]."""

    texts: list[Tensor]
    latents: list[Tensor]
    times: Tensor
    picture: npt.NDArray[np.uint8]


class Ours(msgspec.Struct):
    """The same of the engine. `text` [rows, width] as far as the prompt's rows go; `noise` [rows, channels]."""

    text: Tensor
    noise: Tensor
    times: Tensor
    picture: npt.NDArray[np.uint8]


def command(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    size: str | None = None,
    num_steps: int = NUM_STEPS,
    prompt: str = PROMPT,
    seed: int = SEED,
    as_json: bool = False,
) -> int:
    """0 if everything is equal within its tolerance, else 1. `dtype`: of diffusers' weights; the engine's own is
    float32 on a CPU and bfloat16 on a GPU, which is the default. Raises InputError, CheckpointError, GenerationError.
    """
    devices = _devices(device)
    is_gpu = devices.startswith("cuda")
    dtype = dtype or ("bfloat16" if is_gpu else "float32")
    engine = open_engine(EngineConfig(models=(model,), devices=devices, profile_cache=False, roles="all"))
    spec = engine.models.default
    if "mask" in spec.inputs:
        raise InputError(f"model: {spec.name} draws from pictures only; what is compared is drawn from text")
    width, height = parse_size(size) if size else spec.sizes.default
    asked = ImageRequest(prompt=prompt, width=width, height=height, num_steps=num_steps, seed=seed)
    params = resolve_request(asked, spec, 1).params
    say(needs(spec, devices, dtype))
    torch_device = torch.device(devices) if is_gpu else torch.device("cpu")
    theirs = drawn_by_diffusers(spec, params, prompt, torch_device, getattr(torch, dtype))
    text, noise, times = begun_by_us(spec, params, prompt, torch_device)
    picture = run_async_picture(engine, asked)
    coarser = "bfloat16" if is_gpu else dtype
    rows = compare(spec, Ours(text, noise, times, picture), theirs, params, TOLERANCES[coarser])
    is_equal = all(row.is_equal is not False for row in rows)
    facts: dict[str, Any] = {
        "model": spec.name,
        "family": spec.family,
        "device": devices,
        "dtype": dtype,
        "size": [width, height],
    }
    facts |= {"num_steps": num_steps, "seed": seed, "prompt": prompt, "is_equal": is_equal}
    print(json.dumps(facts | {"rows": msgspec.to_builtins(rows)}) if as_json else table(rows))
    return 0 if is_equal else 1


def _devices(device: str | None) -> str:
    """One device. Raises InputError."""
    given = device or ("cuda:0" if visible_gpus() else "cpu:1")
    given = "cpu:1" if given == "cpu" else given
    try:
        if len(parse_devices(given)) == 1:
            return given
    except ValueError as error:
        raise InputError(str(error).replace("devices:", "device:", 1)) from None
    raise InputError(f"device: takes one device, such as cpu or cuda:0, got {given!r}")


def needs(spec: ModelSpec, device: str, dtype: str) -> str:
    """What memory is needed, in words."""
    numbers = sum(count for _, count in spec.weights)
    sizes = (numbers * (4 if dtype == "float32" else 2), numbers * (2 if device.startswith("cuda") else 4))
    where = "memory" if device.startswith("cpu") else f"the memory of {device}"
    return (
        f"tetrion: check-model takes about {max(sizes) / 1e9:.1f} GB of {where} for weights, and what steps and"
        f" decoding need: diffusers draws first ({sizes[0] / 1e9:.1f} GB), then the engine ({sizes[1] / 1e9:.1f} GB)"
    )


# diffusers --------------------------------------------------------------------------------------------------------


def drawn_by_diffusers(
    spec: ModelSpec, params: Params, prompt: str, device: torch.device, dtype: torch.dtype
) -> Theirs:
    """Raises InputError if diffusers cannot load the checkpoint."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    loaded = {name for name, _ in spec.weights}
    without = [] if spec.family != "sd3" or "text_encoder_3" in loaded else ["text_encoder_3", "tokenizer_3"]
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            spec.path, dtype=dtype, local_files_only=True, use_safetensors=True, **dict.fromkeys(without)
        )
    except Exception as error:  # whatever a library finds
        raise InputError(f"model: diffusers cannot load {spec.path!r}: {type(error).__name__}: {error}") from error
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    texts: list[Tensor] = []
    latents: list[Tensor] = []
    if spec.family in TEXT_OUTPUT:
        module = pipeline.transformer.get_submodule(TEXT_OUTPUT[spec.family])
        module = list(module)[-1] if isinstance(module, nn.ModuleList) else module
        module.register_forward_hook(lambda _, __, output: texts.extend(map(_own_rows, _each(output), masks())))

    def masks() -> Iterator[Tensor | None]:
        """Of the texts of the call that runs: which rows are not there to fill up. Endless."""
        yield from _each(given.get("encoder_attention_mask"))
        yield from itertools.repeat(None)

    given: dict[str, Any] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given.update(kwargs)
        if not latents:
            latents.extend(_each(args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))))

    pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        (pictures,) = pipeline(**_arguments(pipeline, spec, params, prompt), return_dict=False)
    picture = (pictures[0] * 255).round().astype(np.uint8)
    times = pipeline.scheduler.timesteps.float().cpu()
    theirs = Theirs(texts=texts, latents=latents, times=times, picture=picture)
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return theirs


def _own_rows(text: Tensor, mask: Tensor | None) -> Tensor:
    """Those that the mask leaves; all where it is not of the text alone."""
    return text if mask is None or mask.shape != text.shape[:1] else text[mask.bool()]


def _arguments(pipeline: Any, spec: ModelSpec, params: Params, prompt: str) -> dict[str, Any]:
    """Of the pipeline's call, as far as it takes them."""
    width, height = params.shape.size
    wanted: dict[str, Any] = {
        "prompt": prompt,
        "width": width,
        "height": height,
        "num_inference_steps": params.num_steps,
        "guidance_scale": params.guidance,
        "generator": torch.Generator().manual_seed(params.seed),
        "output_type": "np",
        "max_sequence_length": spec.max_text_tokens - (CLIP_ROWS if spec.family == "sd3" else 0),
    }
    if spec.family == "sd3" and wanted["max_sequence_length"] < 1:
        del wanted["max_sequence_length"]
    taken = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in wanted.items() if name in taken}


def _each(batch: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Of a batch, on the host in fp32."""
    return [] if batch is None else [one.detach().float().cpu() for one in batch]


# The engine -------------------------------------------------------------------------------------------------------


def begun_by_us(spec: ModelSpec, params: Params, prompt: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A request's text rows, starting noise and timesteps, as the weights that encode make them."""
    components = all_components([spec], "safetensors")
    step = torch.zeros(1, dtype=torch.int32, device=device)
    ops, dtype = _ops(step), torch.bfloat16 if device.type == "cuda" else torch.float32
    (model,) = load_on_device([spec], "safetensors", components, device, dtype, ops, stages=("encode",))
    with torch.no_grad():
        ids = [tensor.to(device) for tensor in model.text.tokens(prompt).ids]
        text = model.text.embed(ids)["text"].float().cpu()[: params.shape.text[0]]
        noise = model.codec.noise(params.seed, params.shape)
    return (
        text,
        noise[: spec.sizes.num_covered(*params.shape.size)],
        model.schedule(params.num_steps, params.shape).times,
    )


def _ops(step: Tensor) -> Ops:
    if step.device.type == "cpu":
        return ReferenceOps(step)
    from tetrion.engine.models.gpu_ops import GpuOps  # which needs Triton

    return GpuOps(step)


def run_async_picture(engine: AsyncEngine, asked: ImageRequest) -> npt.NDArray[np.uint8]:
    """The picture as the engine draws it."""
    drawn: list[npt.NDArray[np.uint8]] = []

    async def draw() -> int:
        async with engine:
            drawn.append((await engine.generate(asked)).image)
        return 0

    run_async(draw())
    return drawn[0]


# Compared ---------------------------------------------------------------------------------------------------------


def compare(spec: ModelSpec, ours: Ours, theirs: Theirs, params: Params, tolerances: Tolerances) -> list[Row]:
    """What is equal and what differs."""
    rows = [_noise(ours, theirs, tolerances), _levels(ours, theirs), *_picture(ours, theirs, tolerances)]
    return [*_text(spec, ours, theirs, params, tolerances), *rows]


def _text(spec: ModelSpec, ours: Ours, theirs: Theirs, params: Params, tolerances: Tolerances) -> list[Row]:
    """The prompt's are one of those that the pipeline's batch has; with guidance there is the empty prompt's, too."""
    count = params.shape.text[0]
    if not theirs.texts:
        return [Row(what="embeddings", found=f"not compared for family {spec.family}", allowed="", is_equal=None)]
    counts = sorted({len(text) for text in theirs.texts})
    says = f"{count}, diffusers {', '.join(map(str, counts))}"
    rows = [Row(what="text rows", found=says, allowed="equal", is_equal=count in counts)]
    errors = [_relative(ours.text, text) for text in theirs.texts if text.shape == ours.text.shape]
    found = f"{min(errors):.1e} of the largest value" if errors else "of other shapes"
    is_equal = bool(errors) and min(errors) <= tolerances.embeddings
    return [*rows, Row(what="embeddings", found=found, allowed=f"{tolerances.embeddings:g}", is_equal=is_equal)]


def _noise(ours: Ours, theirs: Theirs, tolerances: Tolerances) -> Row:
    """As sets of values: how they lie differs by pipeline, and shows in the picture if it is wrong."""
    values = ours.noise.flatten().sort().values
    errors = [
        float((latents.flatten().sort().values - values).abs().max())
        for latents in theirs.latents
        if latents.numel() == values.numel()
    ]
    found = f"{min(errors):.1e} apart" if errors else "of other sizes"
    is_equal = bool(errors) and min(errors) <= tolerances.noise
    return Row(what="start noise", found=found, allowed=f"{tolerances.noise:g}", is_equal=is_equal)


def _levels(ours: Ours, theirs: Theirs) -> Row:
    allowed = f"{LEVELS_TOLERANCE:g} of 1000"
    if ours.times.shape != theirs.times.shape:
        found = f"{len(ours.times)} steps, diffusers {len(theirs.times)}"
        return Row(what="noise levels", found=found, allowed=allowed, is_equal=False)
    error = float((ours.times.float().cpu() - theirs.times).abs().max())
    return Row(what="noise levels", found=f"{error:.1e} apart", allowed=allowed, is_equal=error <= LEVELS_TOLERANCE)


def _picture(ours: Ours, theirs: Theirs, tolerances: Tolerances) -> list[Row]:
    if ours.picture.shape != theirs.picture.shape:
        found = f"{ours.picture.shape}, diffusers {theirs.picture.shape}"
        return [Row(what="picture", found=found, allowed="equal", is_equal=False)]
    apart = np.abs(ours.picture.astype(int) - theirs.picture)
    mean, most = float(apart.mean()), float(apart.max())
    rows = [
        Row(
            what="picture, mean",
            found=f"{mean:.3f} of 255 apart",
            allowed=f"{tolerances.mean:g}",
            is_equal=mean <= tolerances.mean,
        )
    ]
    allowed = "" if tolerances.most is None else f"{tolerances.most:g}"
    is_equal = None if tolerances.most is None else most <= tolerances.most
    return [*rows, Row(what="picture, most", found=f"{most:g} of 255 apart", allowed=allowed, is_equal=is_equal)]


def _relative(tensor: Tensor, expected: Tensor) -> float:
    return float((tensor - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def table(rows: Sequence[Row]) -> str:
    """For people."""
    says = {True: "equal", False: "DIFFERS", None: "-"}
    cells = [("", "found", "allowed", ""), *[(row.what, row.found, row.allowed, says[row.is_equal]) for row in rows]]
    widths = [max(len(cell[i]) for cell in cells) for i in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip() for cell in cells
    )
