"""From NNX modules to plain nested dicts, once; from there on only `jax.*` transforms.

Parameters of a model are a dict of dicts of arrays whose dotted paths are the attribute names
(`decoder.layers.und.q.kernel`); list items are keyed by their index as a string.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def _to_dict(state: nnx.State, leaf: Callable[[nnx.Param], Any]) -> Params:
    tree: Params = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf(variable)
    return tree


class Functional:
    """A model split into its structure and its parameters.

        model = Functional(lambda rngs: IRG(config, rngs=rngs))
        params = model.init(seed)
        logits = model.bind(params).logits(hidden)      # inside jit: bind only costs tracing time
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self._graphdef, self._state, rest = nnx.split(abstract, nnx.Param, ...)
        assert not jax.tree.leaves(rest), "a model holds parameters and nothing else"
        self.shapes = _to_dict(self._state, lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype))
        self.axes = _to_dict(self._state, lambda v: v.get_metadata("axes"))

    def init(self, seed: int) -> Params:
        """Fresh parameters; jit it with out_shardings to place them as they are made."""
        return _to_dict(nnx.state(self._make(nnx.Rngs(seed)), nnx.Param), lambda v: v[...])

    def bind(self, params: Params) -> Any:
        """The module with `params` inside."""
        flat = []
        for path, variable in nnx.to_flat_state(self._state):
            value = params
            for name in path:
                value = value[str(name)]
            flat.append((path, variable.replace(value)))
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))
