"""The page of records and packs: what it says against the records, and that it stays harmless and small."""

import base64
import collections
import dataclasses
import html.parser
import io
import json
import pathlib
import re
import subprocess
import sys
import types

import ml_collections
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from data_cases import encode_image, image_part, tokenizer, write_data_set, write_rows
from data_pipelines import show
from data_pipelines.pipeline import Packs
from data_pipelines.show_page import packs, records

COUNTS = {"think": 9, "full": 12, "improving": 7}
HOSTILE = "<script>alert('x')</script> & \"q\" <img src=http://evil.example/a.png> \u202eabc\x07 {{ 7 * 7 }}"
VOID = {"meta", "img", "br"}


class Outline(html.parser.HTMLParser):
    """Every element with its attributes and its own text; an unbalanced page is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = tag, dict(attributes), []
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2].append(data)

    def find(self, tag: str, style: str = "") -> list[tuple[dict, str]]:
        return [(attributes, " ".join("".join(text).split())) for name, attributes, text in self.elements
                if name == tag and set(style.split()) <= set((attributes.get("class") or "").split())]


def make_config(folder: pathlib.Path, *, groups=None, **fields) -> ml_collections.ConfigDict:
    """A training config for the data of `write_data_set`, with its tokenizer in `init_from`."""
    data = {"source": "elsewhere", "groups": groups or {name: {"weight": 1.0} for name in COUNTS},
            "text_tokens": 160, "vit_tokens": 48, "latent_tokens": 48, "images": 6, "max_latent_size": 8,
            "vit_max_side": 8, "vae_dropout": 0.0,
            "vae_transform": {"stride": 16, "max_size": 64, "min_size": 16},
            "vit_transform": {"stride": 14, "max_size": 56, "min_size": 14}} | fields
    tokenizer().save(str(folder / "tokenizer.json"))
    return ml_collections.ConfigDict({"init_from": str(folder), "data": data})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_data_set(tmp_path_factory.mktemp("show") / "a_set", counts=COUNTS)


@pytest.fixture(scope="module")
def config(folder) -> ml_collections.ConfigDict:
    return make_config(folder)


@pytest.fixture(scope="module")
def full_page(folder, config) -> str:
    """All records, so that what it shows can be counted."""
    return show.show(folder, config=config, num_records=12, num_packs=2)


def read_conversations(folder: pathlib.Path) -> dict[str, list]:
    return {mode.name: [json.loads(text) for file in sorted(mode.glob("*.parquet"))
                        for text in pyarrow.parquet.read_table(file)["conversation"].to_pylist()]
            for mode in (folder / "train").iterdir()}


def expected_parts(turns: list) -> collections.Counter:
    """(is text, learned, ways in) of the parts of a conversation, from its JSON."""
    parts = collections.Counter()
    for turn in turns:
        for part in [turn] if turn["role"] == "user" else turn["content"]:
            is_text = part.get("type", "text") == "text"
            learned = part.get("need_loss", is_text and turn["role"] == "assistant")
            names = {"need_loss": "noised VAE", "need_vae": "clean VAE", "need_vit": "ViT"}
            ways = ("text",) if is_text else tuple(names[flag] for flag in names if part.get(flag))
            parts[is_text, learned, ways] += 1
    return parts


def test_every_part_of_every_record_is_shown_with_its_flags(folder, full_page):
    shown = collections.Counter()
    for block in re.findall(r'<li class="part .*?</li>', full_page, re.DOTALL):
        outline = Outline(block)
        ways = tuple(text.split(" ")[0] if text == "text" else text for _, text in outline.find("span", "use"))
        learned = bool(outline.find("span", "tag learned"))
        assert learned == bool(outline.find("li", "learned"))
        shown[bool(outline.find("p", "words")), learned, ways] += 1
    expected = sum((expected_parts(turns) for mode in read_conversations(folder).values() for turns in mode),
                   collections.Counter())
    assert shown == expected and len(expected) >= 4


def test_texts_and_pictures_of_the_records_are_on_the_page(folder, full_page):
    outline = Outline(full_page)
    words = collections.Counter(text for _, text in outline.find("p", "words"))
    expected, pictures = collections.Counter(), []
    for turns in sum(read_conversations(folder).values(), []):
        expected[turns[0]["content"]] += 1
        expected.update(part["content"] for part in turns[1]["content"] if part["type"] == "text")
        pictures += [part["content"] for part in turns[1]["content"] if part["type"] == "image"]
    assert words == expected
    decode = lambda data: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).tobytes()
    shown = collections.Counter(decode(attributes["src"].split(",")[1]) for attributes, _ in outline.find("img")
                                if attributes["alt"].startswith("picture of part"))
    assert shown == collections.Counter(map(decode, pictures))


def test_modes_are_counted(full_page):
    outline = Outline(full_page)
    rows = re.findall(r"<tr>\s*<td>(\w+)</td>\s*<td[^>]*>(\d+)</td>\s*<td[^>]*>(\d+) %", full_page)
    assert {name: int(count) for name, count, _ in rows} == COUNTS
    assert {share for *_, share in rows} == {"33"}
    assert [text for _, text in outline.find("b")][:3] == ["28", "3", "0"]
    assert {text for _, text in outline.find("h3")} >= set(COUNTS)


def test_packs_tell_fill_and_loss(folder, config, full_page):
    """The numbers beside the bars, and the widths in them, are those of the arrays."""
    data = dataclasses.replace(show._read_config(folder, config, None)[0])
    pipeline = Packs(data, tokenizer(), keep_journal=False)
    sections = full_page.split('<section class="pack">')[1:]
    assert len(sections) == 2
    for index, section in enumerate(sections):
        pack = pipeline[index]
        stats = [text for _, text in Outline(f"<div>{section.split('</section>')[0]}</div>").find("span")
                 if "% full" in text]
        used = [int((rows.last >= 0).sum()) for rows in (pack.text_rows, pack.vit_rows, pack.latent_rows)]
        learned = [int((pack.text_weight > 0).sum()), None, int((pack.latent_weight > 0).sum())]
        assert len(stats) == 3 and any(learned)
        for text, count, full, loss in zip(stats, used, (160, 48, 48), learned):
            assert text.startswith(f"{count} of {full}, {100 * count / full:.1f} % full")
            assert loss is None or text.endswith(f"{loss} learned")
        bars = section.split('<div class="bar">')[1:]
        for bar, full, loss, count in zip(bars, (160, 48, 48), learned, used):
            widths = collections.Counter()
            for style, width in re.findall(r'<i class="([^"]*)" style="left:[\d.]+%;width:([\d.]+)%"',
                                           bar.split("</div>")[0]):
                widths[style == "learned"] += float(width) * full / 100
            assert widths[True] == pytest.approx(loss or 0, abs=0.05)
            assert widths[False] == pytest.approx(count, abs=0.05)


def test_dropped_conditions_are_named(folder):
    config = make_config(folder, vae_dropout=1.0, vit_dropout=1.0)
    page = show.show(folder, config=config, num_records=0, num_packs=4)
    dropped = [Outline(block).find("s")[0][1] for block
               in re.findall(r'<li class="chip \w+ dropped">.*?</li>', page, re.DOTALL)]
    data = show._read_config(folder, config, None)[0]
    plan = Packs(data, tokenizer(), keep_journal=False).planner
    improving = sum(entry.group == "improving" for index in range(4) for entry in plan[index].entries)
    assert improving and dropped == ["clean VAE 6", "ViT 6"] * improving  # 32 pixels: 2 x 2 tokens, 2 brackets
    assert "chip clean\"" not in page and "chip vit\"" not in page


def test_a_record_that_breaks_in_a_pack_is_named(folder, monkeypatch, config):
    data = show._read_config(folder, config, None)[0]
    pipeline = Packs(data, tokenizer(), keep_journal=False)
    first = pipeline.planner[0].entries[0]
    source = pipeline._sources[first.group]

    class Broken:
        digest = source.digest
        __len__ = lambda self: len(source)

        def __getitem__(self, index):
            if index == first.index:
                raise ValueError(f"row {index} is broken: {HOSTILE}")
            return source[index]

    pipeline._sources[first.group] = Broken()
    view = packs.view_pack(pipeline, 0, tokenizer())
    assert len(view.faults) == 1 and f"row {first.index} is broken" in view.faults[0]
    assert not any(sample.place for sample in view.samples if sample.group == first.group)
    assert any(sample.place for sample in view.samples)


@pytest.fixture
def hostile(tmp_path) -> pathlib.Path:
    """Hostile texts and names, a huge text and picture, broken and odd records."""
    rng = np.random.default_rng(0)
    noise = base64.b64encode(encode_image(rng.integers(0, 256, (600, 700, 3), np.uint8))).decode()
    huge = {"type": "image", "content": noise, "need_loss": True}
    broken = {"type": "image", "content": base64.b64encode(b"no image").decode(), "need_vit": True}
    text = lambda content: {"type": "text", "content": content}
    folder = tmp_path / "<b>set"
    rows = [[{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": [text(HOSTILE * 300)]}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": [huge, broken] * 14}],
            [{"role": HOSTILE, "content": "a"}], f"no JSON {HOSTILE}"]
    write_rows(folder / "mode <script>x" / "0.parquet", rows)
    return folder


def assert_harmless(page: str) -> None:
    outline = Outline(page)
    assert {tag for tag, *_ in outline.elements}.isdisjoint({"script", "link", "iframe", "object", "form"})
    for _, attributes, _ in outline.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes
        assert re.match("data:image/(png|jpeg);base64,", attributes.get("src", "data:image/png;base64,"))
    policy = [attributes["content"] for attributes, _ in outline.find("meta")
              if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "@import" not in page and "url(" not in page


def test_hostile_records_are_shown_and_do_nothing(hostile, capsys):
    call(hostile, records=20)
    page = hostile.with_name("<b>set_show.html").read_text(encoding="utf-8")
    assert str(hostile.with_name("<b>set_show.html")) in capsys.readouterr().out
    assert_harmless(page)
    assert "&lt;script&gt;alert(" in page and "<script" not in page and "{{ 7 * 7 }}" in page
    assert "\u202e" not in page and "\x07" not in page
    texts = [text for _, text in Outline(page).find("p")]
    assert sum("Cannot be read" in text for text in texts) == 2 and "unknown role" in page
    assert sum("not a readable" in text for text in texts) == 11, "of 24 parts: a text, 12 huge ones, 11 broken"
    assert "and 5 more parts" in page
    assert len(page) < 300_000, "a part is clipped, a picture shrunk"


def test_page_is_bounded_by_what_is_asked_for(full_page, folder, config):
    assert_harmless(full_page)
    assert len(full_page) < 28 * 12_000 + 2 * 60_000
    few = show.show(folder, config=config, num_records=1, num_packs=0)
    assert len(few) < 60_000 and "<section" not in few


def test_the_choice_of_records_follows_the_seed(folder):
    places = lambda seed: re.findall(r'<p class="place">record (\d+)', show.show(folder, seed=seed))
    assert places(3) == places(3) != places(4)
    assert len(places(3)) == 6


def test_records_only_without_a_config(folder):
    page = show.show(folder)
    assert "<section" not in page and "letters of text" in page
    for mode, conversations in read_conversations(folder).items():
        median = np.median([len(turns[0]["content"]) + sum(
            len(part["content"]) for part in turns[1]["content"] if part["type"] == "text")
            for turns in conversations])
        row = re.search(rf"<tr>\s*<td>{mode}.*?</tr>", page, re.DOTALL)[0]
        shown = f"{median:,.3g}" if median < 100 else f"{median:,.0f}"
        assert re.search(r"</svg>\s*([\d.,]+)", row)[1] == shown


def test_the_released_layout_is_found(folder, tmp_path):
    (tmp_path / "released").symlink_to(folder / "train")
    assert show.show(tmp_path / "released").count('<p class="place">') == 6


def test_clip():
    assert records.clip("a\ud800b\x00\nc", 10) == ("a\ufffdb\ufffd\nc", 0)
    assert records.clip("abcdef", 4) == ("abcd\u2026", 2)


def call(folder: pathlib.Path, **values) -> None:
    """The command, past its flags."""
    defaults = dict(dir=str(folder), config=None, tokenizer=None, out=None, records=2, packs=2, seed=None)
    show.main(types.SimpleNamespace(**(defaults | values)))


def refuse(folder: pathlib.Path, **values) -> str:
    with pytest.raises(ValueError) as caught:
        call(folder, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_input_is_told_in_a_sentence(folder, config, tmp_path):
    out = str(tmp_path / "page.html")
    assert "not a folder" in refuse(tmp_path / "none", out=out)
    assert "not a folder" in refuse(tmp_path / "none", config=config, out=out)
    assert "holds no data set" in refuse(tmp_path, out=out)
    assert "does not exist" in refuse(folder, config=config, tokenizer=str(tmp_path / "t.json"), out=out)
    assert "needs --config" in refuse(folder, tokenizer=str(tmp_path / "t.json"), out=out)
    assert "--records is 21" in refuse(folder, records=21, out=out)
    assert "--packs is -1" in refuse(folder, packs=-1, out=out)
    assert "no field data" in refuse(folder, config=ml_collections.ConfigDict({"counts": {}}), out=out)
    assert "none_such" in refuse(folder, config=make_config(folder, groups={"none_such": {}}), out=out)
    assert "max_siz" in refuse(folder, config=make_config(folder, vae_transform={"max_siz": 3}), out=out)
    (tmp_path / "train" / "m").mkdir(parents=True)
    (tmp_path / "train" / "m" / "0.parquet").write_bytes(b"nothing")
    assert "not a readable parquet file" in refuse(tmp_path, out=out)
    assert not (tmp_path / "page.html").exists()
    assert "is a folder" in refuse(folder, out=str(folder))
    assert "cannot be written" in refuse(folder, out=str(folder / "tokenizer.json" / "page.html"))


def test_a_missing_tokenizer_is_told(folder, tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "mine.json")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "train").symlink_to(folder / "train")
    assert "pass --tokenizer" in refuse(copy, config=config)
    call(copy, config=config, tokenizer=str(tmp_path / "mine.json"), packs=1, records=1)
    assert (tmp_path / "copy_show.html").is_file()


def test_the_command(folder, tmp_path):
    """Its one nameless argument, an override, a page, and a refusal in one sentence."""
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "data_pipelines.show", *map(str, words)], capture_output=True, text=True,
        cwd=pathlib.Path(__file__).parent.parent)
    fields = make_config(folder).to_dict()
    (tmp_path / "config.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({fields})\n")
    done = run(folder, "--config", tmp_path / "config.py", "--config.data.text_tokens=170", "--out",
               tmp_path / "page.html")
    assert done.returncode == 0 and done.stdout.startswith(f"wrote {tmp_path / 'page.html'} (")
    assert "of 170," in (tmp_path / "page.html").read_text()
    failed = run(tmp_path / "none")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_shapes_brings_its_own_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"source": "shapes"}))
    assert show._find_tokenizer(tmp_path, "") == show.SHAPES_TOKENIZER and show.SHAPES_TOKENIZER.is_file()
    (tmp_path / "manifest.json").write_text("[]")
    assert show._find_tokenizer(tmp_path, "") is None


def test_unused_image_part_says_so(tmp_path):
    rng = np.random.default_rng(0)
    write_rows(tmp_path / "s" / "m" / "0.parquet", [[{"role": "user", "content": "a"}, {
        "role": "assistant", "content": [image_part(rng), image_part(rng, need_loss=True)]}]])
    page = show.show(tmp_path / "s")
    assert page.count("enters nowhere") == 1
