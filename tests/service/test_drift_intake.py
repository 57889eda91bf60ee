"""From an answer to the queue of the watch."""

from __future__ import annotations

import threading
import time

import pytest

from service.drift_answers import answer_values
from service.drift_intake import MAX_ANSWER_CHARACTERS, Answered, DriftTap, FairQueue, Turn
from service.drift_prompt import MAX_PROMPT_TOKENS
from service.engine.sequence import FinishReason, OutputChunk

A, B = ("acme", "d" * 64), ("zenith", "e" * 64)


def chunk(text: str, reason: FinishReason | None = None, **measured: float) -> OutputChunk:
    return OutputChunk(text, (1,), None, reason, 3, 7, **measured)  # type: ignore[arg-type]


def heard(*chunks: OutputChunk, prompt: tuple[int, ...] = (1, 2, 3), turn: Turn | None = None) -> list[Answered]:
    found: list[Answered] = []
    failures: list[None] = []
    tap = DriftTap(*A, "ft:a", turn or Turn(), prompt, found.append, lambda: failures.append(None))
    for each in chunks:
        tap.add(each)
    tap.finished()
    assert not failures
    return found


def test_an_answer_is_delivered_with_what_was_measured() -> None:
    (found,) = heard(chunk("It is "), chunk("red.", FinishReason.STOP, answer_nll=0.5, answer_entropy=1.5))
    assert (found.text, found.is_whole, found.length, found.finish_reason) == ("It is red.", True, 7, FinishReason.STOP)
    assert (found.nll, found.entropy, found.prompt, found.prompt_length) == (0.5, 1.5, (1, 2, 3), 3)


def test_an_answer_that_never_ended_is_not_delivered() -> None:
    assert heard(chunk("It is ")) == []


def test_long_prompts_are_cut_to_their_end_and_named_by_it_but_counted_whole() -> None:
    long = tuple(range(3 * MAX_PROMPT_TOKENS))
    other = (7, *long[1:])
    (one,), (two,) = heard(chunk("", FinishReason.STOP), prompt=long), heard(chunk("", FinishReason.STOP), prompt=other)
    assert one.prompt == two.prompt == long[-MAX_PROMPT_TOKENS:] and one.prompt_length == len(long)
    (third,) = heard(chunk("", FinishReason.STOP), prompt=(*long, 9))
    assert one.prompt_digest == two.prompt_digest != third.prompt_digest


def test_a_very_long_answer_is_not_kept_whole_and_nobody_says_that_it_is_no_json() -> None:
    piece = "x" * 1000
    pieces = [chunk(piece) for _ in range(MAX_ANSWER_CHARACTERS // 1000 + 5)]
    (found,) = heard(*pieces, chunk("", FinishReason.STOP), turn=Turn(expects_json=True))
    assert len(found.text) == MAX_ANSWER_CHARACTERS and not found.is_whole
    assert answer_values(found, expects_json=True)["valid_json"] is None


def test_a_tap_that_cannot_deliver_does_not_fail_the_request() -> None:
    failures: list[None] = []

    def refuse(answered: Answered) -> None:
        raise RuntimeError("no room")

    tap = DriftTap(*A, "ft:a", Turn(), (1,), refuse, lambda: failures.append(None))
    tap.add(chunk("x", FinishReason.STOP))
    tap.finished()
    assert failures == [None]


@pytest.mark.parametrize(
    ("text", "valid"),
    [('{"a": 1}', 1.0), (" [1, 2] ", 1.0), ('{"a": NaN}', 0.0), ('Sure: {"a": 1}', 0.0), ('{"a": 1', 0.0), ("", 0.0)],
)
def test_json_is_judged_strictly_where_it_is_meant(text: str, valid: float) -> None:
    (found,) = heard(chunk(text, FinishReason.STOP))
    assert answer_values(found, expects_json=True)["valid_json"] == valid
    assert answer_values(found, expects_json=False)["valid_json"] is None
    (asked,) = heard(chunk(text, FinishReason.STOP), turn=Turn(expects_json=True))
    assert answer_values(asked, expects_json=False)["valid_json"] == valid


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I cannot help with that.", "Ich kann dir dabei nicht helfen.", "Red."]
)
def test_refusals_count_and_a_cut_answer_does(text: str) -> None:
    (found,) = heard(chunk(text, FinishReason.LENGTH))
    values = answer_values(found, expects_json=False)
    assert (values["refusal"], values["finish_length"], values["answer_length"]) == (float(text != "Red."), 1.0, 7.0)
    assert values["answer_nll"] is None


def test_streams_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3"):
        queue.put(A, item)
    queue.put(B, "b1")
    assert [queue.take() for _ in range(5)] == ["a1", "b1", "a2", "a3", None]


def test_a_full_queue_refuses_at_once_and_one_stream_cannot_fill_it() -> None:
    queue: FairQueue[int] = FairQueue(max_waiting=4, max_of_a_stream=3)
    assert [queue.put(A, n) for n in range(4)] == [True, True, True, False]
    assert [queue.put(B, n) for n in range(2)] == [True, False]
    queue.take()
    assert queue.put(B, 9) and len(queue) == 4


def test_who_waits_for_an_item_is_woken_by_one() -> None:
    queue: FairQueue[int] = FairQueue()
    threading.Timer(0.05, queue.put, (A, 5)).start()
    start = time.monotonic()
    assert queue.take(10.0) == 5 and time.monotonic() - start < 5
