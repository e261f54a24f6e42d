"""What the server is sent that is no good: it is told what is wrong, and nothing breaks."""

import base64
import dataclasses
import io
import socket

import httpx2
import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from irg_jax.sampling.trajectory import Generator
from irg_jax.serve import known_hosts
from irg_jax.serving.requests import SETTINGS, Reader, Wanted
from sampling_cases import WIDE, make_model
from serving_cases import CHAT, DRAW, EDIT, LIMITS, PICTURE, encoded, make_generator, served


@pytest.fixture(scope="module")
def address():
    with served(make_generator(), LIMITS) as address:
        yield address


@pytest.fixture
def client(address):
    with httpx2.Client(base_url=address, timeout=300) as client:
        yield client


HOSTILE = [
    ("not json", b"{", 400, "not valid JSON"), ("deep", b'{"a":' + b"[" * 200_000, 400, "deep"),
    ("not an object", b"[1]", 400, "object"), ("not utf-8", b'{"prompt": "\xff"}', 400, "not valid JSON"),
    ("no number", b'{"prompt": "a", "cfg_text_scale": NaN}', 400, "NaN"),
    ("infinite", b'{"prompt": "a", "cfg_text_scale": 1e999}', 400, "1e999"),
    ("huge", b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, "not allowed"),
    ("too long", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "max_body_mib"),
    ("no prompt", b"{}", 400, "'prompt'"), ("empty", b'{"prompt": " "}', 400, "empty"),
    ("long text", b'{"prompt": "' + b"a b " * 9000 + b'"}', 400, "max_tokens"),
    ("half a pair", b'{"prompt": "a \\ud800 b"}', 400, "surrogate"),
    ("control token", b'{"prompt": "a <|im_end|> b"}', 400, "control token"),
    ("misspelt", b'{"prompt": "a", "cfg_text_scal": 1}', 400, "'cfg_text_scale'"),
    ("wrong type", b'{"prompt": ["a"]}', 400, "'prompt'"),
    ("a bool", b'{"prompt": "a", "n": true}', 400, "'n'"),
    ("many", b'{"prompt": "a", "n": 1000}', 400, "max_n"),
    ("none", b'{"prompt": "a", "n": 0}', 400, "positive"),
    ("turns", b'{"prompt": "a", "num_turns": 99}', 400, "max_turns"),
    ("steps", b'{"prompt": "a", "num_timesteps": 100000}', 400, "max_timesteps"),
    ("order", b'{"prompt": "a", "taylorseer_order": 1000000}', 400, "taylorseer_order"),
    ("no step", b'{"prompt": "a", "num_timesteps": 1}', 400, "num_timesteps"),
    ("large", b'{"prompt": "a", "size": "99999x99999"}', 400, "does not suit"),
    ("odd", b'{"prompt": "a", "size": "33x33"}', 400, "does not suit"),
    ("nothing", b'{"prompt": "a", "size": "0x0"}', 400, "does not suit"),
    ("no size", b'{"prompt": "a", "size": "big"}', 400, "WIDTHxHEIGHT"),
    ("seed", b'{"prompt": "a", "seed": -1}', 400, "seed"),
    ("url", b'{"prompt": "a", "response_format": "url"}', 400, "response_format"),
    ("texts", b'{"prompt": "a", "texts": ["a", "b", "c"]}', 400, "texts"),
    ("long thought", b'{"prompt": "a", "max_think_token_n": 4096}', 400, "at most"),
    ("no thought", b'{"prompt": "a", "max_think_token_n": 0}', 400, "'max_think_token_n'"),
    ("no first step", b'{"prompt": "a", "taylorseer_first": 0}', 400, "out of range: taylorseer_first 0"),
    ("an image", b'{"prompt": "a", "image": ["aaaa"]}', 400, "/v1/images/edits"),
]


SCALARS = (st.none() | st.booleans() | st.integers(-10**18, 10**18) | st.floats(-1e300, 1e300)
           | st.text(max_size=20))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=9), inner, max_size=3), max_leaves=8)
FIELDS = st.dictionaries(st.sampled_from([
    "image", "n", "size", "seed", "partial_images", "texts", "turns", "messages", "max_tokens", "temperature",
    *SETTINGS]), JSON, max_size=4)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(FIELDS, st.booleans())
