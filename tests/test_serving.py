"""The server, asked by a real HTTP client: many at once, impatient ones, and when it is to end."""

import asyncio
import base64
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from irg_jax.checkpoints.model import save_model
from irg_jax.sampling.modes import ModeConfig, infer
from irg_jax.sampling.trajectory import Generator
from irg_jax.serving.config import ServeConfig
from irg_jax.serving.engine import PATIENCE, Task, batch_sizes, choose
from irg_jax.serving.requests import Reader
from sampling_cases import SETTINGS, make_model
from serving_cases import (
    CHAT,
    DRAW,
    EDIT,
    LIMITS,
    PICTURE,
    WORDS,
    ask,
    decoded,
    draw,
    edit,
    free_port,
    make_generator,
    read_events,
    served,
)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make_generator()


@pytest.fixture(scope="module")
def address(generator):
    with served(generator, LIMITS) as address:
        yield address


@pytest.fixture
def client(address):
    with httpx2.Client(base_url=address, timeout=300) as client:
        yield client


def alone(generator: Generator, path: str, fields: dict):
    """What a request is to be answered with: texts and last image."""
    irg = ModeConfig(think=True, num_turns=2, do_sample=False)
    said, mode = {DRAW: ([fields.get("prompt")], irg), EDIT: ([PICTURE, fields.get("prompt")], ModeConfig()),
                  CHAT: ([PICTURE, WORDS[fields["seed"] % 4]],
                         ModeConfig(understanding_output=True, do_sample=False))}[path]
    (answers,) = infer(generator, [said], mode, seeds=[fields["seed"]])
    return [answer.text for answer in answers], answers[-1].image


def same(image: np.ndarray, other: np.ndarray) -> bool:
    return image.shape == other.shape and np.abs(image.astype(int) - other).max() <= 1


def test_under_load_every_request_gets_its_own_answer(generator, address):
    """Forty of three kinds within a second, half of the drawings as streams."""
    chance = random.Random(0)
    requests = [draw(seed, stream=seed % 2 == 0) for seed in range(20)]
    requests += [make(seed) for make in (edit, ask) for seed in range(10)]
    chance.shuffle(requests)

    async def send(client: httpx2.AsyncClient, path: str, fields: dict):
        await asyncio.sleep(chance.random())
        return await client.post(path, json=fields)

    async def send_all():
        limits = httpx2.Limits(max_connections=len(requests))
        async with httpx2.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
            return await asyncio.gather(*(send(client, *request) for request in requests))
    expected = {}
    for (path, fields), answer in zip(requests, asyncio.run(send_all()), strict=True):
        assert answer.status_code == 200, answer.text
        key = path, fields["seed"]
        texts, image = expected.setdefault(key, alone(generator, path, fields))
        if path == CHAT:
            assert answer.json()["choices"][0]["message"]["content"] == texts[0]
        elif fields.get("stream"):
            events = read_events(answer.text)
            assert [event["text"] for name, event in events if name.endswith("text")] == texts
            assert same(decoded(events[-1][1]["b64_json"]), image)
        else:
            (drawn,) = answer.json()["data"]
            assert drawn["revised_prompt"] == texts[-1] and drawn["seed"] == fields["seed"]
            assert same(decoded(drawn["b64_json"]), image)
    figures = figures_of(address)
    assert figures["irg_waiting_trajectories"] == figures["irg_active_trajectories"] == 0
    assert figures["irg_step_trajectories_sum", "draw"] > figures["irg_step_trajectories_count", "draw"]
    assert figures["irg_requests_total", DRAW, "200"] == 20


def figures_of(address: str) -> dict:
    text = httpx2.get(f"{address}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()) if sample.labels else sample.name: sample.value
            for sample in samples}


