"""The system prompt: a text that opens every context, for training and generation each a field of its config.

The three published ones belong to the released weights and are not reprinted here; their digests are known.
"""

import hashlib
import pathlib

KNOWN_SYSTEM_PROMPTS = {  # sha256 of the exact texts that released weights were trained with
    "19ea075c43989cff7492cee55942e987e3f5cd84dab21db0b024d6d638323871": "IRG generation",
    "837914a3f5f8ec1be30d2fdb68f4e494a3d4767056100a113c4109af5367d390": "BAGEL generation",
    "5eff00888fdf6b912c3f9a80711933dd35cdd164d167cba6b2a5889c04d7b565": "BAGEL understanding",
}


def load_system_prompt(text: str) -> str:
    """The system prompt itself; "@file" names a UTF-8 file that holds it, to the last character.

    Raises: ValueError if the file cannot be read, or holds nothing.
    """
    if not text.startswith("@"):
        return text
    try:
        prompt = pathlib.Path(text[1:]).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"system_prompt {text!r}: the file cannot be read as text ({error})"
                         ) from error
    if not prompt:
        raise ValueError(f"system_prompt {text!r}: the file is empty; for no system prompt leave the field so")
    return prompt


def name_system_prompt(text: str) -> str | None:
    """Which of the three published system prompts a text is; None for any other."""
    return KNOWN_SYSTEM_PROMPTS.get(hashlib.sha256(text.encode("utf-8")).hexdigest())
