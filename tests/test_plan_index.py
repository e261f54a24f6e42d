"""The pack index: a plan goes on from it, whatever was torn, damaged or written twice."""

import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_cases import data_config
from data_pipelines.config import GroupConfig
from data_pipelines.plan_index import PACKS
from data_pipelines.planning import Planner
from plan_cases import random_tables


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A config, tables, three blocks of the plan, and the bytes of their index."""
    config = data_config(groups=(GroupConfig("a", 1.0, True), GroupConfig("b", 0.5)), seed=3, vae_dropout=0.3)
    tables = random_tables(5, config.groups)
    path = tmp_path_factory.mktemp("index") / "new" / "plan"
    planner = Planner(config, tables, journal=path)
    plan = [planner[i] for i in range(3 * PACKS)]
    return config, tables, plan, path.read_bytes()


def test_a_plan_goes_on_from_its_index(case, tmp_path, monkeypatch):
    config, tables, plan, data = case
    (tmp_path / "plan").write_bytes(data[:len(data) * 2 // 3 + 100])
    planned = []
    original = Planner._plan_block
    monkeypatch.setattr(Planner, "_plan_block", lambda self: (planned.append(1), original(self)))
    planner = Planner(config, tables, journal=tmp_path / "plan")
    assert [planner[i] for i in range(2 * PACKS)] == plan[:2 * PACKS] and not planned
    assert [planner[i] for i in range(3 * PACKS)] == plan and len(planned) == 1
    assert (tmp_path / "plan").read_bytes() == data


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), flip=st.integers(0, 255))
def test_an_index_that_is_torn_or_damaged_is_planned_again(case, tmp_path, caplog, share, flip):
    config, tables, plan, data = case
    where = min(int(share * len(data)), len(data) - 1)
    damaged = data[:where] + (bytes([data[where] ^ flip]) + data[where + 1:] if flip else b"")
    (tmp_path / "plan").write_bytes(damaged)
    caplog.clear()
    reader = Planner(config, tables, journal=tmp_path / "plan", keep_journal=False)
    assert reader[3 * PACKS - 1] == plan[-1]
    assert (tmp_path / "plan").read_bytes() == damaged
    assert not flip or "of the pack index is damaged" in caplog.text
    planner = Planner(config, tables, journal=tmp_path / "plan")
    assert [planner[i] for i in range(3 * PACKS)] == plan
    assert (tmp_path / "plan").read_bytes() == data


def test_two_writers_of_one_index(case, tmp_path):
    config, tables, plan, data = case
    planners = [Planner(config, tables, journal=tmp_path / "plan") for _ in range(2)]
    for last in (PACKS - 1, 2 * PACKS, 3 * PACKS - 1):
        for planner in planners:
            assert planner[last] == plan[last]
    assert (tmp_path / "plan").read_bytes() == data


def test_an_index_that_cannot_be_written_or_read_is_told_in_a_sentence(case, tmp_path):
    config, tables, *_ = case
    (tmp_path / "file").write_text("no folder")
    planner = Planner(config, tables, journal=tmp_path / "file" / "plan")
    with pytest.raises(ValueError, match="file/plan: the pack index cannot be written .*data.index_dir"):
        planner[0]
    with pytest.raises(ValueError, match="the pack index cannot be read .*data.index_dir"):
        Planner(config, tables, journal=tmp_path)


WRITER = """
import sys
sys.path.insert(0, "tests")
from test_plan_index import GroupConfig, Planner, data_config, random_tables
config = data_config(groups=(GroupConfig("a", 1.0, True), GroupConfig("b", 0.5)), seed=3, vae_dropout=0.3)
import pathlib
Planner(config, random_tables(5, config.groups), journal=pathlib.Path(sys.argv[1]))[10**7]
"""


def test_a_killed_writer_leaves_an_index_to_go_on_from(case, tmp_path):
    config, tables, plan, data = case
    path = tmp_path / "plan"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 50
        while not path.exists() or path.stat().st_size < len(data):
            assert time.monotonic() < deadline and writer.poll() is None
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    planner = Planner(config, tables, journal=path)
    assert [planner[i] for i in range(3 * PACKS)] == plan
    again = Planner(config, tables, journal=path)
    end = 4 * PACKS
    assert planner[end] == again[end] == Planner(config, tables)[end]
