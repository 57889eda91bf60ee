"""Whether a label equals an answer can be told without the answer; little else can."""

from __future__ import annotations

from service.answer_digest import DIGEST_CHARACTERS, answer_digest


def test_what_evaluations_take_for_equal_has_the_same_digest() -> None:
    assert answer_digest("c", " lost\n card ") == answer_digest("c", "lost card")
    assert answer_digest("c", '{"a": 1, "b": 2}') == answer_digest("c", '{"b":2,"a":1}')
    assert answer_digest("c", "Gru\u0308ße") == answer_digest("c", "Gr\u00fcße")
    assert answer_digest("c", "lost card") != answer_digest("c", "Lost card")
    assert answer_digest("c", "\ud83d") == answer_digest("c", "\ud83d"), "half a surrogate pair is compared, too"


def test_equal_answers_look_unlike_and_a_digest_says_little() -> None:
    digests = {answer_digest(f"completion-{n}", "refund") for n in range(100)}
    assert len(digests) > 90
    guesses = [answer_digest("c", f"guess {n}") for n in range(3000)]
    assert len(guesses[0]) == DIGEST_CHARACTERS
    assert len(set(guesses)) < 2980, "other texts fit as well"
