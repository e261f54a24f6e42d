"""AdamW with clipping and warm-up, over the parameters that train."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The paper's values. `schedule` is constant, or cosine down to zero at the last step."""

    learning_rate: float = 2e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0                 # global gradient norm
    frozen: tuple[str, ...] = ()      # dotted prefixes of parameters that do not train, e.g. "vit"
    ema_decay: float = 0.995
    ema_copies_frozen: bool = True    # IRG copies frozen weights into the EMA, BAGEL leaves them

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; use 'constant' or 'cosine'")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """lr * min(1, step / warmup_steps), then constant or a half cosine; step 0 is the first."""
    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rate = config.learning_rate * jnp.minimum(1.0, step / max(config.warmup_steps, 1)
                                                  if config.warmup_steps else 1.0)
        if config.schedule == "cosine":
            rest = max(total_steps - config.warmup_steps, 1)
            progress = jnp.clip((step - config.warmup_steps) / rest, 0.0, 1.0)
            rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return rate
    return schedule


def trainable_mask(params: Any, frozen: tuple[str, ...]) -> Any:
    """Tree of bool. Raises ValueError if a prefix of `frozen` names no parameter."""
    paths = [jax.tree_util.keystr(path, simple=True, separator=".")
             for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    is_below = lambda path, prefix: path == prefix or path.startswith(prefix + ".")
    for prefix in frozen:
        if not any(is_below(path, prefix) for path in paths):
            raise ValueError(f"optimizer.frozen: no parameter is at or below {prefix!r}; the tops are "
                             f"{sorted({path.split('.')[0] for path in paths})}")
    flags = [not any(is_below(path, prefix) for prefix in frozen) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def make_optimizer(config: OptimizerConfig, total_steps: int, params: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; frozen parameters have no moments and no update."""
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(learning_rate(config, total_steps), config.b1, config.b2, config.eps,
                    weight_decay=config.weight_decay))
    if not config.frozen:
        return adamw
    labels = jax.tree.map(lambda trains: "train" if trains else "frozen",
                          trainable_mask(params, config.frozen))
    return optax.partition({"train": adamw, "frozen": optax.set_to_zero()}, labels)


def update_ema(config: OptimizerConfig, ema: Any, params: Any) -> Any:
    """decay * ema + (1 - decay) * params, in float32; frozen parameters as configured."""
    mask = trainable_mask(params, config.frozen)
    decay = config.ema_decay
    def one(old, new, trains):
        if trains:
            return decay * old + (1 - decay) * new
        return new if config.ema_copies_frozen else old
    return jax.tree.map(one, ema, params, mask)
