"""Pallas' interpreter of Mosaic GPU kernels, with what the kernels for Hopper need beyond jax 0.10.

It runs each warpgroup as a thread, with copies, barriers and shared memory. Here it learns layouts, loads with
a layout, accumulators that begin with a value, operands in registers and transposed ones; and it is made
stricter: a wgmma reads its operands when it is waited for, as late as the hardware may, and these reads, like
copies out of shared memory, are looked at for races.
"""

import collections
import contextlib
import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback, core
from jax._src.pallas.mosaic.interpret import thread_map, utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state import discharge
from jax._src.state import types as state_types

TOKEN = gpu_callbacks.TOKEN_SHAPE_DTYPE


@contextlib.contextmanager
def interpreted(detect_races: bool = False):
    """Gives the `interpret` of kernels; afterwards no race may have been found."""
    with (mock.patch.object(jaxpr_interpret, "JaxprInterpreter", Interpreter),
          mock.patch.object(thread_map, "_run_jaxpr", run_compiled)):
        _PENDING.clear()
        try:
            yield InterpretGPUParams(detect_races=detect_races)
            assert not any(_PENDING.values()), "a wgmma was never waited for"
            assert not detect_races or not interpret_pallas_call.get_races().races_found
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()


def run_compiled(jaxpr, consts, *args) -> None:
    """A thread of a block. jax would compile it again for each one."""
    with _COMPILING:
        run = _compiled(jaxpr, *(jax.tree.map(jax.typeof, x) for x in (tuple(consts), args)))
    run(consts, *args)


@functools.lru_cache(maxsize=8)
def _compiled(jaxpr, consts, args):
    shapes = lambda avals: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    function = jax.jit(lambda consts, *args: core.eval_jaxpr(jaxpr, consts, *args))
    return function.lower(shapes(consts), *shapes(args)).compile()


_COMPILING = threading.Lock()

# Products of a thread that were begun and not yet waited for: accumulator, and functions that read operands.
_PENDING = collections.defaultdict(list)


