"""Counts of collectives by hand: in programs for eight simulated devices, and in excerpts of programs for TPU.

The excerpts are from libtpu 0.0.42.1: names, shapes and layouts are its own; most of what sends nothing is cut.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from warp_jax.tpu_fit import hlo

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
BLOCK = P("fsdp", "tensor")  # of a float32 array [8, 64] a device has [2, 32], 256 bytes
SPLIT = P(("fsdp", "tensor"))

psum = jax.lax.psum


def _collectives(function, *shapes, inside=BLOCK, outside=BLOCK):
    """Of a function of blocks, compiled for eight devices."""
    shapes = shapes or (jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(MESH, BLOCK)),)
    mapped = jax.shard_map(function, mesh=MESH, in_specs=inside, out_specs=outside, check_vma=False)
    return hlo.collectives(jax.jit(mapped).lower(*shapes).compile().as_text())


@pytest.mark.parametrize(
    ("kind", "function", "specs", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), (BLOCK, P(None, "tensor")), 1024 * 3 / 4),
        ("all-reduce", lambda x: psum(x, "fsdp"), (BLOCK, P(None, "tensor")), 2 * 256 * 3 / 4),
        ("all-reduce", lambda x: psum(x, ("fsdp", "tensor")), (BLOCK, P()), 2 * 256 * 7 / 8),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), (BLOCK, SPLIT), 256 / 2),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), (BLOCK, BLOCK), 256 * 3 / 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), (BLOCK, BLOCK), 256),
    ],
)
def test_bytes_of_each_kind(kind, function, specs, sent):
    """Fails when a share of the ring is wrong, result and operand are confused, or a size is not in bytes."""
    found = _collectives(function, inside=specs[0], outside=specs[1])
    assert found == hlo.Collectives({kind: hlo.Traffic(1, sent)}, {})


@pytest.mark.parametrize("function", [lambda x: jax.lax.ppermute(x, "fsdp", [(i, i) for i in range(4)]), jnp.sin])
def test_nothing_is_sent(function):
    """Fails when a permutation of every chip to itself counts."""
    assert _collectives(function) == ({}, {})


def _scan(x, length=5):
    return jax.lax.scan(lambda c, _: (jnp.tanh(psum(c, "tensor")), None), x, None, length=length)[0]


def test_a_scan_counts_its_iterations():
    """Fails when a loop's body counts once, or loops in loops are not multiplied."""
    twice = functools.partial(jax.lax.fori_loop, 0, 3, lambda _, x: _scan(x))
    assert _collectives(twice).once == {"all-reduce": (15, 15 * 256)}


def _decode(x):
    def goes_on(c):
        return (c[0] < 9) & (psum(c[1].sum(), ("fsdp", "tensor")) > 0)

    return jax.lax.while_loop(goes_on, lambda c: (c[0] + 1, _scan(c[1])), (0, psum(x, "fsdp")))[1]


@pytest.mark.parametrize("times", [1, 3])
def test_a_loop_that_may_end_early_is_apart(times):
    """Fails when its body counts as one run, its condition is left out, a scan in it counts once, or it is multiplied
    by the iterations of a loop around it.
    """
    found = _collectives(functools.partial(jax.lax.fori_loop, 0, times, lambda _, x: _decode(x)))
    assert found.once == {"all-reduce": (times, times * 2 * 256 * 3 / 4)}
    assert found.per_loop_step == {"all-reduce": (6, 5 * 256 + 2 * 4 * 7 / 8)}


def test_of_a_conditional_the_costlier_branch_counts():
    """Fails when branches are added, or the first one counts."""

    def either(x, i):
        return jax.lax.cond(i > 0, lambda x: psum(psum(x * x, "fsdp"), "tensor"), lambda x: psum(x, "tensor"), x)

    whole = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(MESH, P()))
    blocks = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(MESH, BLOCK))
    found = _collectives(either, blocks, whole, inside=(BLOCK, P()))
    assert found.once == {"all-reduce": (2, 2 * 256 * 3 / 4 + 256)}


ONE = """HloModule one, num_partitions=64

ENTRY %main (x: f32[64]) -> f32[64] {{
  %x = {shape} parameter(0)
  ROOT %sum = {shape} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add, metadata={{op_name="a/b"}}
}}
"""


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[16,4]<=[64]", 4),
        ("[8,8]<=[8,8]T(1,0)", 8),
        ("mesh['axis_0'=4,'axis_1'=16] {'axis_0'}", 4),
        ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=8], device_ids=([8,8]T(1,0)) {'axis_0','axis_2'}", 64),
        ("mesh['x'=16,'y'=4] {'x':(2)4}", 4),
        ("{}", 64),
    ],
)
def test_groups_in_all_spellings(groups, chips):
    """Fails when a group's size is that of another axis, of the number of groups, or of all chips."""
    found = hlo.collectives(ONE.format(shape="f32[64]{0:T(128)}", groups=groups))
    assert found.once == {"all-reduce": (1, pytest.approx(2 * 256 * (chips - 1) / chips))}


