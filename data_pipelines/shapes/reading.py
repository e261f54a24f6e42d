"""Text alone: what a language model brings along before it sees a picture.

BAGEL starts from Qwen2.5, which reads any sentence, repeats any word and knows which adjective goes with which
noun. The miniature learns as much here: it answers questions about a caption, and says what a prompt asks for
even where the prompt names that it never heard of.
"""

import re
from collections.abc import Sequence

import numpy as np

from data_pipelines.shapes import language
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, plural

NUM_QUESTIONS = 3
RENAMED_SHARE = 0.5   # of the words that say what a thing is like

# Plain words that name no shape and no colour: with them no sentence can hold a held-out combination.
OTHER_WORDS = tuple(
    "again all almost already also asked back before bird boat book box bridge brown cat chair change "
    "clean cloud cold corner cup deep dog door dry each edge else every fast final find first fish flaw "
    "flower full goal gold hand help high hill home house idea improve improvement island keep key "
    "lamp larger leave letter light line long looking machine map mark matter missing modification moon "
    "mountain move music must needed new next number open order other paper part plan point problem "
    "prompt quick quiet rain remove required rest river road rock room round salt sea second see shadow "
    "ship shore short should side silver slow smaller soft song sound step stone story summer swap table "
    "tall think third tower tree turn up warm water wave whole wide wild wind window winter wood "
    "word world wrong year young Final Required Step-by-step ###".split())


def rename(rng: np.random.Generator, texts: Sequence[str]) -> list[str]:
    """The texts with colours, shapes, textures and backgrounds called by other words, the same in all.

    Only what the first text names is renamed: the others can be told from it.
    """
    # "pale green" holds a colour's name: the longest first, here and below.
    known = "|".join(sorted((*BACKGROUNDS, *COLOURS, *SHAPES, *TEXTURES), key=len, reverse=True))
    said = dict.fromkeys(re.findall(rf"\b({known})(?:e?s)?\b", texts[0]))
    chosen = [word for word in said if rng.random() < RENAMED_SHARE]
    others = [OTHER_WORDS[i] for i in rng.permutation(len(OTHER_WORDS))[:len(chosen)]]
    names = dict(zip(chosen, others))
    names |= {plural(shape, 2): plural(names[shape], 2) for shape in SHAPES if shape in names}
    words = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return [re.sub(rf"\b({words})\b", lambda match: names[match[0]], text) if words else text for text in texts]


def vary(rng: np.random.Generator, texts: Sequence[str]) -> Sequence[str]:
    """Half of the time the texts as they are, else in other words."""
    return rename(rng, texts) if rng.random() < 0.5 else texts


def read_caption(rng: np.random.Generator, scene: Scene) -> tuple[str, list[tuple[str, str]]]:
    """A caption, and questions with answers that it tells; half of the captions are about unheard-of things."""
    asked = language.questions(rng, scene, NUM_QUESTIONS)
    told, *texts = vary(rng, [language.caption(rng, scene), *(text for pair in asked for text in pair)])
    return told, list(zip(texts[::2], texts[1::2]))


def name_things(rng: np.random.Generator, prompt: str, scene: Scene) -> tuple[str, str]:
    """A prompt and the short description that a model thinks of before it draws, both in other words."""
    return tuple(rename(rng, (prompt, language.think(rng, scene))))
