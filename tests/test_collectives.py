"""What compiled programs send, against bytes known by hand, and what they compute."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from irg_jax.parallel.collectives import find_collectives, measure_work, total_by_group, total_by_kind
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.hlo import Module

ROWS, WIDTH = 64, 32
SIZE = ROWS * WIDTH * 4.0   # bytes of a whole float32 array


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def sent(mesh, function, in_spec, out_spec) -> dict[str, float]:
    """Bytes a device sends for `function` of one array [ROWS, WIDTH], by kind."""
    dealt = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    text = jax.jit(dealt).lower(jnp.ones((ROWS, WIDTH))).compile().as_text()
    return total_by_kind(find_collectives(Module(text), mesh.size))


def test_each_kind(mesh):
    assert sent(mesh, lambda x: jax.lax.all_gather(x, "a"), P("a"), P()) == {"all-gather": SIZE * 3 / 4}
    assert sent(mesh, lambda x: jax.lax.psum(x, "a"), P(), P()) == {"all-reduce": 2 * SIZE * 3 / 4}
    scatter = lambda x: jax.lax.psum_scatter(x, "b", tiled=True)
    assert sent(mesh, scatter, P(), P("b")) == {"reduce-scatter": SIZE / 2}
    ring = lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)])
    assert sent(mesh, ring, P("a"), P("a")) == {"collective-permute": SIZE / 4}
    turn = lambda x: jax.lax.all_to_all(x, "a", split_axis=1, concat_axis=0, tiled=True)
    assert sent(mesh, turn, P("a"), P(None, "a")) == {"all-to-all": SIZE / 4 * 3 / 4}


def test_loops_count_every_hop(mesh):
    def hops(x):
        ring = lambda x, _: (jax.lax.ppermute(jnp.sin(x), "a", [(i, (i + 1) % 4) for i in range(4)]), None)
        turn = lambda x, _: (jax.lax.scan(ring, x, length=3)[0] + 1, None)
        return jax.lax.scan(turn, x, length=5)[0]
    assert sent(mesh, hops, P("a"), P("a")) == {"collective-permute": 15 * SIZE / 4}


def test_an_axis_of_one_sends_nothing():
    mesh = jax.make_mesh((1, 8), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    assert sent(mesh, lambda x: jax.lax.psum(x, "a"), P(), P()) == {}


def test_a_partitioned_layer_in_a_scan(mesh):
    """The compiler's own collectives, and its work: a share of what the program traced shows."""
    layers = 6
    place = lambda spec: NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=place(P("a")))
    w = jax.ShapeDtypeStruct((layers, WIDTH, WIDTH), jnp.float32, sharding=place(P(None, "a")))

    def layer(x, w):
        whole = jax.lax.with_sharding_constraint(w, place(P()))
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), place(P("a"))), None
    traced = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).trace(x, w)
    module = Module(traced.lower().compile().as_text())
    kernel = WIDTH * WIDTH * 4.0
    assert total_by_kind(find_collectives(module, mesh.size)) == {"all-gather": layers * kernel * 3 / 4}
    assert measure_work(module).flops == count_flops(traced.jaxpr).dot / 4
    assert measure_work(module).hbm_bytes > layers * (kernel + 2 * SIZE / 4)


TPU = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[4,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%p), GROUPS, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,128}
}

