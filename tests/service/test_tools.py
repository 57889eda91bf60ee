"""Tools through the official client, on real engines with random weights and on templates of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from service.api.schemas import Message
from service.api.tool_format import ToolFormat
from service.api.tools import Tool
from service.engine.base_model import BaseModel as Base
from service.engine.base_model import load_base_model
from tests.service.http_fixtures import Served
from tests.service.real_service import RealService, real_service, serve_real

__all__ = ["real_service"]

HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call>{...}</tool_call>:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    '{% if tools %}Answer {"name": function, "parameters": {...}}.'
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{% for call in m.tool_calls or [] %}{"name": "{{ call.function.name }}", '
    '"parameters": {{ call.function.arguments | tojson }}}{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES: Any = [{"role": "user", "content": "Weather?"}]


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Oslo", "Lima"]
    days: int = Field(ge=1, le=9)


class Add(BaseModel):
    """Adds."""

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)


SHAPES: dict[str, type[BaseModel]] = {"Weather": Weather, "Add": Add}
TOOLS: Any = [openai.pydantic_function_tool(shape) for shape in SHAPES.values()]
REQUIRED: Any = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
CALLED: Any = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "Add", "arguments": '{"a": 1, "b": 2}'}},
            {"id": "call_2", "type": "function", "function": {"name": "Add", "arguments": "cut {"}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "three"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "what?"}]},
]


def with_template(base: Base, template: str | None = None) -> Base:
    """The base with a tokenizer of its own."""
    tokenizer = deepcopy(base.tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    return replace(base, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base_model(str(tiny_llama_dir), quantization="none")


@pytest.fixture(scope="module", params=["silent", "hermes", "llama"])
def service(
    request: pytest.FixtureRequest, base: Base, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealService]:
    """A base whose template knows nothing of tools, one with Hermes's form, one with Llama's."""
    templates = {"silent": None, "hermes": HERMES_TEMPLATE, "llama": LLAMA_TEMPLATE}
    with serve_real(with_template(base, templates[request.param]), tmp_path_factory.mktemp("tools")) as running:
        yield running


def checked(name: str, arguments: str) -> BaseModel:
    return SHAPES[name].model_validate_json(arguments, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_a_call_that_must_come_always_parses(tuned: bool, service: RealService) -> None:
    model = service.tuned if tuned else "tiny"
    answer = service.client().chat.completions.create(
        model=model, messages=MESSAGES, n=2, seed=3, parallel_tool_calls=False, **REQUIRED
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.type == "function" and call.id.startswith("call_")
        assert checked(call.function.name, call.function.arguments)


@pytest.mark.slow
def test_several_calls_may_come_and_each_parses(service: RealService) -> None:
    counts = []
    for seed in range(2):
        answer = service.client().chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, **REQUIRED)
        calls = answer.choices[0].message.tool_calls or []
        complete = calls if answer.choices[0].finish_reason == "tool_calls" else calls[:-1]
        counts.append(
            len([checked(call.function.name, call.function.arguments) for call in complete if call.type == "function"])
        )
        assert len({call.id for call in calls}) == len(calls) > 0
    assert max(counts) >= 1


@pytest.mark.slow
def test_a_named_function_is_the_one_that_is_called(service: RealService) -> None:
    for seed in range(2):
        answer = service.client().chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            seed=seed,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "Add"}},
            max_tokens=200,
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "Add"
        assert checked("Add", call.function.arguments)


@pytest.mark.slow
def test_the_official_client_parses_arguments_into_their_models(service: RealService) -> None:
    answer = service.client().chat.completions.parse(
        model="tiny", messages=MESSAGES, seed=1, parallel_tool_calls=False, **REQUIRED
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather | Add)


@pytest.mark.slow
def test_a_streamed_call_begins_with_its_name_and_goes_on_with_its_arguments(service: RealService) -> None:
    stream = service.client().chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, parallel_tool_calls=False, stream=True, **REQUIRED
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", None)
    (first,), *rest = [chunk.delta.tool_calls for chunk in chunks if chunk.delta.tool_calls]
    assert first.index == 0 and (first.id or "").startswith("call_") and first.type == "function"
    assert first.function is not None and first.function.arguments == ""
    pieces = [call.function.arguments or "" for calls in rest for call in calls if call.function]
    assert len(pieces) > 1 and checked(first.function.name or "", "".join(pieces))
    assert all(call.id is None and call.index == 0 for calls in rest for call in calls)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


@pytest.mark.slow
def test_a_stream_adds_up_to_the_answer_that_is_there_at_once(service: RealService) -> None:
    same: Any = {"model": "tiny", "messages": MESSAGES, "seed": 5, "parallel_tool_calls": False, **REQUIRED}
    at_once = service.client().chat.completions.create(**same).choices[0]
    with service.client().chat.completions.stream(**same) as stream:
        streamed = stream.get_final_completion().choices[0]

    def calls(choice: Any) -> list[tuple[str, str]]:
        return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]

    assert calls(streamed) == calls(at_once) and streamed.finish_reason == at_once.finish_reason


def test_a_call_that_is_cut_says_length(service: RealService) -> None:
    for stream in (False, True):
        answer = service.client().chat.completions.create(
            model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=3, stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices  # type: ignore[union-attr]
        assert choices[-1].finish_reason == "length"


def test_an_answer_to_calls_reaches_the_prompt(service: RealService) -> None:
    answer = service.client().chat.completions.create(model="tiny", messages=CALLED, max_tokens=1)
    assert answer.usage is not None
    prompt = service.base.tokenizer.decode(
        service.base.render_chat(*ToolFormat.of(service.base).prompt([Message.model_validate(m) for m in CALLED], []))
    )
    assert all(said in prompt for said in ("Add", '"a"', "three", "what?", "cut {"))


def test_a_free_answer_stays_free_where_tools_may_be_called(service: RealService) -> None:
    answer = service.client().chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, seed=2, max_tokens=30
    )
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content
    none = service.client().chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=1
    )
    plain = service.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert none.usage == plain.usage, "where nothing may be called, nothing is told of tools"


@pytest.mark.slow
def test_json_or_a_call_where_both_may_come(service: RealService) -> None:
    seen = set()
    for seed in range(8):
        answer = service.client().chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            tools=TOOLS,
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["{a}", "<b>"]}}},
        )
        message = answer.choices[0].message
        seen.add(bool(message.tool_calls))
        if message.tool_calls:
            (call,) = message.tool_calls
            assert call.type == "function" and checked(call.function.name, call.function.arguments)
        else:
            assert json.loads(message.content or "") in ("{a}", "<b>")
    assert seen == {False, True}


@pytest.fixture(scope="module")
def tagged(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealService]:
    """Tags that are tokens of their own, in the vocabulary of the model: as in Qwen's tokenizer."""
    made = with_template(base, HERMES_TEMPLATE)
    backend = json.loads(made.tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = backend["model"]["vocab"], backend["model"]["merges"]
    for piece, tag in zip([p for p, t in vocabulary.items() if t >= 510], ["<tool_call>", "</tool_call>"], strict=True):
        number = vocabulary.pop(piece)
        merges[:] = [pair for pair in merges if "".join(pair) != piece]
        vocabulary[tag] = number
        backend["added_tokens"].append(
            {
                "id": number,
                "content": tag,
                "special": False,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
        )
    tokenizer = type(made.tokenizer)(
        tokenizer_object=type(made.tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=HERMES_TEMPLATE,
    )
    with serve_real(replace(made, tokenizer=tokenizer), tmp_path_factory.mktemp("tagged")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_may_come_parses_when_it_comes(stream: bool, tagged: RealService) -> None:
    begin = tagged.base.tokenizer.convert_tokens_to_ids("<tool_call>")
    assert ToolFormat.of(tagged.base).tags_are_tokens
    for seed in range(2):
        asked: Any = {
            "model": tagged.tuned,
            "messages": MESSAGES,
            "tools": TOOLS,
            "seed": seed,
            "parallel_tool_calls": False,
            "max_tokens": 200,
            "logit_bias": {str(begin): 100},
        }
        if stream:
            with tagged.client().chat.completions.stream(**asked) as events:
                choice: Any = events.get_final_completion().choices[0]
        else:
            choice = tagged.client().chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        (call,) = choice.message.tool_calls
        assert checked(call.function.name, call.function.arguments)


@pytest.mark.slow
def test_tags_that_are_tokens_bind_required_calls_too(tagged: RealService) -> None:
    answer = tagged.client().chat.completions.create(model="tiny", messages=MESSAGES, n=2, seed=3, **REQUIRED)
    for choice in answer.choices:
        assert choice.message.tool_calls and choice.message.tool_calls[0].type == "function"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "Sub"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (
            {
                "tools": [
                    *TOOLS,
                    {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}},
                ]
            },
            "tools[2].function.parameters",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "bogus"}}}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
        (
            {"messages": [*CALLED[:2], {"role": "tool", "tool_call_id": "call_9", "content": "x"}]},
            "messages[2].tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": CALLED[1]["tool_calls"]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_a_wrong_field_about_tools_is_named(body: dict[str, Any], param: str, real_service: RealService) -> None:
    answer = real_service.http().post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and param in error["message"]


def test_an_own_answer_with_calls_can_be_sent_back_as_the_client_dumps_it(real_service: RealService) -> None:
    client = real_service.client()
    said = (
        client.chat.completions.create(model="tiny", messages=MESSAGES, seed=1, parallel_tool_calls=False, **REQUIRED)
        .choices[0]
        .message
    )
    (call,) = said.tool_calls or []
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    for earlier in (said, said.model_dump()):
        conversation: Any = [*MESSAGES, earlier, result]
        assert client.chat.completions.create(model="tiny", messages=conversation, max_tokens=2).choices


def test_without_a_grammar_for_the_base_calls_are_still_read(served: Served) -> None:
    served.engine.pieces = ("So: ", "<tool", '_call>{"name": "Add", ', '"arguments": {"a": 1}}', "</tool_call>")
    tools: Any = [{"type": "function", "function": {"name": "Add"}}]
    answer = served.client().chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("So:", "tool_calls")
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls or [] if c.type == "function"] == [
        ("Add", '{"a": 1}')
    ]
    prompt = "".join(map(chr, served.engine.requests[0].prompt_token_ids))
    assert prompt.startswith("system:") and '{"name": "Add"}' in prompt
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(model="tiny", messages=MESSAGES, tools=tools, tool_choice="required")
    assert caught.value.code == "structured_outputs_unavailable"


def test_the_form_is_seen_in_the_template(base: Base) -> None:
    silent, hermes, llama = (
        ToolFormat.of(with_template(base, template)) for template in (None, HERMES_TEMPLATE, LLAMA_TEMPLATE)
    )
    assert (hermes.begin, hermes.arguments, hermes.renders_tools, hermes.renders_calls) == (
        "<tool_call>",
        "arguments",
        True,
        True,
    )
    assert (llama.begin, llama.arguments, llama.renders_tools, llama.renders_calls) == ("", "parameters", True, True)
    assert (silent.begin, silent.renders_tools, silent.renders_calls) == ("<tool_call>", False, False)


def test_a_template_that_ignores_tools_gets_them_in_its_system_message(base: Base) -> None:
    form = ToolFormat.of(base)
    messages = [Message.model_validate(m) for m in [{"role": "developer", "content": "Be brief."}, *CALLED]]
    written, tools = form.prompt(messages, [Tool.model_validate(tool) for tool in TOOLS])
    assert tools is None
    system, _, answer, results = written
    assert (
        system["role"] == "system"
        and system["content"].startswith("Be brief.\n\n")
        and '"Weather"' in system["content"]
    )
    assert answer["content"].startswith('<tool_call>\n{"name": "Add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n')
    assert results == {
        "role": "user",
        "content": "<tool_response>\nthree\n</tool_response>\n<tool_response>\nwhat?\n</tool_response>",
    }