@pytest.mark.parametrize("groups", ["{{0},{1}}", "[64,1]<=[64]", "mesh['x'=1,'y'=64] {'x'}"])
def test_groups_of_one_chip_send_nothing(groups):
    """Fails when such a collective is counted, with zero bytes or more."""
    assert hlo.collectives(ONE.format(shape="f32[64]{0:T(128)}", groups=groups)) == ({}, {})


def test_an_unknown_spelling_is_refused():
    """Fails when what cannot be read counts as nothing."""
    with pytest.raises(ValueError, match=r"replica_groups: got channel_id=1, replica_groups=@x.*; want "):
        hlo.collectives(ONE.format(shape="f32[64]", groups="@x"))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("pred[16]{0:T(512)(128)(4,1)}", 16),
        ("u32[]{:T(128)}", 4),
        ("s4[16]{0}", 8),
        ("f8e4m3fn[8]{0}", 8),
        ("c64[2,0]{1,0}", 0),
        ("(f32[1024]{0:T(1024)}, s8[3,<=5]{1,0}, /*index=2*/token[])", 4111),
    ],
)
def test_sizes_of_shapes(shape, size):
    """Fails when tiles are taken for dimensions, bits for bytes, or only the first of a tuple counts."""
    found = hlo.collectives(ONE.format(shape=shape, groups="[32,2]<=[64]"))
    assert found.once == {"all-reduce": (1, size)}


ASYNC = """HloModule asynchronous, num_partitions=4

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %scattered = f32[2]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[2]{0} async-done(%u), calls=%wrapped
  %all-gather-start = (f32[2]{0}, f32[8]{0}) all-gather-start(%d), replica_groups=[1,4]<=[4], dimensions={0}
  %callback = (f32[8]{0}, u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true
  ROOT %all-gather-done = f32[8]{0} all-gather-done(%all-gather-start)
}
"""


def test_a_start_and_its_done_are_one():
    """Fails when -done or -update count, a start's tuple is taken for what it sends, or sending to the host counts."""
    assert hlo.collectives(ASYNC).once == {"reduce-scatter": (1, 24), "all-gather": (1, 24)}


LOOP = """HloModule loop, num_partitions=2

%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %p = (s32[]{{:T(128)}}, f32[2]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %by = s32[]{{:T(128)}} constant({by})
  %next = s32[]{{:T(128)}} add(%i, %{added})
  %x = f32[2]{{0}} get-tuple-element(%p), index=1
  %sum = f32[2]{{0}} all-reduce(%x), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %out = (s32[]{{:T(128)}}, f32[2]{{0}}) tuple(%next, %sum)
}}

%condition (p: (s32[], f32[2])) -> pred[] {{
  %p = (s32[]{{:T(128)}}, f32[2]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %limit = s32[]{{:T(128)}} constant({limit})
  ROOT %less = pred[]{{:T(512)}} compare(%i, %limit), direction={direction}
}}

ENTRY %main (x: f32[2], n: s32[]) -> (s32[], f32[2]) {{
  %x = f32[2]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %first = s32[]{{:T(128)}} constant({first})
  %copy = s32[]{{:T(128)}} copy(%{start})
  %init = (s32[]{{:T(128)}}, f32[2]{{0}}) tuple(%copy, %x)
  ROOT %loop = (s32[]{{:T(128)}}, f32[2]{{0}}) while(%init), condition=%condition, body=%body
}}
"""
PLAIN = {"first": 0, "by": 1, "limit": 3, "direction": "LT", "start": "first", "added": "by"}


@pytest.mark.parametrize(
    ("settings", "times"), [({}, 3), ({"first": 1}, 2), ({"by": 2, "limit": 8}, 4), ({"by": 2, "limit": 5}, 3)]
)
def test_iterations_from_start_step_and_limit(settings, times):
    """Fails when a loop whose first iteration XLA has taken out, or that goes by two, counts as many as its limit."""
    assert hlo.collectives(LOOP.format(**PLAIN | settings)) == ({"all-reduce": (times, 8 * times)}, {})


@pytest.mark.parametrize("settings", [{"start": "n"}, {"added": "i"}, {"by": 0}, {"by": -1}, {"direction": "NE"}])
def test_iterations_that_are_not_known(settings):
    """Fails when a number is made up for a loop from an unknown start, of no plain step or with another test."""
    assert hlo.collectives(LOOP.format(**PLAIN | settings)) == ({}, {"all-reduce": (1, 8)})


