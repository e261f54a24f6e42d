"""Adam's two moments in 8, 4 or 2 bytes per parameter.

    moments     mu           nu                                      bytes per parameter
    float32     m            v                                       8 (it is `optax.scale_by_adam`)
    bfloat16    m            r = sqrt(v)                             4
    int8        m / r        r, against limits of row and column     2 + 4 / rows + 4 / columns, 2.00 here

With eps = 1e-15 a second moment that is rounded to nothing before the first one makes an update explode, so:

- r is stored, which has half the exponent of v, and v is never formed: `hypot` does not underflow.
- In bfloat16 r has the exponents of float32. Either is lost only below 1.2e-38, and m / eps below 1e-22.
- In 8 bits r has no code for zero; what is too small is stored as the smallest code, for smaller updates.
  m is stored as its share of r. By Cauchy and Schwarz |m| <= bound * r for any gradients, so every error of an
  update is against an update of order 1, however far apart a row's gradients are.

A moment moves by less than what the stored digits tell apart: rounded to the nearest it stands still, up to 4 %
(m) and 8 % (r) off in bfloat16. It is rounded up or down by chance instead, and so is right on average. Chance
is a function of step, leaf and place: the same on any mesh. All arithmetic is float32; the update is made
of m and r before they are rounded. Against float64 an update of order 1 is off by up to 0.004 (bfloat16) or
0.025 (int8), root mean square over 200 steps (tests/test_compact.py).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, Int8, UInt8, UInt32

OCTAVES = 16        # r of 8 bits reaches down to 2^-16 of its limit, in steps of 4.4 %
ROOT_TOP = 255
SHARE_TOP = 127
SLACK = 1.1         # of the bound of m / r: r may have been rounded down by a step


class CompactState(NamedTuple):
    """`mu` and `nu` are trees like the parameters, of arrays or (nu of int8) of `Roots`."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


class Roots(NamedTuple):
    """r = min(rows, columns) * 2^(OCTAVES * (code / 255 - 1)).

    A limit is what r would be of the row's (column's) largest gradients of all steps. They are known before any
    r, so that all else is elementwise and no r of all places stands in float32. Two, for tokens are the rows
    of the embedding and the columns of the output layer. Of size 1 along the last axis (the one before it);
    elsewhere they can lie as the parameter does.
    """

    code: UInt8[Array, "*shape"]
    rows: Float[Array, "*shape1"]
    columns: Float[Array, "*shape2"]


