"""Whatever fails on the way of a case: each wanted record is there, or a rejection says why not, never both."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from curation_cases import HEADINGS, picture, reflection, thought
from data_pipelines.curation.collecting import Collector
from data_pipelines.curation.compose import MODES
from data_pipelines.curation.config import FilterConfig
from data_pipelines.curation.filters import Rules, Seen
from data_pipelines.curation.gathering import SIDES, Crew, Plan, gather, tell
from data_pipelines.curation.material import Case, Picture, Rejected, Round, Words
from data_pipelines.curation.painters import Painted
from data_pipelines.endpoints import Declined

FIRST, BETTER, PAIR = (Picture.drawn(picture(name)) for name in ("first", "better", "pair"))
WORK = ("sketch", "paint", "rate", "think", "reflect")


@dataclasses.dataclass
class Fake:
    """Sketcher, painter and critic; work that is in `fails` fails with the exception there."""

    fails: dict
    name: str = "fake"
    done: list = dataclasses.field(default_factory=list)

    def _do(self, work, value):
        self.done.append(work)
        if work in self.fails:
            raise self.fails[work]
        return value

    def has(self, case):
        return True

    def sketch(self, case):
        return self._do("sketch", Round("<think>first</think>", FIRST, {}))

    def paint(self, case, first):
        return self._do("paint", Painted(BETTER, {"by": "fake"}))

    def rate(self, case, image):
        return self._do("rate", 8.0)

    def think(self, case, image):
        return self._do("think", thought("a cat"))

    def reflect(self, case, first, better):
        return self._do("reflect", reflection("a cat"))


FAULTS = st.sampled_from([Rejected("bad", "because"), Declined("no")])


@given(st.dictionaries(st.sampled_from(WORK), FAULTS),
       st.lists(st.sampled_from(MODES), min_size=1, unique=True), st.booleans(), st.booleans(), st.booleans(),
       st.booleans(), st.booleans())
def test_every_wanted_record_is_there_or_rejected(fails, modes, is_pair, improves, has_sketcher, has_painter,
                                                  is_safe):
    def safety(prompt, texts, images):
        return "" if is_safe else "unsafe"
    fake = Fake(fails)
    crew = Crew(fake, fake if has_painter else None, fake if has_sketcher else None)
    rules = Rules(FilterConfig(min_side=1, min_quality=5.0), HEADINGS, safety)
    plan = Plan(modes, Words("s", "t", "i"), rules, improve_pairs=improves)
    case = Case("a", "a cat", "CC0", {}, PAIR if is_pair else None)
    gathered = gather(case, crew=crew, plan=plan)
    may_improve = has_sketcher and (not is_pair or improves)
    wanted = {mode for mode in modes if mode in SIDES["initial"] or may_improve}
    told = {mode for mode in MODES if tell(gathered, mode)}
    lost = {mode for one in gathered.rejections for mode in wanted
            if one.what == "case" or mode in SIDES[one.what]}
    assert told | lost == wanted and not told & lost
    assert len({one.what for one in gathered.rejections}) == len(gathered.rejections)
    assert bool(gathered.rejections) or told
    assert all(one.cause and one.id == "a" for one in gathered.rejections)
    assert len(fake.done) == len({*fake.done})    # nobody is asked twice
    if not is_pair and not has_painter or "paint" in fails and not is_pair or "rate" in fails:
        assert not {"think", "reflect"} & {*fake.done}    # a bad image costs nothing more
    if is_pair:
        assert "paint" not in fake.done and ("sketch" in fake.done) <= improves


def collect(folder, gathered, near_bits=4):
    collector = Collector({mode: folder / mode for mode in MODES}, rows_per_file=4, rows_per_group=2,
                          seen=Seen(near_bits))
    with collector:
        for one in gathered:
            collector.add(one)
    collector.write_rejections(folder)
    return collector


def test_a_duplicate_is_counted_once_whatever_else_failed(tmp_path):
    rules = Rules(FilterConfig(min_side=1), HEADINGS)
    plan = Plan(MODES, Words("s", "t", "i"), rules)
    good, bad = Fake({}), Fake({"think": Rejected("bad")})
    cases = [Case(name, name, "CC0", {}) for name in "abc"]
    gathered = [gather(case, crew=Crew(fake, fake, fake), plan=plan)
                for case, fake in zip(cases, (bad, good, bad))]
    collector = collect(tmp_path, gathered)
    assert [(one.id, one.what, one.cause) for one in collector.rejections] == [
        ("a", "initial", "bad"), ("b", "case", "duplicate_image"), ("c", "case", "duplicate_image")]
    assert collector.counts == {mode: int(mode in SIDES["improving"]) for mode in MODES}
    assert collector.told == {"whole": 0, "partly": 1}
    assert collector.describe()["rejections"]["duplicate_image"] == {"count": 2, "ids": ["b", "c"]}
    lines = [json.loads(line) for line in open(tmp_path / "rejected.jsonl", encoding="utf-8")]
    assert [line["cause"] for line in lines] == ["bad", "duplicate_image", "duplicate_image"]
