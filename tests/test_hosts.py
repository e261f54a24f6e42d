"""How processes find each other, and what they say of one that is missing, differs or fails."""

import concurrent.futures
import contextlib
import json
import pathlib
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irg_jax.config import TrainConfig
from irg_jax.parallel.hosts import Hosts, Place, expand_nodes, find_place, meet
from irg_jax.training import start
from test_loop import config


def free_port() -> int:
    """A port whose lower neighbour is free too."""
    while True:
        with socket.create_server(("localhost", 0)) as one:
            port = one.getsockname()[1]
            with contextlib.suppress(OSError), socket.create_server(("localhost", port - 1)):
                return port


def at_once(*calls):
    """Results of calls that run side by side; of one that raises ValueError, its sentence."""
    def guarded(call):
        try:
            return call()
        except ValueError as error:
            return str(error)
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(guarded, calls))


def places(count: int, **fields) -> list[Place]:
    address = f"localhost:{free_port()}"
    return [Place(address, count, index, **fields) for index in range(count)]


@contextlib.contextmanager
def together(count: int):
    hosts = at_once(*[lambda place=place: meet(place, 20) for place in places(count)])
    assert all(isinstance(host, Hosts) for host in hosts), hosts
    try:
        yield hosts
    finally:
        for host in hosts:
            host.close()


def test_all_meet_and_agree_as_often_as_they_like():
    with together(4) as hosts:
        assert [host.index for host in hosts] == [0, 1, 2, 3] and [host.count for host in hosts] == [4] * 4
        assert [host.is_first for host in hosts] == [True, False, False, False]
        for step in range(3):
            assert at_once(*[lambda host=host: host.agree({"step": str(step)}) for host in hosts]) == [None] * 4


def test_alone_there_is_nobody_to_wait_for():
    Hosts().agree({"code": "1"})
    with pytest.raises(ValueError, match="^no data$"), Hosts().together():
        raise ValueError("no data")


@pytest.mark.parametrize("odd", [0, 2])
def test_the_one_that_differs_is_named_everywhere(odd):
    with together(3) as hosts:
        facts = [{"code": "new" if host.index == odd else "old", "seed": "1"} for host in hosts]
        said = at_once(*[lambda host=host: host.agree(facts[host.index]) for host in hosts])
    assert said == [f"hosts disagree: host {odd} ({socket.gethostname()}) has code new, most have old"] * 3


def test_of_two_that_differ_the_first_is_right():
    with together(2) as hosts:
        said = at_once(lambda: hosts[0].agree({"a": "1"}), lambda: hosts[1].agree({"a": "2", "b": "3"}))
    assert "host 1" in said[0] and "has a 2, most have 1" in said[0] and "has b 3, most have nothing" in said[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_host_ends_all(failing):
    def prepare(host):
        with host.together() as facts:
            if host.index == failing:
                raise ValueError("/data does not exist")
            facts["data"] = "1"
    with together(3) as hosts:
        said = at_once(*[lambda host=host: prepare(host) for host in hosts])
    assert said == [f"host {failing} ({socket.gethostname()}): /data does not exist"] * 3


@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_that_ends_during_the_start_is_named(gone):
    with together(3) as hosts:
        hosts[gone].close()
        said = at_once(*[lambda host=host: host.agree({}) for host in hosts if host.index != gone])
    assert len(said) == 2 and all(f"host {gone} (" in sentence and "ended during the start" in sentence
                                  for sentence in said)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_host_that_never_comes_is_named_in_time(missing):
    coming = [place for place in places(3, names=("tpu-a", "tpu-b", "tpu-c")) if place.index != missing]
    begun = time.monotonic()
    said = at_once(*[lambda place=place: meet(place, 2) for place in coming])
    assert time.monotonic() - begun < 10
    for sentence in said:
        assert f"host {missing} (tpu-{'abc'[missing]}) did not" in sentence and "within 2 s" in sentence


def test_two_that_take_themselves_for_one_are_told():
    first, second, _ = places(3)
    said = at_once(*[lambda place=place: meet(place, 5) for place in (first, second, second)])
    assert all("two processes take themselves for number 1" in sentence for sentence in said)


def test_another_count_is_told():
    first, second = places(2)
    other = Place(second.address, 3, 1)
    said = at_once(lambda: meet(first, 5), lambda: meet(other, 5))
    assert all("takes itself for process 1 of 3" in sentence for sentence in said)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b'{"index": "1"}\n', b""])