%below (state: (s32[], bf16[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %state = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %state.1 = (s32[]{:T(128)}, /*index=1*/bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %own.1 = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (bf16[4,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%own.1), replica_groups=[4,16]<=[64]
  %done = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  ROOT %next = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%i.1, %done)
}

ENTRY %main (q: bf16[64,128]) -> (s32[], bf16[64,128]) {
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %none = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%none, %q)
  ROOT %loop = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%begin), condition=%below, body=%body
}
""".replace("GROUPS", "replica_groups=mesh['i'=16,'j'=4], device_ids=([4,16]T(1,0)) {'i'}")


def test_the_forms_of_a_tpu_compiler():
    """A reduce-scatter that is written as an all-reduce, meshes for groups, and a loop without a count."""
    found = find_collectives(Module(TPU), 64)
    whole = 64 * 128 * 2.0
    assert total_by_kind(found) == {"reduce-scatter": 28 * whole * 15 / 16, "all-gather": 28 * whole * 15 / 16}
    assert total_by_group(found) == {f"{kind} of 16": size for kind, size in total_by_kind(found).items()}
    assert [each.is_async for each in found if each.kind == "all-gather"] == [True]
    assert {each.group for each in found} == {16}


@pytest.mark.parametrize("old, new, message", [
    ("direction=LT", "direction=NE", "loop %loop"), ("[4,16]<=[64]", "something", "devices of %start"),
    ("ENTRY ", "", "no ENTRY")])
def test_what_cannot_be_read_is_told(old, new, message):
    with pytest.raises(ValueError, match=message):
        find_collectives(Module(TPU.replace(old, new)), 64)


def test_a_loop_of_unknown_length_is_not_counted_as_one():
    def hops(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ x), x)
    text = jax.jit(hops).lower(jnp.ones((8, 8)), 3).compile().as_text()
    with pytest.raises(ValueError, match="cannot be read from its condition"):
        measure_work(Module(text))


NESTED = """HloModule nested
%slice (stack: bf16[28,64,128], i: s32[]) -> bf16[1,64,128] {
  %stack = bf16[28,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = bf16[1,64,128]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%around (weights: bf16[28,64,128], j: s32[], x: bf16[1,64,128]) -> bf16[1,64,128] {
  %weights = bf16[28,64,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = bf16[1,64,128]{2,1,0} parameter(2)
  %taken = bf16[1,64,128]{2,1,0} fusion(%weights, %j), kind=kLoop, calls=%slice
  ROOT %sum = bf16[1,64,128]{2,1,0} add(%taken, %x)
}

ENTRY %main (w: bf16[28,64,128], k: s32[], y: bf16[1,64,128]) -> bf16[1,64,128] {
  %w = bf16[28,64,128]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %y = bf16[1,64,128]{2,1,0} parameter(2)
  ROOT %out = bf16[1,64,128]{2,1,0} fusion(%w, %k, %y), kind=kLoop, calls=%around
}
"""


@pytest.mark.parametrize("inner, layers", [
    ("dynamic-slice(%stack, %i, %zero, %zero)", 1), ("copy(%stack)", 28)])
def test_of_a_stack_a_fusion_reads_what_it_takes(inner, layers):
    """A slice in a fusion within a fusion is one layer; used otherwise, it is all of them."""
    text = NESTED.replace("dynamic-slice(%stack, %i, %zero, %zero)", inner)
    layer = 64 * 128 * 2.0
    assert measure_work(Module(text)).hbm_bytes == (layers + 2) * layer + 4    # y, the result, and an index


@pytest.mark.parametrize("operand", ["%w", "%t#0"])
def test_an_element_of_a_tuple_is_read_alone(operand):
    """Taken by an instruction, or named behind its tuple, as from libtpu 0.0.48 on."""
    pair = "%t = (bf16[28,64,128]{2,1,0}, f32[4096,4096]{1,0}) parameter(0)"
    taken = "%w = bf16[28,64,128]{2,1,0} get-tuple-element(%t), index=0"
    text = NESTED.replace("%w = bf16[28,64,128]{2,1,0} parameter(0)",
                          f"{pair}\n  {taken}" if operand == "%w" else pair)
    text = text.replace("fusion(%w,", f"fusion({operand},")
    assert measure_work(Module(text)).hbm_bytes == 3 * 64 * 128 * 2.0 + 4


VIEWED = """%view (all: bf16[28,64,128]) -> bf16[28,64,128] {
  %all = bf16[28,64,128]{2,1,0} parameter(0)
  ROOT %same = bf16[28,64,128]{2,1,0} copy(%all)
}

%slice"""


def test_another_view_of_a_stack_is_read_as_its_slices_are():
    """As libtpu writes it where a slice of 8-bit kernels is widened."""
    view = ("  %v = bf16[28,64,128]{2,1,0} fusion(%stack), kind=kLoop, "
            "output_to_operand_aliasing={{}: (0, {})}, calls=%view\n")
    text = NESTED.replace("%slice", VIEWED, 1).replace("  ROOT %one", f"{view}  ROOT %one")
    text = text.replace("dynamic-slice(%stack", "dynamic-slice(%v")
    layer = 64 * 128 * 2.0
    assert measure_work(Module(text)).hbm_bytes == 3 * layer + 4


WINDOW = """HloModule batched
ENTRY %main (x: f32[3,8,16], y: f32[3,16,4]) -> f32[3,8,4] {
  %x = f32[3,8,16]{2,1,0} parameter(0)
  %y = f32[3,16,4]{2,1,0} parameter(1)
  ROOT %z = f32[3,8,4]{2,1,0} convolution(%x, %y), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=3 stride=2 lhs_dilate=3}")


def test_a_batched_matmul_counts_what_meets_also_as_a_convolution():
    product = jax.jit(lambda x, y: jnp.einsum("bij,bjk->bik", x, y))
    text = product.lower(jnp.ones((3, 8, 16)), jnp.ones((3, 16, 4))).compile().as_text()
    assert measure_work(Module(text)).flops == measure_work(Module(WINDOW)).flops == 2 * 3 * 8 * 16 * 4


FETCHED = """HloModule fetched
%part (stack: bf16[28,64,128]) -> bf16[1,64,128] {
  %stack = bf16[28,64,128]{2,1,0} parameter(0)
  ROOT %one = bf16[1,64,128]{2,1,0:S(1)} slice(%stack), slice={[3:4], [0:64], [0:128]}
}

ENTRY %main (w: bf16[28,64,128]) -> bf16[1,64,128] {
  %w = bf16[28,64,128]{2,1,0} parameter(0)
  %begin = ((bf16[28,64,128]{2,1,0}), bf16[1,64,128]{2,1,0:S(1)}, s32[]{:S(2)}) async-start(%w), calls=%part
  %taken = bf16[1,64,128]{2,1,0:S(1)} async-done(%begin)
  %back = (bf16[1,64,128]{2,1,0}, bf16[1,64,128]{2,1,0:S(1)}, u32[]{:S(2)}) copy-start(%taken)
  ROOT %out = bf16[1,64,128]{2,1,0} copy-done(%back)
}
"""


def test_what_is_fetched_ahead_counts_once():
    """A slice of a stack into a chip's own memory, and a copy out of it: a layer each."""
    assert measure_work(Module(FETCHED)).hbm_bytes == 2 * 64 * 128 * 2.0
