"""Questions about scenes: true answers are right, others wrong, and every kind is asked."""

import numpy as np
import pytest

from irg_jax.evaluation.questions import KINDS, Question, grade, is_right, make_question

QUESTIONS = [make_question(index, seed=0, side=64) for index in range(150)]


def asked(text, answer):
    return Question(np.zeros((64, 64, 3), np.uint8), text, answer)


def test_every_kind_is_asked_and_the_truth_is_right():
    assert {question.kind for question in QUESTIONS} == set(KINDS)
    table = grade(QUESTIONS, [question.answer for question in QUESTIONS])
    assert all(row["right"] == 1 and row["ci95"][0] < 1 for row in table.values())
    assert table["overall"]["asked"] == 150
    assert sum(row["asked"] for kind, row in table.items() if kind != "overall") == 150


def test_questions_are_the_same_every_time_and_others_with_another_seed():
    again = make_question(3, seed=0, side=64)
    assert again[1:] == QUESTIONS[3][1:]
    np.testing.assert_array_equal(again.image, QUESTIONS[3].image)
    assert [make_question(i, seed=1, side=64)[1:] for i in range(5)] != [q[1:] for q in QUESTIONS[:5]]


@pytest.mark.parametrize("given, expected", [
    ("a red ring and two blue stars.", True), ("two blue stars and a red ring.", True),
    ("two blue stars and a red ring on pale pink.", True), ("two blue stars.", False),
    ("a red ring and three blue stars.", False), ("", False)])
def test_lists_may_stand_in_any_order(given, expected):
    question = asked("what is in the picture?", "a red ring and two blue stars on white.")
    assert is_right(question, given) == expected


def test_other_answers_are_word_for_word():
    question = asked("how many stars are there?", "two.")
    assert is_right(question, "two.")
    assert not is_right(question, "two stars.") and not is_right(question, "one.")
    table = grade([question] * 4, ["two."] * 3 + ["one."])
    assert table["how many"]["right"] == 0.75 == table["overall"]["right"]
    low, high = table["how many"]["ci95"]
    assert 0.25 < low < 0.75 < high < 1