class Interpreter(jaxpr_interpret.JaxprInterpreter):

    def interpret(self, jaxpr, token, *args):
        """Equation by equation: those of HANDLERS here, the rest by jax."""
        env = utils.JaxprEnv(vars=jaxpr.constvars + jaxpr.invars, values=args)
        for eqn in jaxpr.eqns:
            if handler := HANDLERS.get(eqn.primitive):
                token, out = handler(self, eqn, token, env.read_many(eqn.invars))
                env.write_many(eqn.outvars, out)
                continue
            inputs = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, core.Literal)))
            outputs = [x for x in eqn.outvars if not isinstance(x, core.DropVar)]
            alone = core.Jaxpr((), inputs, outputs, [eqn], debug_info=jaxpr.debug_info)
            token, out = super().interpret(alone, token, *env.read_many(inputs))
            env.write_many(outputs, out)
        return token, env.read_many(jaxpr.outvars)

    @property
    def place(self) -> dict:
        return dict(device_id=jnp.int32(self.device_info.device_id), grid_point_coords=self.grid_point_coords,
                    thread_id=self.thread_id)

    def call(self, function, token, *args, out=()):
        """A function of the host: it is given the thread first."""
        return callback.io_callback(lambda token, *args: (token, *function(*args)), (TOKEN, *out), token,
                                    self.place, *args, ordered=True)

    def layout_cast(self, eqn, token, inputs):
        return token, inputs

    def load(self, eqn, token, inputs):
        token, out = gpu_callbacks.call_get(
            token=token, result_shape_and_dtype=eqn.outvars[0].aval, allocation_key_as_array=inputs[0],
            transforms=jax.tree.unflatten(eqn.params["tree"], inputs[1:]), source_info=eqn.source_info,
            **self.place)
        return token, [out]

    def run_state(self, eqn, token, inputs):
        """Values become registers for the length of the body, and come back from there."""
        body, refs = eqn.params["jaxpr"], []
        for value, var, out in zip(inputs, body.invars, eqn.outvars, strict=True):
            if isinstance(out.aval, state_types.AbstractRef):
                refs.append(value)
                continue
            request = dict(device_id=self.place["device_id"], initial_ref_count=1, thread_id=self.thread_id,
                           memory_space_id=gpu_callbacks.get_memory_space_idx(gpu_core.MemorySpace.REGS))
            token, request = gpu_callbacks.call_make_allocation_request_array(token=token, **request)
            token, ref = gpu_callbacks.call_allocate_buffer(
                token=token, allocation_request_as_array=request, value=jnp.asarray(value),
                source_info=eqn.source_info, **self.place)
            refs.append(ref)
        token, _ = self.interpret(body, token, *refs)
        (token,) = self.call(wait, token)
        outs = []
        for ref, out in zip(refs, eqn.outvars, strict=True):
            if not isinstance(out.aval, state_types.AbstractRef):
                token, ref = gpu_callbacks.call_get(
                    token=token, result_shape_and_dtype=out.aval, allocation_key_as_array=ref, transforms=(),
                    **self.place)
            outs.append(ref)
        return token, outs

    def wgmma(self, eqn, token, inputs):
        trees = [eqn.params[f"{name}_transforms_tree"] for name in "ab"]
        assert not eqn.params["acc_transforms_tree"]
        sums, left, right, *leaves = inputs
        is_ref = isinstance(eqn.invars[1].aval, state_types.AbstractRef)
        of_left, of_right = jax.tree.unflatten(jax.tree_util.treedef_tuple(
            [tree or jax.tree.structure([]) for tree in trees]), leaves)
        names = [tuple(type(t).__name__ for t in transforms) for transforms in (of_left, of_right)]
        begin = functools.partial(begin_product, is_ref, names)
        indices = [[t for t in transforms if hasattr(t, "indices")] for transforms in (of_left, of_right)]
        (token,) = self.call(begin, token, sums, left, right, indices)
        return token, []

    def deref(self, eqn, token, inputs):
        assert eqn.params["wait_n"] == 0
        (token,) = self.call(wait, token)
        token, out = gpu_callbacks.call_get(
            token=token, result_shape_and_dtype=eqn.outvars[0].aval, allocation_key_as_array=inputs[0],
            transforms=(), **self.place)
        return token, [out]

    def copy_out(self, eqn, token, inputs):
        """Shared memory to global memory, as a read and a write of the thread that asks for it."""
        assert eqn.params["reduction_op"] is None and not eqn.params["has_user_predicate"]
        trees = [eqn.params[f"{name}_transforms_treedef"] for name in ("src", "dst")]
        source, target, *leaves = inputs
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        (token,) = self.call(copy_out, token, source, target, transforms)
        return token, []


HANDLERS = {
    gpu_core.layout_cast_p: Interpreter.layout_cast,
    primitives.load_p: Interpreter.load,
    discharge.run_state_p: Interpreter.run_state,
    primitives.wgmma_ref_p: Interpreter.wgmma,
    primitives.wgmma_accumulator_deref_p: Interpreter.deref,
    primitives.copy_smem_to_gmem_p: Interpreter.copy_out,
}


def _read(place, key, transforms) -> np.ndarray:
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(tuple(transforms)))
    return np.asarray(gpu_callbacks._get(np.int32(0), **place, allocation_key_as_array=key,
                                         transforms=transforms)[1])


def _write(place, key, transforms, value) -> None:
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(tuple(transforms)))
    gpu_callbacks._swap(np.int32(0), **place, allocation_key_as_array=key, transforms=transforms, val=value,
                        mask=None)


def begin_product(is_ref, names, place, sums, left, right, indices):
    """Notes a product; its operands are read in `wait`."""
    def operand(x, names, indices):
        x = _read(place, x, indices)
        return x.swapaxes(0, 1) if names[-1:] == ("TransposeTransform",) else x

    def product():
        one = operand(left, names[0], indices[0]) if is_ref else np.asarray(left)
        other = operand(right, names[1], indices[1])
        assert one.dtype == other.dtype == jnp.bfloat16
        _write(place, sums, (), _read(place, sums, ()) + np.float32(one) @ np.float32(other))
    _PENDING[int(place["thread_id"])].append(product)
    return ()


def wait(place):
    """All products of the thread."""
    pending = _PENDING[int(place["thread_id"])]
    while pending:
        pending.pop(0)()
    return ()


def copy_out(place, source, target, transforms):
    _write(place, target, transforms[1], _read(place, source, transforms[0]))
    return ()


