"""The groups that parameters are named by: what freezes together, what LoRA adapts, whose norms are told."""

import jax

from irg_jax.models.functional import Params

# Dotted prefixes; every parameter is in one group.
GROUPS = {
    "und": ("decoder.layers.und", "decoder.norm"),
    "gen": ("decoder.layers.gen", "decoder.norm_gen"),
    "vit": ("vit",),
    "connector": ("connector",),
    "embeddings": ("embed", "lm_head"),
    "latent": ("vae2llm", "llm2vae", "time_embedder"),
}


def group_of(path: str) -> str:
    """The group of `GROUPS` that a parameter, by its dotted path, belongs to."""
    return next(name for name, prefixes in GROUPS.items() if any(is_below(path, each) for each in prefixes))


def is_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def paths_of(params: Params) -> list[str]:
    """Dotted paths of all leaves, in their order."""
    return [jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def keep(params: Params, flags: list[bool]) -> Params:
    """The leaves whose flag, in their order, is set, as a tree that lacks the rest; maybe {}."""
    def below(flags: Params, tree: Params) -> Params:
        parts = {name: (below(flags[name], child) or None) if isinstance(child, dict)
                 else (child if flags[name] else None) for name, child in tree.items()}
        return {name: part for name, part in parts.items() if part is not None}
    return below(jax.tree.unflatten(jax.tree.structure(params), flags), params)


def pick(params: Params, like: Params) -> Params:
    """The leaves of `params` that stand where `like` has one."""
    return {name: pick(params[name], child) if isinstance(child, dict) else params[name]
            for name, child in like.items()}


def replace(params: Params, others: Params) -> Params:
    """`params` with what `others` holds in its place, or beside it."""
    return params | {name: replace(params[name], value) if isinstance(value, dict) and name in params else value
                     for name, value in others.items()}
