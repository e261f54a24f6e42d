"""Cost tables for the tests of plans: written by hand, or of random records."""

import random

import numpy as np

from data_pipelines.costs import CostTable
from data_pipelines.records import Kind


def cost_table(records) -> CostTable:
    """records: lists of (kind, text, vit, latent, images)."""
    items = [np.array(record, np.int32).reshape(-1, 5) for record in records]
    return CostTable(np.concatenate(items), np.cumsum([0, *map(len, items)]))


def texts(*sizes: int) -> list[list[tuple]]:
    """Records of one text each."""
    return [[(Kind.TEXT, size, 0, 0, 0)] for size in sizes]


def random_record(rng: random.Random, kind: str = "conversation") -> list[tuple]:
    """Candidates in the order that `choices` promises for the kind."""
    text = lambda: (Kind.TEXT, rng.randint(3, 40), 0, 0, 0)
    size = lambda: rng.choice((4, 9, 16))
    image = lambda kind: (kind, 2, size(), 0, 0) if kind == Kind.VIT else (kind, 2, 0, size(), 1)
    captions = lambda: [text() for _ in range(rng.randint(1, 3))]
    if kind == "text_to_image":
        return [*captions(), image(Kind.NOISED)]
    if kind == "editing":
        rows = [image(Kind.CLEAN), image(Kind.VIT)]
        for _ in range(rng.randint(0, 2)):
            rows += [*captions(), *map(image, (Kind.NOISED, Kind.CLEAN, Kind.VIT))]
        return [*rows, *captions(), image(Kind.NOISED)]
    images = [image(rng.choice((Kind.VIT, Kind.CLEAN, Kind.NOISED))) for _ in range(rng.randint(0, 2))]
    return [text(), *images]


def random_tables(seed: int, groups) -> dict[str, CostTable]:
    rng = random.Random(seed)
    tables = {}
    for group in groups:
        records = [random_record(rng, group.kind) for _ in range(rng.randint(1, 12))]
        records.insert(rng.randint(0, len(records)), [])  # a bad one
        tables[group.name] = cost_table(records)
    return tables
