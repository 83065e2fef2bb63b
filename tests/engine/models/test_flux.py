"""The transformer against diffusers' FluxTransformer2DModel, and its tokens split over simulated members."""

import functools
import threading
from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tests.engine.models.conftest import LocalAttention
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.family import Attend
from tetrion.engine.models.flux import FluxTransformer, project_text, read_config, rope
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.parallel.group import GroupPlan, Shard, plan_group
from tetrion.engine.params import Params
from tetrion.engine.shape import StepShape
from tetrion.kernels.reference import attention, qk_norm_rope


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_a_step_equals_diffusers(make_checkpoint, load, guidance_embeds) -> None:
    path = make_checkpoint(guidance_embeds=guidance_embeds)
    loaded = load(path)
    theirs = FluxTransformer2DModel.from_pretrained(path / "transformer").eval()
    num_text, height, width = 9, 6, 5
    latents, embeds, pooled, timesteps = inputs_of(loaded.network, num_text, height * width)
    shape = StepShape(width=16 * width, height=16 * height, image=height * width, text=(num_text,))
    ropes = rope(height, width, num_text, loaded.network.config.axes_dims_rope)
    vectors = loaded.network.vectors({"pooled": pooled[None]}, timesteps, params_of(shape))
    text = project_text(loaded.network.ops, loaded.network.weights, embeds)
    for i, timestep in enumerate(timesteps):
        attend = LocalAttention(ropes, (num_text, height * width))
        velocity = loaded.velocity(latents, {"text": text}, vectors, i, attend)
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
        assert len(attend.calls) == 4 and {s.segments for s in attend.calls[0]} == {(0,), (1,)}


def test_the_rope_of_a_shape_has_its_rows_and_columns(make_checkpoint, load) -> None:
    network, shape = load(make_checkpoint()).network, StepShape(width=20, height=8, image=10, text=(3, 7))
    for branch, num_text in enumerate(shape.text):
        expected = rope(2, 5, num_text, network.config.axes_dims_rope)
        assert all(map(torch.equal, network.rope(shape, branch), expected))


def test_constants_are_the_branchs_own_text_rows(make_checkpoint, load) -> None:
    network, shape = load(make_checkpoint()).network, StepShape(width=20, height=8, image=10, text=(3, 7))
    text = torch.randn(32, network.hidden_size)
    for branch, num_text in enumerate(shape.text):
        ((name, constant),) = network.constants({"text": text}, shape, branch).items()
        assert (name, constant.segment) == ("text", 0) and torch.equal(constant.tensor, text[:num_text])


@pytest.mark.parametrize("axes_dims", [(8, 12, 12), (16, 56, 56)])
def test_rope_equals_diffusers(axes_dims) -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.cat([torch.zeros(7, 3), _image_ids(12, 20)])
    expected = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims))(ids)
    for ours, theirs in zip(rope(12, 20, 7, axes_dims), expected, strict=True):
        assert torch.equal(ours.repeat_interleave(2, dim=1), theirs)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7)])
@pytest.mark.parametrize("degree", [2, 3, 4, 6])
def test_members_of_a_group_compute_the_same_bits(load, degree, height, width) -> None:
    loaded = load(resolve_model("shapes"))
    network, spec, num_text = loaded.network, loaded.spec, 64
    latents, embeds, pooled, timesteps = inputs_of(network, num_text, height * width)
    shape = StepShape(width=16 * width, height=16 * height, image=height * width, text=(num_text,))
    vectors = network.vectors({"pooled": pooled[None]}, timesteps, params_of(shape))
    tables, text = (
        rope(height, width, num_text, network.config.axes_dims_rope),
        project_text(network.ops, network.weights, embeds),
    )
    whole = loaded.velocity(latents, {"text": text}, vectors, 0, LocalAttention(tables, shape.counts(spec.segments)))
    plan = plan_group(tuple(range(degree)), shape.counts(spec.segments), spec.num_heads)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        group = SimulatedGroup(plan, tables)

        def step(shard: Shard, attend: Attend, vectors: Tensor = vectors) -> Tensor:
            text_rows, image_rows = (slice(rows.start, rows.stop) for rows in shard.rows)
            return network.step(latents[image_rows].clone(), {"text": text[text_rows]}, vectors, attend)

        assert torch.equal(group.run(step), whole), f"{num_threads} threads"


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
    """Members as threads of this process; `attend` gathers all rows, each member attends for its own heads."""

    def __init__(self, plan: GroupPlan, tables: Rope) -> None:
        self.plan, self.tables = plan, tables
        self.barrier = threading.Barrier(plan.degree, timeout=60)
        self.parts: dict[int, list[tuple[Tensor, ...]]] = {}
        self.outputs: dict[int, Tensor] = {}

    def run(self, step: Callable[[Shard, Attend], Tensor]) -> Tensor:
        """All members' rows of the last segment."""
        results: dict[int, Tensor] = {}

        def member(shard: Shard) -> None:
            with torch.no_grad():
                results[shard.rank] = step(shard, functools.partial(self.attend, shard))

        threads = [threading.Thread(target=member, args=(shard,)) for shard in self.plan.shards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat([results[shard.rank] for shard in self.plan.shards])

    def attend(self, shard: Shard, streams: Sequence[Stream]) -> Tensor:
        canonical = self.plan.canonical_rows(shard)
        local: list[tuple[Tensor, ...]] = []
        for stream in streams:
            rows = torch.tensor([row for segment in stream.segments for row in canonical[segment]])
            cos, sin = (table[rows].repeat_interleave(2, dim=1) for table in self.tables)
            qkv = stream.qkv.unflatten(1, (3, self.plan.num_heads, -1))
            parts = qk_norm_rope(qkv, stream.q_norm, stream.k_norm, (cos, sin))
            sizes = [len(canonical[segment]) for segment in stream.segments]
            local += zip(*(part.split(sizes) for part in parts), strict=True)
        self.parts[shard.rank] = local
        self.barrier.wait()
        heads = slice(shard.heads.start, shard.heads.stop)
        q, k, v = (
            torch.cat([self.parts[r][s][i][:, heads] for s in range(len(local)) for r in range(self.plan.degree)])
            for i in range(3)
        )
        self.outputs[shard.rank] = attention(q, k, v)
        self.barrier.wait()
        output = torch.cat([self.outputs[r] for r in range(self.plan.degree)], dim=1).flatten(1)
        self.barrier.wait()
        return torch.cat([output[rows.start : rows.stop] for rows in canonical])


def params_of(shape: StepShape) -> Params:
    return Params(model="tiny", shape=shape, num_steps=3, guidance=2.5, seed=0)


def inputs_of(flux: FluxTransformer, num_text: int, num_image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
