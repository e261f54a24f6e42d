"""Endpoints: nothing lost, nothing paid for twice, whatever the server does."""

import json
import random
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import answers, endpoints
from data_pipelines.endpoints import (
    BudgetSpent,
    Declined,
    Endpoint,
    EndpointConfig,
    EndpointError,
    in_parallel,
    said,
)
from data_pipelines.images import read_image
from endpoint_cases import FAULTS, Misbehaving, images_of, texts_of


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)


def connect(server, folder, **fields):
    return Endpoint(EndpointConfig(server.url, "judge", **{"timeout": 5.0, **fields}), folder)


def echo(body):
    return f"heard {texts_of(body)}"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_tried_again(fault, tmp_path):
    with Misbehaving(echo, lambda key, number: fault if number < 2 else "").running() as server:
        endpoint = connect(server, tmp_path, timeout=0.5)
        assert endpoint.ask([said("a")], parse=str).value == "heard a"
        assert (endpoint.usage.sent, endpoint.usage.repeated) == (1, 2)
        assert set(server.tries.values()) == {3}


@pytest.mark.parametrize("status", ["400", "401", "404", "422", "302"])
def test_a_refusal_ends_it_at_once(status, tmp_path):
    with Misbehaving(echo, lambda key, number: status).running() as server:
        with pytest.raises(EndpointError, match=f"chat/completions refuses, status {status}.*told {status}"):
            connect(server, tmp_path).ask([said("a")], parse=str)
        assert sum(server.tries.values()) == 1


def test_what_is_declined_for_its_content_concerns_one_request_alone(tmp_path):
    pick = lambda key, number: "declined" if "forbidden" in texts_of(server.bodies[key]) else ""
    server = Misbehaving(echo, pick)
    with server.running():
        endpoint = connect(server, tmp_path)
        with pytest.raises(Declined, match="status 400.*told no"):
            endpoint.ask([said("forbidden")], parse=str)
        assert endpoint.ask([said("a")], parse=str).value == "heard a" and sum(server.tries.values()) == 2


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"error": "no"}', b'{"error": {"code": ["content_filter"]}}',
                                 b'{"error": {"code": "invalid_size"}}', b"[" * 100_000])
def test_other_errors_decline_nothing(raw):
    assert not answers.is_declined(raw)


def test_a_server_that_never_answers_is_given_up(tmp_path):
    with Misbehaving(echo, lambda key, number: "500").running() as server:
        with pytest.raises(EndpointError, match="no usable answer in 3 attempts; the last: status 500"):
            connect(server, tmp_path, attempts=3).ask([said("a")], parse=str)
        assert sum(server.tries.values()) == 3
    with pytest.raises(EndpointError, match="ConnectError"):
        connect(server, tmp_path, attempts=2).ask([said("a")], parse=str)


@pytest.mark.parametrize("told, least", [("0", 0.01), ("7", 7.0), ("999", endpoints.LONGEST_PAUSE)])
def test_a_pause_is_as_long_as_was_asked_for_and_never_shorter_than_ours(tmp_path, monkeypatch, told, least):
    pauses = []
    with Misbehaving(echo).running() as server:
        endpoint = connect(server, tmp_path, attempts=3)
        monkeypatch.setattr(endpoint, "_post", lambda path, body: (429, {"retry-after": told}, b""))
        monkeypatch.setattr(endpoint._is_ended, "wait", pauses.append)
        with pytest.raises(EndpointError, match="in 3 attempts"):
            endpoint.ask([said("a")], parse=str)
    assert len(pauses) == 2 and pauses[1] >= max(least, 0.02)
    assert all(least <= pause <= 1.25 * max(least, 0.02) for pause in pauses)


def test_nothing_is_lost_or_paid_for_twice_among_faults(tmp_path):
    """A hundred questions of sixteen threads, faults at random, in two runs, the first of which breaks off."""
    chance = random.Random(0)
    faults = [fault for fault in FAULTS if fault not in ("slow", "drip")]    # these take long
    pick = lambda key, number: chance.choice(faults) if chance.random() < 0.5 and number < 6 else ""
    with Misbehaving(echo, pick).running() as server:
        first = connect(server, tmp_path, concurrency=16, price_in=1e4, price_out=1e5, budget=60.0)
        ask = lambda endpoint: lambda number: endpoint.ask([said(f"question {number}")], parse=str).value
        with pytest.raises(BudgetSpent, match="budget 60 is spent"):
            list(in_parallel(ask(first), range(100), [first]))
        assert 30 <= first.usage.sent <= 30 + 16    # each costs 2; those under way come home
        second = connect(server, tmp_path, concurrency=16, price_in=1e4, price_out=1e5)
        assert second.usage.cost == pytest.approx(2 * first.usage.sent)
        replies = list(in_parallel(ask(second), range(100), [second]))
        assert replies == [f"heard question {number}" for number in range(100)]
        assert first.usage.sent + second.usage.sent == 100 and second.usage.kept == first.usage.sent
        assert set(server.answered.values()) == {1} and len(server.answered) == 100
        assert second.usage.cost == pytest.approx(200) and second.usage.tokens_in == 10_000
        assert server.peak <= 17   # one may still be at its end when the next comes