def test_turns_are_streamed_as_they_appear(client, address):
    path, fields = draw(3, stream=True)
    before = figures_of(address).get(("irg_request_seconds_sum", DRAW), 0.0)
    with client.stream("POST", path, json=fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = [(part, time.perf_counter()) for part in response.iter_text()]
    took = figures_of(address)["irg_request_seconds_sum", DRAW] - before
    assert took > 0.5 * (parts[-1][1] - parts[0][1]) > 0    # a stream's time is that to its end
    events = read_events("".join(part for part, _ in parts))
    kinds = [name.removeprefix("image_generation.") for name, _ in events]
    assert kinds == ["text", "partial_image", "text", "completed"]
    assert [event["turn"] for _, event in events] == [1, 1, 2, 2]
    assert [event["type"] for _, event in events] == [name for name, _ in events]
    assert decoded(events[1][1]["b64_json"]).shape == (32, 48, 3) and events[3][1]["size"] == "48x32"
    whole = client.post(path, json=fields | {"stream": False, "turns": True}).json()["data"][0]
    assert [turn["b64_json"] for turn in whole["turns"]] == [events[i][1]["b64_json"] for i in (1, 3)]
    assert [turn["text"] for turn in whole["turns"]] == [events[i][1]["text"] for i in (0, 2)]
    none = client.post(path, json=fields | {"partial_images": 0}).text
    assert "partial_image" not in none and "completed" in none


def test_settings_texts_sizes_and_several_images(client):
    path, fields = draw(1, n=2, size="32x16", num_turns=1, texts=["a b c"], num_timesteps=3, turns=True)
    first, second = client.post(path, json=fields).json()["data"]
    assert decoded(first["b64_json"]).shape == (16, 32, 3) and first["turns"][0]["text"] == "a b c"
    assert (first["seed"], second["seed"]) == (1, 2) and first["b64_json"] != second["b64_json"]
    plain = client.post(DRAW, json={"prompt": "blue", "think": False}).json()["data"][0]
    assert plain["revised_prompt"] == "" and 0 <= plain["seed"] < 2**32


def test_a_form_is_the_same_edit(client):
    path, fields = edit(5)
    image = base64.b64decode(fields["image"][0])
    form = client.post(path, data={"prompt": fields["prompt"], "seed": "5"}, files={"image": image})
    assert form.status_code == 200, form.text
    assert form.json()["data"] == client.post(path, json=fields).json()["data"]


def test_a_chat_may_be_streamed_and_is_cut_where_it_is_told(client):
    path, fields = ask(0)
    fields |= {"max_tokens": 3}
    whole = client.post(path, json=fields).json()["choices"][0]
    lines = client.post(path, json=fields | {"stream": True}).text.strip().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    assert lines[-1] == "data: [DONE]" and chunks[0]["delta"]["content"] == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "length"


class Held(Generator):
    """Draws when it is let; `fails` makes it not draw at all."""

    def __init__(self):
        super().__init__(make_model(), SETTINGS)
        self.go, self.drawing, self.fails = threading.Event(), threading.Event(), False

    def draw(self, state, **settings):
        self.drawing.set()
        assert self.go.wait(60)
        if self.fails:
            raise RuntimeError("no memory")
        return super().draw(state, **settings)


@pytest.fixture
def held():
    return Held()


PLAIN = {"prompt": "blue", "think": False, "seed": 0}


def in_threads(count: int, send) -> list[threading.Thread]:
    threads = [threading.Thread(target=send) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_queue_is_told_and_those_in_it_are_answered(held):
    limits = ServeConfig(max_batch=1, max_active=1, max_queue=2)
    with served(held, limits) as address:
        statuses = []
        send = lambda: statuses.append(httpx2.post(address + DRAW, json=PLAIN, timeout=100).status_code)
        threads = in_threads(1, send)
        assert held.drawing.wait(60)
        threads += in_threads(2, send)
        wait_until(lambda: figures_of(address)["irg_waiting_trajectories"] == 2)
        refused = httpx2.post(address + DRAW, json=PLAIN)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        held.go.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200, 200]


def test_who_goes_away_or_takes_too_long_makes_room(held):
    with served(held, ServeConfig(max_batch=1, max_active=1, max_queue=1, timeout_seconds=2.0)) as address:
        for stream in (False, True):
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(address + DRAW, json=PLAIN | {"stream": stream}, timeout=1)
            # While the step of the first is still going on.
            wait_until(lambda: figures_of(address)["irg_waiting_trajectories"] == 0, 20)
        slow = httpx2.post(address + DRAW, json=PLAIN, timeout=60)
        assert slow.status_code == 504 and "timeout_seconds" in slow.text
        streamed = httpx2.post(address + DRAW, json=PLAIN | {"stream": True}, timeout=60)
        assert read_events(streamed.text)[-1][0] == "error"
        held.go.set()
        wait_until(lambda: figures_of(address)["irg_active_trajectories"] == 0)
        figures = figures_of(address)
        assert figures["irg_waiting_trajectories"] == 0 and figures["irg_step_trajectories_sum", "draw"] == 1


def test_a_step_that_fails_is_told_to_those_it_met_alone(held, caplog):
    with served(held, LIMITS) as address:
        held.fails = True
        held.go.set()
        failed = httpx2.post(address + DRAW, json=PLAIN, timeout=100)
        assert failed.status_code == 500 and "no memory" not in failed.text and "no memory" in caplog.text
        held.fails = False
        assert httpx2.post(address + DRAW, json=PLAIN, timeout=100).status_code == 200


def test_settings_that_compile_anew_are_limited(generator):
    with served(generator, ServeConfig(max_settings=1)) as address:
        asked = {"cfg_text_scale": 2.0}, {"cfg_text_scale": 3.0}, {"cfg_text_scale": 2.0}, {}
        texts = [httpx2.post(address + DRAW, json=PLAIN | more, timeout=100).text for more in asked]
        assert ["b64_json" in text for text in texts] == [True, False, True, True]
        assert "max_settings" in texts[1]


def test_what_is_configured_or_not_compiled_takes_no_place(generator):
    reader = Reader(generator, dataclasses.replace(LIMITS, max_settings=2))
    draw = lambda **fields: reader.read_image_request({"prompt": "a", **fields}, 0, is_edit=False)
    chat = lambda **fields: reader.read_chat_request({"messages": [{"content": "a"}], **fields}, 0)
    for number in range(1, 6):   # of a text nothing is compiled anew
        draw(text_temperature=number / 10, max_think_token_n=2 * number)
        chat(temperature=number / 10, max_tokens=number)
    draw(cfg_text_scale=2.0)    # of two turns
    for refused in (lambda: draw(cfg_text_scale=5.0), lambda: draw(size="32x16")):
        with pytest.raises(ValueError, match="max_settings"):
            refused()
    for plain in (draw(), draw(think=False), draw(size="48x32"), chat(), chat(temperature=0)):
        assert plain.n == 1


def test_tokens_of_a_chat_are_counted_without_the_opening_bracket(generator):
    chat = lambda length: Reader(generator, LIMITS).read_chat_request(
        {"messages": [{"content": "a"}], "max_tokens": length}, 0)
    assert chat(3).mode.max_think_token_n == 4
    assert chat(9).mode.max_think_token_n == generator.config.text.max_length == 10
    for length in (0, 10):
        with pytest.raises(ValueError, match=f"a text of {length} tokens .* at most 9"):
            chat(length)


def test_the_command_finishes_what_it_has_when_it_is_ended(tmp_path):
    save_model(tmp_path / "model", make_model())
    (tmp_path / "config.py").write_text(
        "import dataclasses, ml_collections\n"
        "from sampling_cases import SETTINGS\n"
        "get_config = lambda: ml_collections.ConfigDict(dataclasses.asdict(SETTINGS))\n")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "irg_jax.serve", f"--config={tmp_path / 'config.py'}", f"--port={port}",
         f"--checkpoint={tmp_path / 'model'}", "--config.serve.warm_up=False", "--config.serve.max_batch=1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": ".:tests"})
    for line in process.stdout:
        if "running on" in line:
            break
    assert process.poll() is None
    path, fields = draw(0, stream=True)
    with httpx2.stream("POST", f"http://127.0.0.1:{port}{path}", json=fields, timeout=200) as response:
        parts = response.iter_text()
        text = next(parts)    # the first thought
        process.send_signal(signal.SIGTERM)
        text += "".join(parts)
    assert read_events(text)[-1][0] == "image_generation.completed"
    process.communicate(timeout=60)
    assert process.returncode == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/health")


class FakeJob:
    """A job of a kind, on which nothing is done."""

    step = True

    def __init__(self, kind: str):
        self.kind = kind


def test_the_largest_group_goes_on_unless_others_have_waited():
    common, rare = [Task(FakeJob("common"), None) for _ in range(5)], Task(FakeJob("rare"), None)
    tasks = [rare, *common]
    for _ in range(PATIENCE):
        chosen = choose(tasks, 2)
        assert len(chosen) == 2 and rare not in chosen
    assert choose(tasks, 2) == [rare]
    gone = [task for _ in range(5) for task in choose(tasks, 2)]
    assert {id(task) for task in gone} == {id(task) for task in common}   # whoever waited longest goes first
    assert choose([rare, common[0]], 1) == [rare]


@pytest.mark.parametrize("most", range(1, 40))
def test_a_batch_is_filled_up_by_less_than_itself(most):
    sizes = batch_sizes(most)
    assert sizes[0] == 1 and sizes[-1] == most and sizes == sorted(sizes)
    assert all(next(size for size in sizes if size >= count) < 2 * count for count in range(1, most + 1))
