"""Example files: what is accepted, and that every complaint names its line."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from adapters.dataset import examples_at, read_examples
from adapters.errors import DatasetError
from adapters.example import MAX_LINE_BYTES, ChatExample, CompletionExample, Message


def _chat(question: str = "hi", answer: str = "hello", **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


def _jsonl(rows: list[Any]) -> io.BytesIO:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return io.BytesIO(b"\n".join(lines) + b"\n")


def _complaint(row: Any, at: int = 4) -> str:
    """What is said about `row` on line `at` of an otherwise good file."""
    rows = [_chat(f"q{i}") for i in range(12)]
    rows[at - 1] = row
    with pytest.raises(DatasetError) as caught:
        list(read_examples(_jsonl(rows)))
    assert caught.value.line == at
    assert caught.value.param == "training_file"
    assert caught.value.message.startswith(f"line {at}: ")
    return caught.value.message


def test_chat_examples_are_read_with_their_line_and_weight() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 1},
        ]
    }
    examples = list(read_examples(_jsonl([row] * 10)))
    assert len(examples) == 10
    third = examples[2]
    assert isinstance(third, ChatExample)
    assert third.line == 3
    assert [message.trained for message in third.messages] == [False, False, False, False, True]
    assert third.prompt[-1] == Message("user", "c")
    assert third.answer == "d"


def test_completion_examples_are_read() -> None:
    examples = list(read_examples(_jsonl([{"prompt": "2+2=", "completion": " 4"}] * 10)))
    assert examples[0] == CompletionExample(1, "2+2=", " 4")


def test_metadata_and_assertions_stand_beside_what_is_learned() -> None:
    row = {**_chat(), "metadata": {"shop": "north"}, "assertions": [{"max_length": 9}]}
    example = next(read_examples(_jsonl([row] * 10)))
    assert example.metadata == {"shop": "north"}
    assert [assertion.as_dict() for assertion in example.assertions] == [{"max_length": 9}]
    completion = next(read_examples(_jsonl([{"prompt": "a", "completion": "b", "metadata": {"k": "v"}}] * 10)))
    assert completion.metadata == {"k": "v"} and completion.assertions == ()
    assert len({example, next(read_examples(_jsonl([row] * 10)))}) == 1


def test_blank_lines_and_a_byte_order_mark_are_no_examples_but_count_as_lines() -> None:
    good = json.dumps(_chat()).encode()
    stream = io.BytesIO(b"\xef\xbb\xbf" + b"\n\n".join([good] * 10) + b"\n\n")
    assert [example.line for example in read_examples(stream)] == list(range(1, 21, 2))


def test_a_last_line_without_a_newline_is_read() -> None:
    stream = io.BytesIO(b"\n".join([json.dumps(_chat()).encode()] * 10))
    assert len(list(read_examples(stream))) == 10


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"{not json", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "recursion"),
        ([1, 2], "must be a JSON object"),
        ({}, "must have 'messages', or 'prompt' and 'completion'"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": ["hi"]}, "messages[0]: must be an object"),
        ({**_chat(), "tools": []}, "unknown key 'tools'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last message must be from 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0]: 'role' must be one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0]: 'role' must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0]: 'content' is missing"),
        (_chat(answer="  "), "messages[1]: 'content' is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: 'content' must be a string"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "'weight' belongs to messages from"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "messages[0]: unknown key 'name'"),
        (_chat(weight=0.5), "messages[1]: 'weight' must be 0 or 1"),
        (_chat(weight=True), "messages[1]: 'weight' must be 0 or 1"),
        (_chat(weight=[]), "messages[1]: 'weight' must be 0 or 1"),
        (_chat(weight=0), "every assistant message has weight 0"),
        (_chat(question="\ud800"), "half of a surrogate pair"),
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": 3, "completion": "b"}, "'prompt' must be a string"),
        ({"prompt": "a", "completion": "b", "id": 1}, "unknown key 'id'"),
        ({**_chat(), "metadata": ["x"]}, "'metadata' must be an object whose values are strings"),
        ({**_chat(), "metadata": {"n": 3}}, "'metadata' must be an object whose values are strings"),
        ({**_chat(), "metadata": {f"k{n}": "v" for n in range(17)}}, "'metadata' has 17 fields, at most 16"),
        ({**_chat(), "metadata": {"k": "v" * 257}}, "'metadata': 'k' is too long"),
        ({**_chat(), "metadata": {"": "v"}}, "'metadata': '' is too long: names have 1 to 256"),
        ({**_chat(), "assertions": {"contains": "x"}}, "assertions: must be a list"),
        ({**_chat(), "assertions": [{"regex": "("}]}, "assertions[0].regex: is no pattern"),
        ({"prompt": "a", "completion": "b"}, "mixed in one file"),
        (b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}', "longer than 8 MiB"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_what_is_wrong(row: Any, said: str) -> None:
    assert said in _complaint(row)


def test_line_numbers_behind_an_overlong_line_are_right() -> None:
    rows: list[Any] = [_chat() for _ in range(12)]
    rows[2], rows[5] = b"x" * (MAX_LINE_BYTES * 2), b"{"
    with pytest.raises(DatasetError, match=r"line 3: longer than 8 MiB; line 6: not valid JSON"):
        list(read_examples(_jsonl(rows)))


def test_all_bad_lines_are_listed_up_to_a_limit() -> None:
    with pytest.raises(DatasetError) as caught:
        list(read_examples(_jsonl([b"{"] * 50)))
    assert caught.value.line == 1
    assert "line 20: " in caught.value.message
    assert "line 21: " not in caught.value.message
    assert caught.value.message.endswith("and 30 more lines")


@pytest.mark.parametrize("count", [0, 1, 9])
def test_fewer_than_ten_examples_are_refused_by_openais_code(count: int) -> None:
    with pytest.raises(DatasetError, match="at least 10 are needed") as caught:
        list(read_examples(_jsonl([_chat()] * count) if count else io.BytesIO()))
    assert (caught.value.code, caught.value.param) == ("invalid_n_examples", "training_file")


def test_a_validation_file_may_be_small_and_is_named_in_its_complaints() -> None:
    assert len(list(read_examples(_jsonl([_chat()]), minimum=1, param="validation_file"))) == 1
    with pytest.raises(DatasetError) as caught:
        list(read_examples(_jsonl([{}]), minimum=1, param="validation_file"))
    assert caught.value.param == "validation_file"


def test_examples_can_be_fetched_again_by_line() -> None:
    stream = _jsonl([_chat(f"q{i}") for i in range(1, 20)])
    found = examples_at(stream, {3, 17})
    assert [example.prompt[0] for example in found] == [Message("user", "q3"), Message("user", "q17")]