def test_equal_questions_at_once_are_one_request(tmp_path):
    with Misbehaving(echo).running() as server:
        endpoint = connect(server, tmp_path)
        ask = lambda _: endpoint.ask([said("same")], parse=str).value
        replies = list(in_parallel(ask, range(20), [endpoint]))
        assert replies == ["heard same"] * 20 and sum(server.tries.values()) == 1
        assert (endpoint.usage.sent, endpoint.usage.kept, endpoint.usage.tokens_in) == (1, 19, 100)


def test_an_answer_that_does_not_parse_is_asked_again_then_counted(tmp_path):
    with Misbehaving(lambda body: str(body.get("seed", "none"))).running() as server:
        endpoint = connect(server, tmp_path, options={"temperature": 0})
        assert endpoint.ask([said("a")], parse=int).value == 1
        def never(text):
            raise ValueError
        assert endpoint.ask([said("a")], parse=never) == (None, ("none", "1", "2"))
        assert (endpoint.usage.sent, endpoint.usage.unparsed) == (3, 4)
        assert all(body["temperature"] == 0 for body in server.bodies.values())
        again = connect(server, tmp_path, options={"temperature": 0})
        assert again.ask([said("a")], parse=never).value is None
        assert (again.usage.sent, again.usage.kept) == (0, 3)


def test_no_content_is_no_answer_rather_than_an_error(tmp_path):
    with Misbehaving(lambda body: None).running() as server:
        silent = {"choices": [{"message": {"content": None}}]}
        server.respond = lambda path, body: ("", json.dumps(silent).encode())
        assert connect(server, tmp_path).ask([said("a")], parse=int).value is None


def test_images_go_and_come(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    def answer(body):
        if "prompt" in body:
            return picture
        return str([image.tolist() for image in images_of(body)] == [picture.tolist()] * 2)
    with Misbehaving(answer).running() as server:
        endpoint = connect(server, tmp_path, price_image=3.0)
        images = [picture, endpoints.encode(picture)]    # as pixels or as PNG
        assert endpoint.ask([said("equal?", images=images)], parse=str).value == "True"
        for _ in range(2):
            np.testing.assert_array_equal(read_image(endpoint.draw("a cat").file), picture)
        assert endpoint.usage.sent == 2 and endpoint.usage.cost == 3.0
        next(tmp_path.glob("*.png")).unlink()    # an answer without its image is none
        np.testing.assert_array_equal(read_image(connect(server, tmp_path).draw("a cat").file), picture)


@pytest.mark.parametrize("entry", [{"b64_json": "bm8="}, {"b64_json": 3}, {}])
def test_what_is_no_image_is_not_taken(entry, tmp_path):
    with Misbehaving(lambda body: "").running() as server:
        server.respond = lambda path, body: ("", json.dumps({"data": [entry]}).encode())
        with pytest.raises(EndpointError, match="not an image as b64_json"):
            connect(server, tmp_path, attempts=2).draw("a cat")


def test_an_address_ends_it_at_once_with_what_to_set(tmp_path):
    with Misbehaving(lambda body: "").running() as server:
        server.respond = lambda path, body: calls.append(body) or (
            "", json.dumps({"data": [{"url": "http://127.0.0.1:1/x.png"}]}).encode())
        calls = []
        endpoint = connect(server, tmp_path, price_image=3.0)
        with pytest.raises(EndpointError, match="address.*set options response_format=b64_json"):
            endpoint.draw("a cat")
        assert len(calls) == 1 and endpoint.usage.cost == 3.0


def test_what_was_paid_for_and_cannot_be_used_counts_in_this_run_and_the_next(tmp_path):
    """Each answer costs 2, the budget is 5: after three of no use nothing more is sent."""
    useless = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    with Misbehaving(echo).running() as server:
        calls, respond = [], server.respond
        server.respond = lambda path, body: calls.append(body) or ("", json.dumps(useless).encode())
        prices = {"price_in": 1e4, "price_out": 1e5}
        with pytest.raises(BudgetSpent, match="budget 5 is spent: 6 on judge"):
            connect(server, tmp_path, budget=5.0, **prices).ask([said("a")], parse=str)
        assert len(calls) == 3
        with pytest.raises(BudgetSpent):
            connect(server, tmp_path, budget=5.0, **prices).ask([said("a")], parse=str)
        assert len(calls) == 3
        server.respond = respond
        endpoint = connect(server, tmp_path, budget=7.0, **prices)
        assert endpoint.ask([said("a")], parse=str).value == "heard a" and endpoint.usage.cost == 8.0


def test_a_budget_needs_to_be_told_what_was_used(tmp_path):
    silent = {"choices": [{"message": {"content": "yes"}}]}
    with Misbehaving(echo).running() as server:
        server.respond = lambda path, body: ("", json.dumps(silent).encode())
        with pytest.raises(EndpointError, match="budget is 5, but judge tells no usage"):
            connect(server, tmp_path, price_in=1.0, budget=5.0).ask([said("a")], parse=str)
        assert connect(server, tmp_path).ask([said("a")], parse=str).value == "yes"    # it was kept


def test_an_answer_that_was_cut_off_is_none(tmp_path):
    cut = {"choices": [{"message": {"content": "10"}, "finish_reason": "length"}]}
    with Misbehaving(echo).running() as server:
        server.respond = lambda path, body: ("", json.dumps(cut).encode())
        endpoint = connect(server, tmp_path)
        assert endpoint.ask([said("a")], parse=int) == (None, ("10", "10", "10"))
        assert endpoint.usage.unparsed == 3


def test_an_answer_has_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "MAX_ANSWER", 1000)
    with Misbehaving(lambda body: "x" * 1000).running() as server:
        with pytest.raises(EndpointError, match="more than 1000 bytes"):
            connect(server, tmp_path, attempts=1).ask([said("a")], parse=str)


