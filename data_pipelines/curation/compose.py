"""The one place that makes conversations of the six learning modes.

`*` marks what carries loss; a conditioning image enters as clean VAE latents and then ViT patches.

    initial_thinking_understanding    system, prompt, image, how to think, thought*
    initial_thinking_generation       system, prompt, thought*
    initial_full                      system, prompt, thought*, image*
    improving_thinking_understanding  system, prompt, first image, image, how to improve, reflection*
    improving_thinking_generation     system, prompt, first thought, first image, reflection*
    improving_full                    system, prompt, first thought, first image, reflection*, image*

A record is a list of turns. A user turn holds a string; an assistant turn holds a list of parts, texts or
images (base64), each saying whether it carries loss and how an image is looked at.
"""

import base64
from typing import Any

from data_pipelines.curation.material import Material, Picture

INITIAL = ("initial_thinking_understanding", "initial_thinking_generation", "initial_full")
IMPROVING = ("improving_thinking_understanding", "improving_thinking_generation", "improving_full")
MODES = INITIAL + IMPROVING

Turn = dict[str, Any]


def compose(mode: str, material: Material) -> list[Turn]:
    """One conversation, ready for `json.dumps`.

    Raises: ValueError if the mode is none of MODES, or the material lacks what it tells.
    """
    words = material.words
    opening = [user(text) for text in (words.system_prompt, material.prompt) if text]
    if mode in INITIAL:
        return [*opening, *_initial(mode, material)]
    if mode in IMPROVING:
        return [*opening, *_improving(mode, material)]
    raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")


def _initial(mode: str, material: Material) -> list[Turn]:
    if not material.thought:
        raise ValueError(f"{mode} of prompt {material.prompt!r} has no thought")
    thought = text(material.thought)
    match mode:
        case "initial_thinking_understanding":
            return [assistant(seen(material.image)), user(material.words.how_to_think), assistant(thought)]
        case "initial_thinking_generation":
            return [assistant(thought)]
    return [assistant(thought, drawn(material.image))]


def _improving(mode: str, material: Material) -> list[Turn]:
    if not material.first or not material.reflection:
        raise ValueError(f"{mode} of prompt {material.prompt!r} has no first round, or no reflection")
    first, reflection = seen(material.first.image), text(material.reflection)
    if mode == "improving_thinking_understanding":
        return [assistant(first, seen(material.image)), user(material.words.how_to_improve),
                assistant(reflection)]
    parts = [text(material.first.thought, need_loss=False), first, reflection]
    if mode == "improving_full":
        parts.append(drawn(material.image))
    return [assistant(*parts)]


def user(content: str) -> Turn:
    """A turn without loss."""
    return {"role": "user", "content": content}


def assistant(*parts: dict[str, Any]) -> Turn:
    """A turn of texts and images."""
    return {"role": "assistant", "content": list(parts)}


def text(content: str, *, need_loss: bool = True) -> dict[str, Any]:
    """A text, by default one to be learnt."""
    return {"type": "text", "content": content, "need_loss": need_loss}


def seen(picture: Picture) -> dict[str, Any]:
    """A conditioning image."""
    return image_part(picture, need_vae=True, need_vit=True)


def drawn(picture: Picture) -> dict[str, Any]:
    """An image to be learnt."""
    return image_part(picture, need_loss=True)


def image_part(picture: Picture, *, need_loss: bool = False, need_vae: bool = False,
               need_vit: bool = False) -> dict[str, Any]:
    """An image that enters as its flags say."""
    return {"type": "image", "content": base64.b64encode(picture.data).decode("ascii"),
            "need_loss": need_loss, "need_vae": need_vae, "need_vit": need_vit}
