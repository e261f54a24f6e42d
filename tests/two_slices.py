"""`irg_jax.train` with every process as a slice of its own, as CPUs have no slices."""

import functools
import runpy

from jax.experimental import mesh_utils

from irg_jax.parallel import sharding

mesh_utils.create_hybrid_device_mesh = functools.partial(mesh_utils.create_hybrid_device_mesh,
                                                         process_is_granule=True)
sharding.slice_of = lambda device: device.process_index
runpy.run_module("irg_jax.train", run_name="__main__")
