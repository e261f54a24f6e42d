"""Budgets that suit the records are found, and the command says which."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_cases import data_config, tokenizer, write_data_set
from data_pipelines.budget import Search
from data_pipelines.config import GroupConfig
from data_pipelines.costs import CostTable
from data_pipelines.records import Kind

ROOT = pathlib.Path(__file__).parents[1]


def table(*items: tuple, count: int = 50) -> CostTable:
    """Records that are all alike."""
    return CostTable(np.array(items * count, np.int32), np.arange(count + 1) * len(items))


def search(tables, **fields) -> Search:
    groups = fields.pop("groups", tuple(GroupConfig(name) for name in tables))
    return Search(data_config(groups=groups, **fields), tables, packs=16, multiple=8)


def test_budgets_are_whole_numbers_of_records_where_those_fit_exactly():
    """A record has 4 + 2 tokens of text and 18 of latents: four are 24 + 72, and nothing is left."""
    found = search({"a": table((Kind.TEXT, 4, 0, 0, 0), (Kind.NOISED, 2, 0, 18, 1))}).best(110)
    assert found.budgets == (24, 0, 72, 4) and found.fill == 1.0 and found.records == 4
    assert found.streams == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("total", [120, 240])
def test_budgets_keep_the_total_and_the_multiple_and_are_what_plans_make_of_them(total):
    tables = {"a": table((Kind.TEXT, 9, 0, 0, 0), (Kind.CLEAN, 2, 0, 16, 1), (Kind.VIT, 2, 25, 0, 0)),
              "b": table((Kind.TEXT, 7, 0, 0, 0), (Kind.NOISED, 2, 0, 16, 1))}
    looked = search(tables, vae_dropout=0.3)
    found = looked.best(total)
    text, vit, latent, images = found.budgets
    assert text + vit + latent <= total and not any(size % 8 for size in (text, vit, latent))
    assert vit >= 25 and latent >= 16 and images == latent // 16
    assert found == looked.measure(text, vit, latent)
    clumsy = [looked.measure(text, vit, latent) for text, vit, latent in ((40, 40, 40), (48, 32, 40))]
    assert found.fill >= max(choice.fill for choice in clumsy)


def test_budgets_that_break_the_rule_of_mandatory_groups_are_no_choice():
    """A record of b fits the smaller budget, but never beside one of a."""
    tables = {"a": table((Kind.TEXT, 8, 0, 0, 0), (Kind.VIT, 2, 14, 0, 0)),
              "b": table((Kind.TEXT, 8, 0, 0, 0), (Kind.VIT, 2, 28, 0, 0))}
    groups = (GroupConfig("a", 1.0, True), GroupConfig("b", 0.5))
    looked = search(tables, groups=groups)
    assert looked.measure(64, 32, 0) is None and looked.measure(64, 48, 0) is not None
    free = search(tables, groups=tuple(dataclasses.replace(group, is_mandatory=False) for group in groups))
    assert free.measure(64, 32, 0) is not None
    with pytest.raises(ValueError, match="no budgets of 64 tokens together.*raise --tokens"):
        looked.best(64)


def test_one_giant_among_many_does_not_set_the_budgets():
    small, giant = (Kind.TEXT, 8, 0, 0, 0), (Kind.TEXT, 5000, 0, 0, 0)
    tables = {"a": CostTable(np.array([small] * 3000 + [giant], np.int32), np.arange(3002))}
    assert search(tables).best(64).budgets == (64, 0, 0, 0)


def test_of_captions_and_edits_a_sample_has_but_some():
    """Four captions of 8 tokens, and a chain of four edits: a sample has one caption, and one or two edits."""
    step = ((Kind.CLEAN, 2, 0, 16, 1), (Kind.VIT, 2, 16, 0, 0), (Kind.TEXT, 4, 0, 0, 0),
            (Kind.NOISED, 2, 0, 16, 1))
    tables = {"t2i": table(*[(Kind.TEXT, 8, 0, 0, 0)] * 4, (Kind.NOISED, 2, 0, 16, 1)),
              "edits": table(*step * 4)}
    groups = (GroupConfig("t2i", kind="text_to_image"), GroupConfig("edits", kind="editing"))
    looked = search(tables, groups=groups)
    assert looked.measure(24, 32, 64) is not None and looked.measure(24, 32, 48) is None
    looked = search({"t2i": tables["t2i"]}, groups=groups[:1])
    assert looked.measure(16, 0, 16) is not None and looked.measure(8, 0, 16) is None


# ---- the command ------------------------------------------------------------------------------

def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "data_pipelines.budget", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"init_from": "nowhere", "data": {
        "source": SOURCE, "groups": {"full": {"weight": 1.0}, "improving": {"weight": 1.0}},
        "vae_transform": {"stride": 16, "max_size": 64, "min_size": 16}, "max_latent_size": 8,
        "vit_transform": {"stride": 14, "max_size": 56, "min_size": 14}, "vit_max_side": 8}})
"""


def test_command_reads_a_data_set(tmp_path):
    source = write_data_set(tmp_path / "data", counts={"full": 20, "improving": 20})
    (tmp_path / "config.py").write_text(CONFIG.replace("SOURCE", json.dumps(str(source))))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    done = run("--config", tmp_path / "config.py", "--tokenizer", tmp_path / "tokenizer.json", "--tokens", 128,
               "--multiple", 8, "--packs", 4)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    sizes = [int(word.split("=")[1]) for word in last.split() if word.startswith("--config.data.")]
    assert last.startswith("for --tokens 128: --config.data.text_tokens=") and len(sizes) == 4
    assert 64 < sum(sizes[:3]) <= 128 and not any(size % 8 for size in sizes[:3])
    rows = [line.split() for line in done.stdout.splitlines() if "%" in line and not line.startswith("the")]
    assert [str(size) for size in sizes] in [row[1:5] for row in rows]


def test_command_simulates_and_tells_mistakes_in_a_sentence(tmp_path):
    done = run("--config", "configs/irgl_stage2.py", "--simulate", "--tokens", 18944, "--packs", 4)
    assert done.returncode == 0 and "--config.data.vit_tokens=4992" in done.stdout, done.stderr
    few = run("--config", "configs/irgl_stage2.py", "--simulate", "--tokens", 4096, "--packs", 4)
    assert few.returncode == 1 and few.stderr.strip().startswith("error: no budgets of 4096 tokens")
    bare = run("--config", "configs/irgl_stage2.py")
    assert bare.returncode == 1 and bare.stderr.strip().startswith("error: no tokenizer in")
    (tmp_path / "config.py").write_text("import ml_collections\nget_config = ml_collections.ConfigDict\n")
    empty = run("--config", tmp_path / "config.py", "--simulate")
    assert empty.returncode == 1 and "no field data" in empty.stderr
