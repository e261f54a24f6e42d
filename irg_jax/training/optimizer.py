"""AdamW with clipping, warm-up and a schedule, over the parameters that train.

A gradient and the moments are trees of the parameters that train and of no others: what is frozen costs
neither.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from irg_jax.models.functional import Params
from irg_jax.training.compact import make_packing, scale_by_compact_adam

# What `frozen` may name beside dotted prefixes; every parameter is in one of them.
GROUPS = {
    "und": ("decoder.layers.und", "decoder.norm"),
    "gen": ("decoder.layers.gen", "decoder.norm_gen"),
    "vit": ("vit",),
    "connector": ("connector",),
    "embeddings": ("embed", "lm_head"),
    "latent": ("vae2llm", "llm2vae", "time_embedder"),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The paper's values. `schedule` is constant, or linear or cosine down to `final_learning_rate`."""

    learning_rate: float = 2e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    final_learning_rate: float = 0.0  # at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0                 # global gradient norm
    moments: str = "float32"          # or "bfloat16", "int8": 8, 4 or 2 bytes a parameter, see `compact`
    frozen: tuple[str, ...] = ()      # groups, or dotted prefixes of parameters, that do not train
    ema_decay: float = 0.995
    ema_copies_frozen: bool = True    # IRG copies frozen weights into the EMA, BAGEL leaves them

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; use 'constant', 'linear' or 'cosine'")
        if self.moments != "float32":
            make_packing(self.b1, self.b2, self.moments)    # refused now, or never
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"final_learning_rate is {self.final_learning_rate}; it must be between 0 and "
                             f"learning_rate = {self.learning_rate}")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """lr * min(1, step / warmup_steps), then constant, linear or half a cosine; step 0 is the first."""
    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rate = config.learning_rate * jnp.minimum(1.0, step / max(config.warmup_steps, 1)
                                                  if config.warmup_steps else 1.0)
        if config.schedule == "constant":
            return rate
        progress = jnp.clip((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        final = config.final_learning_rate
        # Still warming up, the rate may be below the final one.
        return jnp.where(step < config.warmup_steps, rate, final + (rate - final) * left)
    return schedule


def group_of(path: str) -> str:
    """The group of `GROUPS` that a parameter, by its dotted path, belongs to."""
    return next(name for name, prefixes in GROUPS.items() if any(_is_below(path, each) for each in prefixes))


def trainable_mask(params: Params, frozen: tuple[str, ...]) -> Any:
    """Tree of bool. Raises ValueError if a name of `frozen` is no group and no parameter's prefix."""
    paths = paths_of(params)
    prefixes = [prefix for name in frozen for prefix in GROUPS.get(name, (name,))]
    for prefix in prefixes:
        if not any(_is_below(path, prefix) for path in paths):
            tops = sorted({path.split(".")[0] for path in paths})
            raise ValueError(f"optimizer.frozen: no parameter is at or below {prefix!r}; the groups are "
                             f"{', '.join(GROUPS)}, the tops {', '.join(tops)}")
    flags = [not any(_is_below(path, prefix) for prefix in prefixes) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def paths_of(params: Params) -> list[str]:
    """Dotted paths of all leaves, in their order."""
    return [jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def select(params: Params, frozen: tuple[str, ...]) -> Params:
    """What trains, as a tree that lacks the rest. Raises: as `trainable_mask`, or if nothing is left."""
    def one(tree, mask):
        if not isinstance(tree, dict):
            return tree if mask else None
        parts = {name: one(child, mask[name]) for name, child in tree.items()}
        return {name: part for name, part in parts.items() if part is not None} or None
    if not (chosen := one(params, trainable_mask(params, frozen))):
        raise ValueError(f"optimizer.frozen is {frozen}: nothing is left to train")
    return chosen


def replace(params: Params, trained: Params) -> Params:
    """`params` with what `trained` holds in its place."""
    return params | {name: replace(params[name], value) if isinstance(value, dict) else value
                     for name, value in trained.items()}


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW. It takes all parameters, and gradients of those that train."""
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip),
        scale_by_compact_adam(config.b1, config.b2, config.eps, config.moments),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)))
    return optax.GradientTransformation(
        lambda params: adamw.init(select(params, config.frozen)),
        lambda grads, state, params: adamw.update(grads, state, select(params, config.frozen)))


def update_ema(config: OptimizerConfig, ema: Any, params: Any) -> Any:
    """decay * ema + (1 - decay) * params, in float32; frozen parameters as configured."""
    mask = trainable_mask(params, config.frozen)
    decay = config.ema_decay
    def one(old, new, trains):
        if trains:
            return decay * old + (1 - decay) * new
        return new if config.ema_copies_frozen else old
    return jax.tree.map(one, ema, params, mask)