def test_the_key_comes_from_the_environment_and_is_never_told(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with Misbehaving(echo, lambda key, number: "401").running() as server:
        with pytest.raises(EndpointError) as refused:
            connect(server, tmp_path, key="JUDGE_KEY").ask([said("a")], parse=str)
        assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(refused.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="JUDGE_KEY holds no key"):
        connect(server, tmp_path, key="JUDGE_KEY")


def test_no_more_is_begun_than_can_be_kept(tmp_path, monkeypatch):
    """Whoever takes results one by one is never far behind, and they come in order."""
    monkeypatch.setattr(endpoints, "AHEAD", 2)
    begun = []
    with Misbehaving(echo).running() as server:
        endpoint = connect(server, tmp_path, concurrency=3)
        results = in_parallel(lambda number: begun.append(number) or number, iter(range(50)), [endpoint])
        for expected, number in enumerate(results):
            assert number == expected and len(begun) <= expected + 6
        assert sorted(begun) == list(range(50))


def test_an_error_ends_the_pauses_of_others(tmp_path, monkeypatch):
    """One question is refused while another waits for a minute: nobody sits that minute out."""
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 60.0)
    is_waiting = threading.Event()
    def faults(key, number):
        if "wait" in texts_of(server.bodies[key]):
            is_waiting.set()
            return "500"
        assert is_waiting.wait(10)
        return "400"
    server = Misbehaving(echo, faults)
    with server.running():
        endpoint = connect(server, tmp_path, concurrency=2)
        with pytest.raises(EndpointError):
            ask = lambda text: endpoint.ask([said(text)], parse=str)
            list(in_parallel(ask, ["wait", "refused"], [endpoint]))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(
                        st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens", "data",
                                         "model", "b64_json"]), inner)))
def test_any_json_is_an_answer_or_unusable(answer):
    for path, read in ((answers.CHAT, answers.read_chat), (answers.IMAGES, answers.read_image)):
        paid = answers.read_costs(answer, path)
        assert paid["tokens_in"] >= 0 and json.dumps(paid)
        try:
            assert json.dumps(read(answer)[0])
        except answers.Unusable:
            continue


def test_what_others_left_in_the_folder_is_asked_anew(tmp_path):
    with Misbehaving(echo).running() as server:
        assert connect(server, tmp_path).ask([said("a")], parse=str).value == "heard a"
        file = next(tmp_path.glob("*.json"))
        for text in ("", "[]", "{}", '{"content": 3}', file.read_text()[:40], "[" * 100_000):
            file.write_text(text)
            assert connect(server, tmp_path).ask([said("a")], parse=str).value == "heard a"
        assert set(server.tries.values()) == {7}


@pytest.mark.parametrize("fields, told", [
    ({"url": "localhost:8000"}, "url is 'localhost:8000'"), ({"model": ""}, "model is empty"),
    ({"asks": 0}, "asks is 0"), ({"price_in": -1.0}, "price_in is -1.0"),
    ({"budget": 3.0}, "no price is known"),
])
def test_settings_are_checked(fields, told):
    with pytest.raises(ValueError, match=told):
        EndpointConfig(**{"url": "http://127.0.0.1/v1", "model": "judge", **fields})