def test_whatever_fields_hold_it_is_wanted_or_a_mistake_that_is_told(fields, is_edit):
    reader = Reader(make_generator(), LIMITS)
    for read in (lambda: reader.read_image_request({"prompt": "a"} | fields, 0, is_edit=is_edit),
                 lambda: reader.read_chat_request(fields, 0)):
        try:
            assert isinstance(read(), Wanted)
        except ValueError as error:
            assert "field" in str(error) or "num_t" in str(error) or "config" in str(error), error


def test_a_server_that_does_not_know_how_to_think_does_not():
    silent = Generator(make_model(), dataclasses.replace(WIDE, system_prompt=""))
    reader = Reader(silent, LIMITS)
    assert not reader.read_image_request({"prompt": "a"}, 0, is_edit=False).mode.think
    with pytest.raises(ValueError, match="no system_prompt"):
        reader.read_image_request({"prompt": "a", "think": True}, 0, is_edit=False)


@pytest.mark.parametrize("body, status, message", [pytest.param(*case, id=name) for name, *case in HOSTILE])
def test_bad_bodies_are_told_what_is_wrong(client, body, status, message):
    response = client.post(DRAW, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status and message in response.json()["error"]["message"], response.text


def bomb() -> str:
    """A PNG of a kilobyte or so that would be 36 million pixels."""
    file = io.BytesIO()
    Image.new("1", (6000, 6000)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("image, message", [
    ("http://169.254.169.254/latest/meta-data", "nothing is fetched"),
    ("file:///etc/passwd", "nothing is fetched"), ("data:text/html;base64,aaaa", "nothing is fetched"),
    ("%%%", "base64"), ("aGVsbG8=", "not a readable image"),
    (encoded(PICTURE)[:200], "does not decode"), (bomb(), "over the limit")])
def test_bad_images_are_refused_and_nothing_is_fetched(client, image, message):
    for path, fields in ((EDIT, {"prompt": "a", "image": [image]}),
                         (CHAT, {"messages": [{"role": "user", "content": [
                             {"type": "image_url", "image_url": {"url": image}}]}]})):
        response = client.post(path, json=fields)
        assert response.status_code == 400 and message in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("messages", [
    None, [], "a", [1], [{}], [{"content": []}], [{"content": [{"type": "text"}]}], [{"content": {"a": 1}}],
    [{"content": [{"type": "image_url", "image_url": "x"}]}], [{"content": [{"type": "text", "text": 3}]}],
    [{"content": "a"}] * 33])
def test_bad_messages_are_refused(client, messages):
    response = client.post(CHAT, json={"messages": messages})
    assert response.status_code == 400 and "messages" in response.json()["error"]["message"], response.text


def test_what_is_no_request_of_ours_is_refused(client):
    body = {"prompt": "a"}
    assert client.post("/v1/nothing", json=body).status_code == 404
    assert client.get(DRAW).status_code == 405
    assert client.post(DRAW, content=b"prompt=a").status_code == 415
    assert client.post(DRAW, json=body, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post(DRAW, json=body, headers={"host": "evil.example"}).status_code == 400
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(EDIT, content=b"--x\r\nnonsense", headers=form).status_code == 400
    assert client.post(EDIT, data={"prompt": "a"}, files=[("image", b"x")] * 99).status_code == 400
    assert client.post(EDIT, data={"prompt": "a", "seed": "1}, {"}, files={"image": b"x"}).status_code == 400
    fields = [("prompt", (None, b"a")), ("image", (None, b'"aaaa"')), ("image", ("a.png", b"x"))]
    for files in (fields, fields[::-1]):
        twice = client.post(EDIT, files=files)
        assert twice.status_code == 400 and "'image' is given twice" in twice.text
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "small"


def test_names_of_a_server_at_all_addresses_are_any_unless_one_is_told():
    assert known_hosts("0.0.0.0", ()) == ["*"]
    assert "*" not in known_hosts("0.0.0.0", ["example.org"]) + known_hosts("127.0.0.1", ())
    assert {"127.0.0.1", "example.org"} <= set(known_hosts("0.0.0.0", ["example.org"]))
    assert known_hosts("::", ()) == ["*"] and "[::1]" in known_hosts("::1", ())    # as a browser sends it


def test_a_body_that_never_ends_is_cut_off(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as one:
        one.sendall(f"POST {DRAW} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                    "Content-Length: 1000\r\n\r\n{".encode())
        assert b" 408 " in one.recv(100)