def test_text_that_is_no_module():
    """Fails when the text of another stage gives no collectives instead of an error."""
    with pytest.raises(ValueError, match="got 9 characters without an ENTRY"):
        hlo.collectives("module @f")


# A while loop that ends early, over three scanned layers: v5e:2x2, mesh (fsdp, tensor) = (2, 2), 16 rows of 512.
DECODE = """HloModule jit_gen, is_scheduled=true, num_partitions=4

%wide.region_1.1_spmd.sunk (wide.param.5: (s32[], bf16[16,512])) -> (s32[], bf16[16,512]) {
  %constant.13.clone.1..sunk.1..sunk = s32[]{:T(128)} constant(1)
  %wide.param.5 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.142 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=0
  %copy.2 = s32[]{:T(128)S(6)} copy(%get-tuple-element.142), backend_config={"flag_configs":[]}
  %add.17 = s32[]{:T(128)} add(%copy.2, %constant.13.clone.1..sunk.1..sunk)
  %get-tuple-element.143 = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.5), index=1
  %all-reduce.4 = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} all-reduce(%get-tuple-element.143), channel_id=1, \
replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add.clone
  ROOT %tuple.31 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%add.17, %all-reduce.4)
}

%wide.region_2.2_spmd (wide.param.1: (s32[], bf16[16,512])) -> pred[] {
  %constant.6.clone.1 = s32[]{:T(128)} constant(3)
  %wide.param.1 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.78 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.6 = pred[]{:T(512)} compare(%get-tuple-element.78, %constant.6.clone.1), direction=LT
}

%wide.region_0.3_spmd.sunk (wide.param.4: (s32[], bf16[16,512], pred[16])) -> (s32[], bf16[16,512], pred[16]) {
  %constant.25.clone..sunk = s32[]{:T(128)} constant(0)
  %constant.13.clone.1..sunk = s32[]{:T(128)} constant(1)
  %wide.param.4 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, pred[16]{0:T(512)(128)(4,1)}) parameter(0)
  %copy.18 = s32[]{:T(128)} copy(%constant.25.clone..sunk)
  %get-tuple-element.160 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=0
  %add.16 = s32[]{:T(128)} add(%get-tuple-element.160, %constant.13.clone.1..sunk)
  %get-tuple-element.161 = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.4), index=1
  %get-tuple-element.162 = pred[16]{0:T(512)(128)(4,1)} get-tuple-element(%wide.param.4), index=2
  %tuple.29 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%copy.18, %get-tuple-element.161)
  %while.23 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.29), \
condition=%wide.region_2.2_spmd, body=%wide.region_1.1_spmd.sunk, metadata={op_name="jit(gen)/while/body/while"}
  %get-tuple-element.169 = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.23), index=1
  ROOT %tuple.34 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, pred[16]{0:T(512)(128)(4,1)}) \
tuple(%add.16, %get-tuple-element.169, %get-tuple-element.162)
}

%wide.region_3.5_spmd (wide.param.3: (s32[], bf16[16,512], pred[16])) -> pred[] {
  %constant.19.clone.1 = s32[]{:T(128)} constant(32)
  %wide.param.3 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, pred[16]{0:T(512)(128)(4,1)}) parameter(0)
  %get-tuple-element.95 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=0
  %lt.7 = pred[]{:T(512)S(6)} compare(%get-tuple-element.95, %constant.19.clone.1), direction=LT
  %bitcast.16 = u32[]{:T(128)} bitcast(%reduce.3)
  %all-reduce.3 = u32[]{:T(128)} all-reduce(%bitcast.16), channel_id=2, \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, use_global_device_ids=true, to_apply=%region_4.4.clone.clone
  %bitcast.17 = pred[]{:T(512)} bitcast(%all-reduce.3)
  %not.3 = pred[]{:T(512)S(6)} not(%bitcast.17)
  ROOT %and.3 = pred[]{:T(512)} and(%lt.7, %not.3)
}

ENTRY %main.6_spmd (param.4: bf16[16,512]) -> bf16[16,512] {
  %constant.25.clone = s32[]{:T(128)} constant(0)
  %param.4 = bf16[16,512]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[2,1,2]<=[4] last_tile_dim_replicate}
  %tuple.32 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, pred[16]{0:T(512)(128)(4,1)}) \
tuple(%constant.25.clone, %param.4, %broadcast_in_dim.2)
  %while.22 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, pred[16]{0:T(512)(128)(4,1)}) while(%tuple.32), \
condition=%wide.region_3.5_spmd, body=%wide.region_0.3_spmd.sunk, metadata={op_name="jit(gen)/while"}
  ROOT %get-tuple-element.178 = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.22), index=1
}
"""


