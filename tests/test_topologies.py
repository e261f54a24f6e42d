"""TPU slices by name, and how a config lays a run out on them."""

import dataclasses

import pytest

from data_pipelines.config import from_config_dict, load_config
from irg_jax.config import TrainConfig
from irg_jax.parallel import topologies
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.parallel.topologies import CHIPS, Topology, compile_devices, find_topology
from irg_jax.precompile import override


@pytest.mark.parametrize("name, sides, chips", [
    ("v5p:4x4x4", (4, 4, 4), 64), ("v5p-128", (4, 4, 4), 64), ("v4-8", (2, 2, 1), 4), ("v5p-8", (2, 2, 1), 4),
    ("v5e-256", (16, 16), 256), ("v5litepod-16", (4, 4), 16), ("v6e:8x8", (8, 8), 64), ("v6e-64", (8, 8), 64),
    ("v5p:4x4x12", (4, 4, 12), 192), ("2xv5p-128", (4, 4, 4), 128), ("v6e:1x1", (1, 1), 1)])
def test_a_slice_has_two_names(name, sides, chips):
    topology = find_topology(name)
    assert (topology.sides, topology.num_chips) == (sides, chips)
    assert find_topology(topology.name) == topology
    if topology.sides != (4, 4, 12):   # not sold under a name of its own that the table lists
        assert find_topology(topology.cloud_name) == topology


@pytest.mark.parametrize("name, near", [
    ("v5p-129", "v5p-128"), ("v5p:4x4", "v5p:4x4x4"), ("v6p-64", "v6e-64"), ("v5e:4x4x4", "v5e:4x4"),
    ("v5p:0x1x1", "v5p:"), ("h100-8", "use e.g."), ("", "use e.g.")])
def test_an_unknown_slice_is_told_what_comes_near(name, near):
    with pytest.raises(ValueError, match=near):
        find_topology(name)


def test_sizes_of_a_generation_double():
    for generation, chip in CHIPS.items():
        sizes = [find_topology(f"{generation}:{sides}").num_chips for sides in chip.slices]
        assert all(large in (2 * small, 4 * small) for small, large in zip(sizes, sizes[1:]))


def test_without_libtpu_the_command_that_brings_it_is_told(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bash launch/test.sh puts it where PYTHONPATH=.venv/libtpu finds it"):
        compile_devices(Topology("v5p", (4, 4, 4)))


def stage(**fields) -> TrainConfig:
    return from_config_dict(TrainConfig, load_config("configs/irgl_stage1.py", overrides=fields))


def test_the_table_of_the_config_lays_a_run_out():
    config = stage().on(find_topology("v5p:4x4x4"))
    assert config.mesh == MeshConfig(data=4, fsdp=16) and config.data.packs_per_step == 64
    same = stage()
    assert same.on(find_topology("v6e-8")) == same


def test_every_table_is_sound():
    for name in ("irgl_stage1", "irgl_stage2"):
        config = from_config_dict(TrainConfig, load_config(f"configs/{name}.py"))
        for row in config.topologies:
            sizes = dataclasses.astuple(row.mesh)
            shards = row.packs_per_step / row.accumulate / (sizes[0] * sizes[1])
            chips = find_topology(row.name).num_chips
            assert chips == sizes[0] * sizes[1] * sizes[2] * sizes[3] and shards == int(shards) > 0


def test_a_wrong_table_is_refused():
    with pytest.raises(ValueError, match="v5p-129"):
        stage(topologies={"v5p-129": {"mesh": {"fsdp": 8}, "packs_per_step": 8}})
    with pytest.raises(ValueError, match="did you mean 'packs_per_step'"):
        stage(topologies={"v5p-128": {"mesh": {"fsdp": 8}, "packs_per_stop": 8}})


def test_mesh_and_packs_of_the_command_line_go_first():
    config = override(stage(), "data=2,context=4", 12)
    assert config.mesh == MeshConfig(data=2, fsdp=1, context=4) and config.data.packs_per_step == 12
    assert override(stage(), "", 0) == stage()
    for mesh in ("data", "data=x", "date=4", "data=-1"):
        with pytest.raises(ValueError, match="write axes of data, fsdp"):
            override(stage(), mesh, 0)


def test_a_mesh_axis_may_be_a_part_of_the_devices_sides():
    assert dict(make_mesh(MeshConfig(fsdp=2, context=4)).shape) == {"data": 1, "fsdp": 2, "tensor": 1,
                                                                    "context": 4}