def test_strangers_are_not_let_in(noise):
    first, second = places(2)
    def disturb():
        for _ in range(100):
            with (contextlib.suppress(OSError),
                  socket.create_connection(first.meeting_point, timeout=1) as stranger):
                stranger.sendall(noise)
                return True
            time.sleep(0.05)
    def late():
        time.sleep(0.5)
        return meet(second, 10)
    one, came, two = at_once(lambda: meet(first, 10), disturb, late)
    assert came and isinstance(one, Hosts) and isinstance(two, Hosts)
    one.close(), two.close()


def test_a_port_in_use_is_told():
    place = places(1)[0]
    with socket.create_server(place.meeting_point), pytest.raises(ValueError, match="is another run alive"):
        meet(place, 5)


def test_a_late_host_is_told_of_while_it_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr("irg_jax.parallel.hosts._SILENT", 0.2)
    with together(2) as hosts:
        thread = threading.Timer(0.7, lambda: hosts[1].agree({}))
        thread.start()
        hosts[0].agree({})
        thread.join()
    assert "host 0 (" in capsys.readouterr().err.partition("waiting for host 1")[0]


def test_notes_reach_the_first_host_and_all_end_together():
    def work(host):
        with host.watching():
            for number in range(50):
                host.note([host.index, number])
        return host.notes()
    with together(3) as hosts:
        found = at_once(*[lambda host=host: work(host) for host in hosts])
    assert sorted(found[0]) == [[index, number] for index in (1, 2) for number in range(50)]
    assert found[1] == found[2] == [] and Hosts().notes() == []


# ---- where a process stands ------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "65", "SLURM_STEP_NODELIST": "gpu[08-09],login", "SLURM_NTASKS": "3",
         "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}


@pytest.fixture
def environment(monkeypatch):
    for name in (*SLURM, "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_a_process_that_nobody_placed_is_alone(environment):
    assert find_place() is None
    environment(**SLURM | {"SLURM_NTASKS": "1"})   # within an allocation, but started by hand
    assert find_place() is None


def test_explicit_values_count(environment):
    environment(**SLURM)
    assert find_place("a:1234", 4, 3) == Place("a:1234", 4, 3)
    assert Place("[::1]:1234", 1, 0).meeting_point == ("::1", 1233)


@pytest.mark.parametrize("values, sentence", [
    (("a:1234", 4, None), "together"), (("", None, 0), "together"), (("a", 4, 0), "HOST:PORT"),
    (("a:1", 4, 0), "the port below it"), (("a:65536", 4, 0), "HOST:PORT"), (("a:1234", 4, 4), "0 to 3")])
def test_a_place_that_cannot_be_is_refused(environment, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_place(*values)


@pytest.mark.parametrize("tasks, devices", [("1(x3)", None), ("2(x2)", (0,))])
def test_slurm_tells_a_place(environment, tasks, devices):
    environment(**SLURM, SLURM_STEP_TASKS_PER_NODE=tasks)
    place = find_place()
    assert place == Place("gpu08:61505", 3, 2, devices, ("gpu08", "gpu09", "login"))


def test_where_nothing_is_found_it_is_said(environment, monkeypatch):
    monkeypatch.setattr("jax._src.clusters.ClusterEnv._cluster_types", [])
    with pytest.raises(ValueError, match="neither Cloud TPU, nor SLURM"):
        find_place(detect=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 4)), max_size=3)), min_size=1, max_size=3), st.integers(2, 4))
def test_lists_of_nodes_are_expanded(groups, width):
    texts, expected = [], []
    for prefix, ranges in groups:
        number = lambda value: f"{value:0{width}}"
        parts = [number(low) + (f"-{number(low + more)}" if more else "") for low, more in ranges]
        texts.append(prefix + (f"[{','.join(parts)}]" if parts else ""))
        expected += [prefix + number(value) for low, more in ranges for value in range(low, low + more + 1)]
        expected += [] if parts else [prefix]
    assert expand_nodes(",".join(texts)) == expected


# ---- what hosts compare ----------------------------------------------------------------------------

def test_code_and_every_field_are_compared(monkeypatch, tmp_path):
    facts = start.describe_code()
    assert facts["package jax"][0].isdigit() and facts["package libtpu"] and len(facts["code"]) == 16
    for folder in ("irg_jax", "data_pipelines"):
        (tmp_path / folder).mkdir()
    (tmp_path / "irg_jax" / "a.py").write_text("1")
    monkeypatch.setattr(start, "ROOT", tmp_path)
    one = start.describe_code()["code"]
    (tmp_path / "irg_jax" / "a.py").write_text("2")
    assert start.describe_code()["code"] != one
    fields = start.describe_config([config(pathlib.Path("x"))])
    assert fields["config.data.packs_per_step"] == "4" and "config.optimizer.learning_rate" in fields
    assert len(fields) > 60 and json.dumps(fields)
    assert {name.split(".")[1] for name in fields} == set(TrainConfig.__dataclass_fields__)