def throw(shape: tuple[int, ...], seed: UInt32[Array, ""]) -> tuple[UInt32[Array, "*shape"], ...]:
    """Chances for m and for r, of which the upper 16 bits are independent of each other and of all others."""
    bits = jnp.broadcast_to(seed, shape)
    for axis in range(len(shape)):
        bits = mix(bits + lax.broadcasted_iota(jnp.uint32, shape, axis))
    return bits, bits << 16


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection; every bit depends on all (lowbias32 of C. Wellons: cheaper than a key's by ten times)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def uniform(chance: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """In [0, 1), exactly: of 24 bits."""
    return (chance >> 8).astype(jnp.float32) * 2.0**-24


def round_half(x: Float[Array, "*shape"], chance: UInt32[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """To one of the two nearest bfloat16, on average x. Relative error below 2^-7."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (chance >> 16)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def peaks(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*shape1"]:
    """Maxima along an axis, which stays with size 1; of vectors and scalars the one maximum."""
    return jnp.max(x, axis if x.ndim > 1 else None, keepdims=True, initial=0.0)


def average(b2: float, r: Float[Array, "*shape"], g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(b2 r^2 + (1 - b2) g^2), with no square that could underflow."""
    return jnp.hypot(math.sqrt(b2) * r, math.sqrt(1 - b2) * g)


def encode_roots(r: Float[Array, "*shape"], limit: Float[Array, "*shape"], chance: UInt32[Array, "*shape"]
                 ) -> UInt8[Array, "*shape"]:
    """0 <= r <= limit. On average r^2 is kept, as that is what is averaged over steps. Error below 4.5 %."""
    place = ROOT_TOP + jnp.log2(r / jnp.where(limit > 0, limit, 1.0)) * (ROOT_TOP / OCTAVES)
    place = jnp.clip(place, 0, ROOT_TOP)     # log2(0) = -inf: the smallest code
    below, step = jnp.floor(place), 2 * math.log(2) * OCTAVES / ROOT_TOP
    rises = uniform(chance) < jnp.expm1(step * (place - below)) / math.expm1(step)
    return (below + rises).astype(jnp.uint8)


def decode_roots(roots: Roots) -> Float[Array, "*shape"]:
    exponent = (roots.code.astype(jnp.float32) - ROOT_TOP) * (OCTAVES / ROOT_TOP)
    return jnp.minimum(roots.rows, roots.columns) * jnp.exp2(exponent)


def encode_shares(share: Float[Array, "*shape"], chance: UInt32[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """[-1, 1] -> k with share = sign(k) (k / 127)^2 on average: steps grow from 1 / 16,129 to 1.6 %."""
    place = SHARE_TOP * jnp.sqrt(jnp.minimum(jnp.abs(share), 1.0))
    below = jnp.floor(place)
    rises = uniform(chance) * (2 * below + 1) < place**2 - below**2
    return (jnp.sign(share) * (below + rises)).astype(jnp.int8)


def decode_shares(code: Int8[Array, "*shape"]) -> Float[Array, "*shape"]:
    share = code.astype(jnp.float32) / SHARE_TOP
    return share * jnp.abs(share)


@dataclasses.dataclass(frozen=True)
class Halves:
    """m and r in bfloat16."""

    def zeros(self, param):
        return jnp.zeros(param.shape, jnp.bfloat16), jnp.zeros(param.shape, jnp.bfloat16)

    def pack(self, m, r, g, nu, chances):
        return round_half(m, chances[0]), round_half(r, chances[1])

    def unpack(self, mu, nu):
        return mu.astype(jnp.float32), nu.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """r in 8 bits, and m as its share of `bound` times the r that is stored."""

    b2: float
    bound: float

    def zeros(self, param):
        # Not the peaks of zeros themselves: XLA would fold these constants, for minutes.
        shapes = [jax.eval_shape(functools.partial(peaks, axis=axis), param).shape for axis in (-1, -2)]
        zeros = functools.partial(jnp.zeros, param.shape)
        return zeros(jnp.int8), Roots(zeros(jnp.uint8), *map(jnp.zeros, shapes))

    def pack(self, m, r, g, nu, chances):
        rows = average(self.b2, nu.rows, peaks(jnp.abs(g), -1))
        columns = average(self.b2, nu.columns, peaks(jnp.abs(g), -2))
        nu = Roots(encode_roots(r, jnp.minimum(rows, columns), chances[1]), rows, columns)
        whole = self.bound * decode_roots(nu)
        share = jnp.where(whole > 0, m / jnp.where(whole > 0, whole, 1.0), 0.0)
        return encode_shares(share, chances[0]), nu

    def unpack(self, mu, nu):
        r = decode_roots(nu)
        return decode_shares(mu) * (self.bound * r), r


def make_packing(b1: float, b2: float, moments: str) -> Halves | Bytes:
    """Raises: ValueError if `moments` is unknown, or of 8 bits where m / r has no bound."""
    if moments == "bfloat16":
        return Halves()
    if moments != "int8":
        raise ValueError(f"moments is {moments!r}; use 'float32', 'bfloat16' or 'int8'")
    if b1**2 >= b2:
        raise ValueError(f"b1 is {b1} and b2 {b2}; moments of int8 need b1^2 < b2. Use 'bfloat16'")
    return Bytes(b2, SLACK * (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2)))


def scale_by_compact_adam(b1: float, b2: float, eps: float, moments: str) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments of float32, bfloat16 or int8.

    Raises: ValueError as `make_packing`.
    """
    if moments == "float32":
        return optax.scale_by_adam(b1, b2, eps)
    packing = make_packing(b1, b2, moments)

    def step_leaf(count: Int[Array, ""], seed: UInt32[Array, ""], g: Array, mu: Any, nu: Any):
        m, r = packing.unpack(mu, nu)
        g = g.astype(jnp.float32)
        m, r = b1 * m + (1 - b1) * g, average(b2, r, g)
        update = m / (1 - b1**count) / (r / jnp.sqrt(1 - b2**count) + eps)
        return update, *packing.pack(m, r, g, nu, throw(g.shape, seed))

    def init(params: Any) -> CompactState:
        zeros = unzip(params, map(packing.zeros, jax.tree.leaves(params)), 2)
        return CompactState(jnp.zeros((), jnp.int32), *zeros)

    def update(grads: Any, state: CompactState, params: Any = None) -> tuple[Any, CompactState]:
        del params
        tree = jax.tree.structure(grads)
        leaves = zip(*map(tree.flatten_up_to, (grads, state.mu, state.nu)), strict=True)
        count = optax.safe_increment(state.count)
        seed = mix(count.astype(jnp.uint32))
        parts = [step_leaf(count, mix(seed + jnp.uint32(number)), *leaf) for number, leaf in enumerate(leaves)]
        updates, mu, nu = unzip(grads, parts, 3)
        return updates, CompactState(count, mu, nu)
    return optax.GradientTransformation(init, update)


def unzip(like: Any, parts: Any, width: int) -> list[Any]:
    """One tuple per leaf of `like` -> as many trees as a tuple is wide."""
    parts = list(parts)
    return [jax.tree.structure(like).unflatten([part[index] for part in parts]) for index in range(width)]
