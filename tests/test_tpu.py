"""Compilation for TPUs by their own compiler, on a machine that has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from attention_cases import on_tpus
from data_pipelines.batch import Rows
from irg_jax.kernels.attention import attend, look
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.parallel.topologies import compile_devices, find_topology


@pytest.mark.parametrize("name, chips", [("v5p:1x1x1", 1), ("v6e:1x1", 1), ("v5e:2x2", 4), ("2xv5p-16", 16)])
def test_slices_of_any_size_have_devices(libtpu, name, chips):
    assert len(compile_devices(find_topology(name))) == chips


def test_slices_are_parts_of_data(libtpu):
    devices = compile_devices(find_topology("2xv5p-16"))
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), devices)
    halves = [{device.slice_index for device in half.flat} for half in np.split(mesh.devices, 2)]
    assert sorted(map(tuple, halves)) == [(0,), (1,)]
    with pytest.raises(ValueError, match="mesh.data is 1; it must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(fsdp=16), devices)


@pytest.mark.parametrize("name, heads, key_heads, size, slots", [
    ("v5p-8", 28, 4, 128, 40_960),
    pytest.param("v6e-4", 28, 4, 128, 40_960, marks=pytest.mark.slow),
    pytest.param("v5e-4", 28, 4, 128, 40_960, marks=pytest.mark.slow),
    pytest.param("v5p-8", 28, 4, 128, 57_344, marks=pytest.mark.slow),    # keys in two walks
    ("v5p-8", 16, 16, 72, 19_968)])   # the vision encoder
def test_attention_of_a_whole_pack_compiles(libtpu, name, heads, key_heads, size, slots):
    """Values and gradients; memory besides arguments and results is that of the list of work and the pads."""
    chip = compile_devices(find_topology(name))[0]
    device = SingleDeviceSharding(chip)
    shape = lambda dtype, *more: jax.ShapeDtypeStruct((1, slots, *more), dtype, sharding=device)
    rows = Rows(*(shape(np.bool_ if name == "noised" else np.int32) for name in Rows._fields))
    query, key = (shape(jnp.bfloat16, count, size) for count in (heads, key_heads))

    def run(query, key, value, weight, rows):
        sight = look(rows, rows)
        out, back = jax.vjp(lambda *heads: attend(*heads, sight), query, key, value)
        return out, back(weight)
    with on_tpus(MeshConfig(fsdp=1), chip.device_kind):
        lowered = jax.jit(run).trace(query, key, key, query, rows).lower(lowering_platforms=("tpu",))
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 12 * slots * heads * 128 * 2    # a dozen arrays like the queries
