"""The wording, in files that may be changed: what is asked of painter and critic, and what records say alike.

    system_prompt.txt    opens every record, but for line breaks at its end; an empty file: none does
    how_to_think.txt     the question of initial_thinking_understanding
    how_to_improve.txt   the question of improving_thinking_understanding
    headings.txt         three lines: the headed parts of a reflection
    paint.txt            to the painter: $prompt
    think.txt            to the critic, with the image: $prompt
    reflect.txt          to the critic, with first and better image: $prompt, $improvements, $steps, $final (the
                         headings), and $first_thought if it is to be shown
    quality.txt          to the critic, with an image: $prompt

`$$` is a dollar sign. The paper's own wording was never published; that beside this module is ours.
"""

import hashlib
import pathlib
import re
import string
from typing import NamedTuple

from data_pipelines.config import nearest
from data_pipelines.curation.material import Words

FOLDER = pathlib.Path(__file__).parent / "templates"
# Of each file, the placeholders it must have, and those it may have beside them.
FILES: dict[str, tuple[set[str], set[str]]] = {
    "system_prompt": (set(), set()), "how_to_think": (set(), set()), "how_to_improve": (set(), set()),
    "headings": (set(), set()), "paint": ({"prompt"}, set()), "think": ({"prompt"}, set()),
    "reflect": ({"prompt", "improvements", "steps", "final"}, {"first_thought"}),
    "quality": ({"prompt"}, set()),
}
NUM_HEADINGS = 3
MARK = "###"     # before a heading
_SCORE = re.compile(r"\**(?:score:?)?\s*(\d{1,2}(?:\.\d{1,6})?)(?:\s*/\s*10)?\**\.?", re.IGNORECASE)
_TAGS = re.compile(r"</?think>", re.IGNORECASE)
_PAIR = ["<think>", "</think>"]


class Templates(NamedTuple):
    """All templates, checked; digests by name of the file."""

    words: Words
    headings: tuple[str, ...]
    paint: string.Template
    think: string.Template
    reflect: string.Template
    quality: string.Template
    digests: dict[str, str]

    def ask_reflection(self, *, prompt: str, first_thought: str) -> str:
        """The filled reflect.txt."""
        improvements, steps, final = self.headings
        return self.reflect.substitute(prompt=prompt, first_thought=first_thought, improvements=improvements,
                                       steps=steps, final=final)


def load_templates(folder: str | pathlib.Path = "") -> Templates:
    """Of a folder, by default the one beside this module.

    Raises: ValueError naming the file that is missing, unknown or empty, and the placeholder that is missing or
        unknown.
    """
    home = pathlib.Path(folder or FOLDER)
    if not home.is_dir():
        raise ValueError(f"templates {str(home)!r} is no folder; copy {FOLDER} and change the copy")
    for path in sorted(home.glob("*.txt")):
        if path.stem not in FILES:
            raise ValueError(f"{path}: no template has this name{nearest(path.stem, FILES)}")
    texts = {name: _read(home / f"{name}.txt") for name in FILES}
    filled = {name: string.Template(text) for name, text in texts.items()}
    for name, template in filled.items():
        _check(home / f"{name}.txt", template, *FILES[name])
    plain = {name: template.substitute() for name, template in filled.items() if not any(FILES[name])}
    headings = tuple(line.strip() for line in plain.pop("headings").splitlines() if line.strip())
    if len({*headings}) != NUM_HEADINGS or len(headings) != NUM_HEADINGS:
        raise ValueError(f"{home / 'headings.txt'}: {len(headings)} headings; write {NUM_HEADINGS} different "
                         "ones, each on a line of its own")
    asked = {name: filled[name] for name in ("paint", "think", "reflect", "quality")}
    digests = {f"{name}.txt": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return Templates(Words(**plain), headings, **asked, digests=digests)


def read_thought(answer: str) -> str:
    """A critic's answer as a thought in think tags, which it may have left out.

    Raises: ValueError if something stands outside the tags, or there is none or more than one pair.
    """
    return f"<think>{_inside(answer)}</think>"


def read_reflection(answer: str, headings: tuple[str, ...]) -> str:
    """A critic's answer as a reflection: four parts in think tags, headings as in headings.txt.

    A critic may set its headings in bold or after another number of #, end them with or without a colon, and
    put the tags around the first part alone, or nowhere.

    Raises: ValueError unless every part is there, once, in order, and says something.
    """
    text = answer.strip()
    tags = [tag.lower() for tag in _TAGS.findall(text)]    # a pair that was never closed is an answer cut off
    if text.lower().startswith("<think>") and not text.lower().endswith("</think>") and tags == _PAIR:
        text = _TAGS.sub("", text)    # around the first part alone
    opening, *parts = split_parts(_inside(text), headings)
    told = "\n\n".join(f"{MARK} {heading}\n{part}" for heading, part in zip(headings, parts))
    return f"<think>{opening}\n\n{told}</think>"


def split_parts(text: str, headings: tuple[str, ...]) -> list[str]:
    """The text before the first heading, and that after each. Raises: as `read_reflection`."""
    ends, starts = [], [0]
    for heading in headings:
        pattern = rf"^[ \t]*(?:#+[ \t]*)?\**{re.escape(heading.strip(' #*:'))}:?\**:?[ \t]*$"
        found = list(re.finditer(pattern, text, re.MULTILINE | re.IGNORECASE))
        if len(found) != 1:
            raise ValueError(f"the heading {heading!r} stands there {len(found)} times, not once")
        if found[0].start() < starts[-1]:
            raise ValueError(f"the heading {heading!r} is not in its place")
        ends.append(found[0].start())
        starts.append(found[0].end())
    parts = [text[start:end].strip() for start, end in zip(starts, [*ends, len(text)])]
    if not all(parts):
        raise ValueError("a part of the reflection is empty")
    return parts


def read_score(answer: str) -> float:
    """A number from 0 to 10, perhaps as "8/10". Raises: ValueError for anything else."""
    match = _SCORE.fullmatch(answer.strip())
    if not match or float(match[1]) > 10:
        raise ValueError(f"no score from 0 to 10: {answer[:100]!r}")
    return float(match[1])


def _inside(text: str) -> str:
    """What stands in the one pair of think tags, or all of a text that has none."""
    text = text.strip()
    tags = [tag.lower() for tag in _TAGS.findall(text)]
    if tags:
        if tags != _PAIR or not (
                text.lower().startswith("<think>") and text.lower().endswith("</think>")):
            raise ValueError("the answer is not one pair of think tags with everything inside")
        text = text[len("<think>"):-len("</think>")].strip()
    if not text or _TAGS.search(text):
        raise ValueError("the answer says nothing")
    return text


def _read(path: pathlib.Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the template cannot be read ({error}); copy the one of {FOLDER}") from error
    if not text.strip() and path.stem != "system_prompt":
        raise ValueError(f"{path}: the template is empty; copy the one of {FOLDER}")
    return text if text.strip() else ""


def _check(path: pathlib.Path, template: string.Template, needed: set[str], allowed: set[str]) -> None:
    if not template.is_valid():
        raise ValueError(f"{path}: a $ begins no placeholder; write $$ for a dollar sign")
    found = set(template.get_identifiers())
    if missing := sorted(needed - found):
        raise ValueError(f"{path}: the placeholder ${missing[0]} is missing")
    if unknown := sorted(found - needed - allowed):
        known = needed | allowed
        raise ValueError(f"{path}: the placeholder ${unknown[0]} is unknown; "
                         + (f"use {', '.join(f'${name}' for name in sorted(known))}" if known
                            else "this file has none, write $$ for a dollar sign"))
