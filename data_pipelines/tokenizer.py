"""Text to ids, with the four control tokens out of reach of any text.

A Hugging Face `tokenizer.json` turns the string "<|im_end|>" inside a prompt into the real control
token. Here text is always encoded as ordinary bytes and control tokens are placed by us alone.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers

BOS, EOS = "<|im_start|>", "<|im_end|>"
START_OF_IMAGE, END_OF_IMAGE = "<|vision_start|>", "<|vision_end|>"
CONTROL_TOKENS = (BOS, EOS, START_OF_IMAGE, END_OF_IMAGE)
VOCAB, MERGES, TOKENIZER_CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
MAX_TEXT_CHARS = 1_000_000  # the tokenizer's own cap, whatever its caller allows


class Tokenizer:
    """A `tokenizers.Tokenizer` that has the four control tokens and never reads them from text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, vocab_size: int | None = None,
                 where: str = "tokenizer"):
        """Args: where names the tokenizer's file in messages; vocab_size is the model's.

        Raises: ValueError if a control token is absent or an id lies outside the vocabulary.
        """
        ids = [tokenizer.token_to_id(token) for token in CONTROL_TOKENS]
        missing = [token for token, id_ in zip(CONTROL_TOKENS, ids) if id_ is None]
        if missing:
            raise ValueError(f"{where} lacks the control tokens {' '.join(missing)}; add them as "
                             "special tokens")
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(f"{where} has ids up to {largest}, but the model's vocabulary ends at "
                             f"{vocab_size - 1}; they do not belong together")
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._reserved = tuple(sorted({token.content for token
                                       in tokenizer.get_added_tokens_decoder().values()
                                       if token.special} | set(CONTROL_TOKENS)))
        self.bos, self.eos, self.start_of_image, self.end_of_image = ids
        self.vocab_size = largest + 1

    @classmethod
    def from_file(cls, path: str, *, vocab_size: int | None = None) -> "Tokenizer":
        """Reads a `tokenizer.json`. Raises ValueError if it is missing, broken or lacks tokens."""
        if not os.path.isfile(path):
            raise ValueError(f"tokenizer file {path!r} does not exist")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception for any fault in the file
            raise ValueError(f"tokenizer file {path!r} cannot be read: {error}") from error
        return cls(tokenizer, vocab_size=vocab_size, where=path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text; "<|im_end|>" becomes the bytes it is made of."""
        if len(text) > MAX_TEXT_CHARS:
            raise ValueError(f"text of {len(text)} characters is over the limit {MAX_TEXT_CHARS}")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return self._tokenizer.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    def reject_control_tokens(self, text: str, *, where: str) -> None:
        """Raises ValueError naming the control token, its position and `where`, if there is one."""
        for token in self._reserved:
            position = text.find(token)
            if position >= 0:
                raise ValueError(f"{where} contains the control token {token!r} at character "
                                 f"{position}; remove it")

    def save(self, path: str) -> None:
        """Writes `tokenizer.json`."""
        self._tokenizer.save(path)

    def save_parts(self, folder: pathlib.Path) -> None:
        """Writes vocab.json, merges.txt and tokenizer_config.json, which BAGEL's own code reads instead.

        Raises: ValueError if it is no byte-pair encoding.
        """
        described = json.loads(self._tokenizer.to_str())
        model, added = described["model"], described["added_tokens"]
        if model["type"] != "BPE":
            raise ValueError(f"the tokenizer is of type {model['type']}; BAGEL's own code reads none but BPE")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        config = {
            "tokenizer_class": "Qwen2Tokenizer",
            # With their ids: that code would else number the control tokens anew.
            "added_tokens_decoder": {str(token["id"]): {name: token[name] for name in token if name != "id"}
                                     for token in added},
            "additional_special_tokens": [token["content"] for token in added if token["special"]],
            "bos_token": None, "eos_token": EOS, "pad_token": EOS, "unk_token": None,
            "add_prefix_space": False, "clean_up_tokenization_spaces": False, "errors": "replace",
        }
        for name, text in {VOCAB: json.dumps(model["vocab"], ensure_ascii=False),
                           MERGES: "\n".join(["#version: 0.2", *merges]),
                           TOKENIZER_CONFIG: json.dumps(config, indent=1, ensure_ascii=False)}.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")

    def __reduce__(self):
        # A copy that `tokenizers` made for another process would read control tokens from text again.
        return _restore, (self._tokenizer.to_str(),)

    @property
    def fingerprint(self) -> str:
        """sha256 of the whole tokenizer, to tell two of them apart."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()


def _restore(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE on `texts`; the control tokens are the last four ids.

    The vocabulary is smaller than `vocab_size` if the texts offer no more pairs to merge.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(CONTROL_TOKENS):
        raise ValueError(f"vocab_size {vocab_size} is too small; bytes and control tokens need "
                         f"{len(alphabet) + len(CONTROL_TOKENS)}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS), initial_alphabet=sorted(alphabet),
        show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return Tokenizer(tokenizer)
