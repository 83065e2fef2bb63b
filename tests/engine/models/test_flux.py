"""The transformer against diffusers' FluxTransformer2DModel, and its tokens split over simulated members."""

import itertools
import threading
from collections.abc import Sequence

import msgspec
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.flux import FluxTransformer, read_config, rope
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.parallel.exchange import Stream
from tetrion.kernels.reference import attention, qk_norm_rope


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_step_equals_diffusers(make_checkpoint, load, attend_locally, guidance_embeds) -> None:
    path = make_checkpoint(guidance_embeds=guidance_embeds)
    flux = load(path).flux
    theirs = FluxTransformer2DModel.from_pretrained(path / "transformer").eval()
    num_text, height, width = 9, 6, 5
    latents, embeds, pooled, timesteps = _inputs(flux, num_text, height * width)
    tables = flux.modulations(timesteps, 2.5, pooled)
    for i, timestep in enumerate(timesteps):
        velocity = flux.step(
            latents, flux.project_text(embeds), tables[i], flux.rope(height, width, num_text), attend_locally
        )
        expected = theirs(
            hidden_states=latents[None],
            encoder_hidden_states=embeds[None],
            pooled_projections=pooled[None],
            timestep=timestep[None] / 1000,
            guidance=torch.tensor([2.5]) if guidance_embeds else None,
            img_ids=_image_ids(height, width),
            txt_ids=torch.zeros(num_text, 3),
        ).sample[0]
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("axes_dims", [(8, 12, 12), (16, 56, 56)])
def test_rope_equals_diffusers(axes_dims) -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.cat([torch.zeros(7, 3), _image_ids(12, 20)])
    expected = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims))(ids)
    for ours, theirs in zip(rope(12, 20, 7, axes_dims), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7)])
@pytest.mark.parametrize("degree", [2, 3, 4, 6])
def test_members_of_a_group_compute_the_same_bits(load, attend_locally, degree, height, width) -> None:
    flux = load(resolve_model("shapes")).flux
    num_text = 64
    latents, embeds, pooled, timesteps = _inputs(flux, num_text, height * width)
    modulation, tables = flux.modulations(timesteps, 0.0, pooled)[0], flux.rope(height, width, num_text)
    whole = flux.step(latents, flux.project_text(embeds), modulation, tables, attend_locally)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        group = SimulatedGroup(degree, num_text, height * width, flux.config.num_attention_heads)
        assert torch.equal(group.step(flux, latents, embeds, modulation, tables), whole), f"{num_threads} threads"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, "patch_size must be 1"),
        ({"axes_dims_rope": [2, 2, 2]}, "axes_dims_rope .* must be three numbers that add up"),
        ({"axes_dims_rope": [3, 3, 2]}, "must be even"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_layers": -1}, "num_layers"),
    ],
)
def test_unsupported_config(make_checkpoint, tmp_path, change, message) -> None:
    config = msgspec.json.decode((make_checkpoint() / "transformer/config.json").read_bytes()) | change
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path / "config.json")


class SimulatedGroup:
    """Members as threads of this process; `attend` gathers all tokens, each member attends for its own heads."""

    def __init__(self, degree: int, num_text: int, num_image: int, num_heads: int) -> None:
        self.degree, self.num_text = degree, num_text
        self.text, self.image, self.heads = (_split(n, degree) for n in (num_text, num_image, num_heads))
        self.barrier = threading.Barrier(degree, timeout=60)
        self.qkv: list[list[tuple[Tensor, ...]]] = [[] for _ in range(degree)]
        self.outputs: list[Tensor] = [torch.empty(0)] * degree
        self.velocities: list[Tensor] = [torch.empty(0)] * degree

    def step(
        self, flux: FluxTransformer, latents: Tensor, embeds: Tensor, modulation: Tensor, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        def member(rank: int) -> None:
            text, image = self.text[rank], self.image[rank]
            image_rows = slice(self.num_text + image.start, self.num_text + image.stop)
            local = tuple(torch.cat([table[text], table[image_rows]]) for table in tables)
            with torch.no_grad():
                projected = flux.project_text(embeds[text])
                self.velocities[rank] = flux.step(
                    latents[image].clone(), projected, modulation, local, lambda s, r: self.attend(rank, s, r)
                )

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(self.degree)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat(self.velocities)

    def attend(self, rank: int, streams: Sequence[Stream], local_rope: tuple[Tensor, Tensor]) -> Tensor:
        num_local_text = self.text[rank].stop - self.text[rank].start
        rows = [len(stream.qkv) for stream in streams]
        parts = [
            qk_norm_rope(stream.qkv, stream.q_norm, stream.k_norm, cos, sin)
            for stream, cos, sin in zip(streams, local_rope[0].split(rows), local_rope[1].split(rows), strict=True)
        ]
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        self.qkv[rank] = [(part[:num_local_text], part[num_local_text:]) for part in joined]
        self.barrier.wait()
        heads = self.heads[rank]
        q, k, v = (
            torch.cat([m[i][0][:, heads] for m in self.qkv] + [m[i][1][:, heads] for m in self.qkv]) for i in range(3)
        )
        self.outputs[rank] = attention(q, k, v)
        self.barrier.wait()
        output = torch.cat(self.outputs, dim=1).flatten(1)
        self.barrier.wait()
        image = output[self.num_text :]
        return torch.cat([output[: self.num_text][self.text[rank]], image[self.image[rank]]])


def _split(n: int, parts: int) -> list[slice]:
    edges = [i * n // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _inputs(flux: FluxTransformer, num_text: int, num_image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_image)
    config = flux.config
    return (
        torch.randn(num_image, config.in_channels, generator=generator),
        torch.randn(num_text, config.joint_attention_dim, generator=generator),
        torch.randn(config.pooled_projection_dim, generator=generator),
        torch.tensor([1000.0, 731.3, 12.75]),
    )


def _image_ids(height: int, width: int) -> Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.flatten(0, 1)
