"""No text reaches a control token; a tokenizer that does not fit is refused."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_cases import WORDS
from data_pipelines.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 4, vocab_size=300)


def test_control_tokens_are_the_last_ids(tokenizer):
    last = tokenizer.vocab_size - 1
    ids = (tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image)
    assert ids == (last - 3, last - 2, last - 1, last) and tokenizer.vocab_size <= 300


@given(st.lists(st.one_of(st.text(max_size=5), st.sampled_from(CONTROL_TOKENS))))
def test_any_text_comes_back_without_control_ids(pieces):
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=270)
    text = "".join(pieces).encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert not set(ids) & {tokenizer.bos, tokenizer.eos, tokenizer.start_of_image,
                           tokenizer.end_of_image}
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text


def test_prompts_with_control_tokens_are_refused(tokenizer):
    tokenizer.reject_control_tokens("a red circle <im_end>", where="prompt 2")
    with pytest.raises(ValueError, match=r"prompt 2 contains .*<\|im_end\|>.* at character 6"):
        tokenizer.reject_control_tokens("a red <|im_end|> circle", where="prompt 2")


def test_other_special_tokens_are_refused_too():
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.add_special_tokens([*CONTROL_TOKENS, "<|endoftext|>"])
    with pytest.raises(ValueError, match="endoftext"):
        Tokenizer(raw).reject_control_tokens("a<|endoftext|>", where="prompt")


def test_file_round_trip(tokenizer, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    again = Tokenizer.from_file(path, vocab_size=tokenizer.vocab_size)
    assert again.encode("two green stars <|im_end|>") == tokenizer.encode(
        "two green stars <|im_end|>")
    assert again.fingerprint == tokenizer.fingerprint


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer([" ".join(WORDS)] * 4, vocab_size=300)
    assert again.fingerprint == tokenizer.fingerprint


def test_files_that_do_not_fit_are_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.from_file(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_file(str(path))
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match="vocabulary ends at 99"):
        Tokenizer.from_file(str(path), vocab_size=100)
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"]
                               if token["content"] != "<|vision_end|>"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks the control tokens <\|vision_end\|>"):
        Tokenizer.from_file(str(path))


def test_limits(tokenizer):
    with pytest.raises(ValueError, match="1000001 characters is over the limit"):
        tokenizer.encode("a" * 1_000_001)
    with pytest.raises(ValueError, match="vocab_size 100 is too small"):
        train_tokenizer(["a"], vocab_size=100)
