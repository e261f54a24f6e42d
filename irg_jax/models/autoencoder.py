"""The FLUX autoencoder: pixels to latents and back, frozen in all of IRG's training.

Axes: B images, H and W pixels (or positions of a level), C channels, Z latent channels.
Images are NHWC in [-1, 1]. Source: `AutoEncoder` of BAGEL's modeling/autoencoder.py; attribute names follow
its state dict, so that the weight table is a rule and not a list.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from data_pipelines.batch import INF, Rows
from irg_jax.kernels.attention import attend, look
from irg_jax.models.config import VAEConfig
from irg_jax.models.layers import constant, param

Image = Float[Array, "B _ _ _"]   # NHWC; a convolution changes all but B
Mask = Bool[Array, "B _ _ 1"]


class Conv(nnx.Module):
    """A convolution; positions outside the mask read as zero, as padding does at an image's border."""

    def __init__(self, c_in: int, c_out: int, size: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = param(rngs, (size, size, c_in, c_out), (None,) * 4, 1 / math.sqrt(c_in * size**2))
        self.bias = constant((c_out,), (None,), 0.0)
        self.stride = stride

    def __call__(self, x: Image, mask: Mask | None = None) -> Image:
        if mask is not None:
            x = jnp.where(mask, x, 0)
        size = self.kernel.shape[0]
        # The stride-2 convolution pads right and below only, as the original does.
        pad = (0, 1) if self.stride == 2 else (size // 2, size // 2)
        y = jax.lax.conv_general_dilated(x, self.kernel[...].astype(x.dtype), (self.stride,) * 2, (pad, pad),
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """32 groups, eps 1e-6, in float32; statistics over the mask's positions alone."""

    GROUPS = 32

    def __init__(self, channels: int):
        self.scale = constant((channels,), (None,), 1.0)
        self.bias = constant((channels,), (None,), 0.0)

    def __call__(self, x: Image, mask: Mask | None = None) -> Image:
        batch, height, width, channels = x.shape
        y = x.astype(jnp.float32).reshape(batch, height, width, self.GROUPS, -1)
        where = jnp.ones((1, 1, 1, 1, 1), bool) if mask is None else mask[..., None]
        mean = jnp.mean(y, (1, 2, 4), keepdims=True, where=where)
        var = jnp.mean((y - mean) ** 2, (1, 2, 4), keepdims=True, where=where)
        y = ((y - mean) * jax.lax.rsqrt(var + 1e-6)).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResnetBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = GroupNorm(c_in), GroupNorm(c_out)
        self.conv1 = Conv(c_in, c_out, 3, rngs=rngs)
        self.conv2 = Conv(c_out, c_out, 3, rngs=rngs)
        self.nin_shortcut = Conv(c_in, c_out, 1, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Image, mask: Mask | None = None) -> Image:
        y = self.conv1(jax.nn.silu(self.norm1(x, mask)), mask)
        y = self.conv2(jax.nn.silu(self.norm2(y, mask)), mask)
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x, mask))


class AttnBlock(nnx.Module):
    """One head over all positions of an image (16,384 at 1024 px), through the blockwise `attend`."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels, 1, rngs=rngs) for _ in range(4))

    def __call__(self, x: Image, mask: Mask | None = None) -> Image:
        batch, height, width, channels = x.shape
        inside = jnp.ones((batch, height * width), bool) if mask is None else mask.reshape(batch, -1)
        order = jnp.where(inside, 0, INF)
        rows = Rows(order, order, order, jnp.where(inside, 0, -1), jnp.zeros_like(inside), order)
        y = self.norm(x, mask)
        heads = lambda conv: conv(y).reshape(batch, height * width, 1, channels)
        out = attend(heads(self.q), heads(self.k), heads(self.v), look(rows, rows))
        return x + self.proj_out(out.reshape(x.shape))


class Middle(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(channels, channels, rngs=rngs)
        self.attn_1 = AttnBlock(channels, rngs=rngs)
        self.block_2 = ResnetBlock(channels, channels, rngs=rngs)

    def __call__(self, x: Image, mask: Mask | None = None) -> Image:
        return self.block_2(self.attn_1(self.block_1(x, mask), mask), mask)


class Resample(nnx.Module):
    """`conv` inside a level's `downsample` or `upsample`."""

    def __init__(self, channels: int, *, stride: int, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, stride=stride, rngs=rngs)


class Level(nnx.Module):
    """The blocks of one resolution, and the step to the next."""

    def __init__(self, c_in: int, c_out: int, num_blocks: int, *, resample: str | None, rngs: nnx.Rngs):
        self.block = nnx.List([ResnetBlock(c_in if i == 0 else c_out, c_out, rngs=rngs)
                               for i in range(num_blocks)])
        self.downsample = Resample(c_out, stride=2, rngs=rngs) if resample == "down" else None
        self.upsample = Resample(c_out, stride=1, rngs=rngs) if resample == "up" else None

    def __call__(self, x: Image, mask: Mask | None = None) -> tuple[Image, Mask | None]:
        for block in self.block:
            x = block(x, mask)
        if self.downsample is not None:
            x = self.downsample.conv(x, mask)
            mask = None if mask is None else mask[:, ::2, ::2]
        if self.upsample is not None:
            x = self.upsample.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), mask)
        return x, mask


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.ch * mult for mult in config.ch_mult]
        inputs, last = [config.ch, *widths[:-1]], len(widths) - 1
        self.conv_in = Conv(config.in_channels, config.ch, 3, rngs=rngs)
        self.down = nnx.List([Level(c_in, c_out, config.num_res_blocks, rngs=rngs,
                                    resample="down" if i < last else None)
                              for i, (c_in, c_out) in enumerate(zip(inputs, widths))])
        self.mid = Middle(widths[-1], rngs=rngs)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(widths[-1], 2 * config.z_channels, 3, rngs=rngs)

    def __call__(self, x: Image, mask: Mask | None = None) -> Float[Array, "B h w Y"]:
        x = self.conv_in(x, mask)
        for level in self.down:
            x, mask = level(x, mask)
        x = self.mid(x, mask)
        return self.conv_out(jax.nn.silu(self.norm_out(x, mask)), mask)


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.ch * mult for mult in config.ch_mult]
        inputs = [*widths[1:], widths[-1]]   # level i takes what level i + 1 gives
        self.conv_in = Conv(config.z_channels, widths[-1], 3, rngs=rngs)
        self.mid = Middle(widths[-1], rngs=rngs)
        self.up = nnx.List([Level(c_in, c_out, config.num_res_blocks + 1, rngs=rngs,
                                  resample="up" if i > 0 else None)
                            for i, (c_in, c_out) in enumerate(zip(inputs, widths))])
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = Conv(widths[0], config.out_ch, 3, rngs=rngs)

    def __call__(self, z: Float[Array, "B h w Z"]) -> Image:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x, _ = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, image: Float[Array, "B H W 3"], mask: Mask | None = None
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Mean and log variance of the posterior, unscaled.

        `mask` marks the pixels of images that lie top left on a larger canvas; their posterior does not
        depend on the canvas. Image sides must be multiples of `config.downsample`.
        """
        mean, logvar = jnp.split(self.encoder(image, mask), 2, axis=-1)
        return mean, logvar

    def decode(self, latent: Float[Array, "B h w Z"]) -> Float[Array, "B H W 3"]:
        """Pixels of a scaled latent (not clipped)."""
        return self.decoder(latent / self.config.scale_factor + self.config.shift_factor)

    def scale(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """A posterior sample as the latent that flow matching works on."""
        return self.config.scale_factor * (z - self.config.shift_factor)
