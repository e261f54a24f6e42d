"""What planned packs hold, and the work that is in them: the part of a step's operations that nobody can save.

Packs are planned from real costs or simulated ones (`data_pipelines.simulation`), by the planner that training
uses.
"""

import dataclasses
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import PackedBatch, Rows
from data_pipelines.config import DataConfig
from data_pipelines.costs import CostTable
from data_pipelines.packing import assemble
from data_pipelines.planning import Pack, Planner
from data_pipelines.records import Kind
from data_pipelines.samples import Gap, Item, Text, VAEImage, ViTImage, draw
from data_pipelines.simulation import simulate
from irg_jax.config import TrainConfig
from irg_jax.kernels.tiles import map_tiles, pad_rows
from irg_jax.models.config import ModelConfig
from irg_jax.models.groups import GROUPS
from irg_jax.models.joint import look_together
from irg_jax.models.vision import own_images

RECORDS = 2000   # simulated of each group


@dataclasses.dataclass(frozen=True)
class Planned:
    """Means over packs; pairs are (query, key) that see each other."""

    text: float            # tokens, without padding
    vit: float
    latent: float
    fill: float            # of the streams together
    pairs: float           # in the language model
    vit_pairs: float       # in the vision encoder
    visible_ratio: float   # pairs over all slots of attention squared
    visited_ratio: float   # the same if tiles with a pair count as a whole


def plan_packs(config: DataConfig, *, tables: dict[str, CostTable] | None = None, packs: int = 16,
               tile: int = 512) -> Planned:
    """Plans packs of the config's mixture and budgets.

    Args:
        tables: the costs of each group; simulated if left out.
        tile: side of an attention kernel's tiles, in tokens.
    Raises: ValueError if a group is none of the simulated modes.
    """
    tables = tables or simulate(config, records=RECORDS)
    planner = Planner(config, tables)
    return _mean([measure_pack(lay_out(planner[index], config, tables), tile) for index in range(packs)])


def lay_out(pack: Pack, config: DataConfig, tables: dict[str, CostTable]) -> PackedBatch:
    """A planned pack with the rows it will have; texts and pixels are zeros."""
    groups = {group.name: group for group in config.groups}

    def sample(entry) -> list[Item]:
        items = tables[entry.group].record(entry.index)
        draws = draw(items[:, 0], config, group=groups[entry.group], epoch=entry.epoch, index=entry.index)
        return [item for index, keep in zip(draws.chosen, draws.keep)
                if (item := _item(items[index], keep, config)) is not None]
    brackets = types.SimpleNamespace(bos=0, eos=0, start_of_image=0, end_of_image=0)
    return assemble(map(sample, pack.entries), config=config, tokenizer=brackets)


def _item(row: np.ndarray, keep: bool, config: DataConfig) -> Item | None:
    kind, text, vit, latent, _ = row.tolist()
    if kind in (Kind.TEXT, Kind.SYSTEM):
        return Text([0] * (text - 2), loss=False) if keep else None
    if not keep:
        return Gap()
    is_vit, tokens = kind == Kind.VIT, vit + latent
    patch, side = ((config.vit_patch, config.vit_max_side) if is_vit
                   else (config.latent_patch, config.max_latent_size))
    # Costs do not tell an image's sides: any that its position table holds will do.
    height = next(height for height in range(-(-tokens // side), side + 1) if tokens % height == 0)
    image = np.zeros((patch * height, patch * tokens // height, 3), np.uint8)
    return ViTImage(image) if is_vit else VAEImage(image, noised=kind == Kind.NOISED)


def measure_pack(pack: PackedBatch, tile: int) -> Planned:
    """The same for a single pack (no B axis)."""
    streams = (pack.text_rows, pack.vit_rows, pack.latent_rows)
    used = [int(np.sum(rows.last >= 0)) for rows in streams]
    rows = rows_together(*streams)
    slots, pairs = len(rows.order), count_pairs(rows)
    fill = sum(used) / sum(len(stream.order) for stream in streams)
    return Planned(*used, fill, pairs, count_pairs(own_images(pack.vit_rows)), pairs / slots**2,
                   count_tiles(rows, tile) * tile**2 / slots**2)


def rows_together(*streams: Rows) -> Rows:
    """The rows of a pack [S] as attention has them: streams of several tiles begin on one."""
    sight = look_together(tuple(jax.tree.map(lambda row: jnp.asarray(row)[None], rows) for rows in streams))
    return jax.tree.map(lambda row: np.asarray(row[0]), sight.query)


def count_pairs(rows: Rows) -> int:
    """Visible (query, key) pairs of a pack [S], by counting orders instead of looking at pairs."""
    real = rows.last >= 0
    order, noised = np.sort(rows.order[real]), np.sort(rows.order[real & rows.noised])
    below = lambda orders, bound: np.searchsorted(orders, bound)
    seen = below(order, rows.last[real] + 1) - below(order, rows.first[real])
    hidden = below(noised, rows.span[real]) - below(noised, rows.first[real])
    return int(np.sum(seen - hidden))


def count_tiles(rows: Rows, tile: int) -> int:
    """Tiles [tile, tile] that the attention kernel visits in a pack [S]."""
    rows = pad_rows(jax.tree.map(lambda row: row[None], rows), tile)
    return int(map_tiles(rows, rows, tile)[0].sum())


def count_passes(config: TrainConfig) -> dict[str, int]:
    """Passes over the weights of each group: forward, to the gradient of its input, to that of its weights.

    Whole kernels that do not train need no third; the vision encoder needs no second if nothing of it trains.
    Adapters are so small that they are left out.
    """
    learns = [group for group in GROUPS if group not in config.optimizer.frozen]
    thin = config.lora.groups
    passes = {group: 2 + (group in learns and group not in thin) for group in GROUPS}
    if "vit" not in learns:
        passes["vit"] -= 1
        passes["connector"] -= 1
    return passes


def model_flops(planned: Planned, model: ModelConfig, image_flops: float,
                passes: Mapping[str, int] | None = None) -> float:
    """Operations of a pack's tokens and pairs, forward and backward, nothing twice, padding left out.

    2 a weight, token and pass, all three if `passes` are not given, and 12 a pair and width of the heads; the
    vocabulary is counted for text tokens, and the encoder of images, which is not differentiated, by
    `image_flops` (of the pack).
    """
    passes = passes or dict.fromkeys(GROUPS, 3)
    llm, vit = model.llm, model.vit
    attention = 2 * llm.head_dim * (llm.num_attention_heads + llm.num_key_value_heads)
    expert = llm.num_hidden_layers * llm.hidden_size * (attention + 3 * llm.intermediate_size)
    encoder = model.num_vit_layers * vit.hidden_size * (4 * vit.hidden_size + 2 * vit.intermediate_size)
    encoder += vit.hidden_size * vit.patch_size**2 * vit.num_channels
    connector = llm.hidden_size * (vit.hidden_size + llm.hidden_size)
    weights = {"und": expert * (planned.text + planned.vit), "gen": expert * planned.latent,
               "vit": encoder * planned.vit, "connector": connector * planned.vit,
               "embeddings": llm.hidden_size * llm.vocab_size * planned.text}
    pairs = 3 * llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim * planned.pairs
    pairs += (3 if passes["vit"] > 1 else 1) * model.num_vit_layers * vit.hidden_size * planned.vit_pairs
    return sum(2.0 * passes[group] * count for group, count in weights.items()) + 4.0 * pairs + image_flops


def _mean(packs: list[Planned]) -> Planned:
    return Planned(*np.mean([dataclasses.astuple(each) for each in packs], axis=0).tolist())