def test_decoding_on_tpu():
    """Fails when a scan on TPU, which notes no iterations, is not known, or the early end is."""
    assert hlo.collectives(DECODE) == ({}, {"all-reduce": (4, 3 * 16 * 512 * 2 + 4)})


# Of the backward pass on v5e:4x4, mesh (4, 4): a gather that fusions of matrix products overlap, and a gradient.
UPDATE = """HloModule jit_step, is_scheduled=true, num_partitions=16

%fused_computation.29 (param_0.92: bf16[512,128]) -> (bf16[512,128], bf16[512,512], s32[2], u32[]) {
  %param_0.92 = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.38 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.92), channel_id=11, \
replica_groups=[4,4]<=[4,4]T(1,0), dimensions={1}, frontend_attributes={chain_id="0"}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.2 = (bf16[512,128]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, \
s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.38), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.70 (param_0.95: bf16[512,128], param_1.85: bf16[512,512]) -> (bf16[512,128], bf16[512,512]) {
  %param_0.95 = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.85 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.40 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.95), channel_id=11, \
replica_groups=[4,4]<=[4,4]T(1,0), dimensions={1}, frontend_attributes={chain_id="0"}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %tuple.59 = (bf16[512,128]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%param_0.95, %all-gather.40)
}

%fused_computation.32 (param_0.101: bf16[512,128], param_1.89: bf16[512,512]) -> bf16[512,512] {
  %param_0.101 = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.89 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.44 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.101), channel_id=11, \
replica_groups=[4,4]<=[4,4]T(1,0), dimensions={1}, frontend_attributes={chain_id="0"}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %custom-call.4 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.101, %param_1.89, %all-gather.44), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.clone.1 (input.2: bf16[512,512]) -> bf16[128,512] {
  %input.2 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.14 = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=18, \
replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, use_global_device_ids=true, to_apply=%add.6.clone
  %partition-id.10 = u32[] partition-id()
  ROOT %dynamic-slice.43 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.14, %partition-id.10)
}

ENTRY %main.6_spmd (param.4: bf16[512,128]) -> (bf16[128,512], bf16[512,512]) {
  %param.4 = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(0)
  %async-collective-start = (bf16[512,128]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}, \
s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%param.4), kind=kCustom, calls=%fused_computation.29
  %fusion.70 = (bf16[512,128]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}) \
fusion(%get-tuple-element.342), kind=kOutput, calls=%async_collective_fusion.70
  %async-collective-done = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.363), kind=kCustom, \
calls=%fused_computation.32
  %fusion.68 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} fusion(%fusion.67), kind=kCustom, calls=%all-reduce-scatter.clone.1
  %all-reduce.16 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} all-reduce(%async-collective-done), channel_id=16, \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, use_global_device_ids=true, to_apply=%add.4.clone
  ROOT %tuple.65 = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[512,512]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%fusion.68, %all-reduce.16)
}
"""


def test_fusions_on_tpu():
    """Fails when a gather counts in every fusion that overlaps it, or a reduce-scatter counts as an all-reduce."""
    block = 512 * 512 * 2 * 3 / 4
    assert hlo.collectives(UPDATE) == (
        {"all-gather": (1, block), "reduce-scatter": (1, block), "all-reduce": (1, 2 * block)},
        {},
    )


# Two slices of v5e:2x2: a gradient goes to the other slice by way of the host; and from v5p:4x4x4 a ring's step.
SLICES = """HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main.6_spmd (param.4: bf16[256,8,128], param.5: bf16[1,64,1024]) -> bf16[256,8,128] {
  %param.4 = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param.5 = bf16[1,64,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %after-all.7 = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.15_0"}
  %send.7 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%param.4, %after-all.7), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.7 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.7), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done.7 = token[] send-done(%send.7), channel_id=2, is_host_transfer=true
  %recv-done.7 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv.7), channel_id=1
  %collective-permute-start.12 = (bf16[1,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,64,1024]{2,1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%param.5), channel_id=130, source_target_pairs={{0,60},{4,0},{8,4}}
  %collective-permute-done.12 = bf16[1,64,1024]{2,1,0:T(8,128)(2,1)} collective-permute-done(\
%collective-permute-start.12)
  ROOT %get-tuple-element.9 = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%recv-done.7), index=0
}
"""


def test_slices_and_rings_on_tpu():
    """Fails when recv counts beside send, what goes to another slice counts as nothing, or a permute counts twice."""
    found = hlo.collectives(SLICES)
    assert found.once == {"send": (1, 256 * 8 * 128 * 2), "collective-permute": (1, 64 * 1024 * 2)}
