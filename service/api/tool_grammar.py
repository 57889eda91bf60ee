"""Which grammar a chat request with tools is decoded under. Knows the compiler, not what happens with the answer."""

from __future__ import annotations

from fastapi.concurrency import run_in_threadpool

from service.api.schemas import ChatRequest
from service.api.structured import format_source
from service.api.tool_format import ToolFormat
from service.api.tool_parser import CallSyntax
from service.engine import grammar_source
from service.engine.errors import GrammarsUnavailableError
from service.engine.grammar import AnyGrammar, Grammar
from service.engine.grammar_compiler import TenantGrammars
from service.engine.triggered_grammar import TriggeredGrammar


async def tool_grammar(
    body: ChatRequest, tool_format: ToolFormat, grammars: TenantGrammars
) -> tuple[AnyGrammar | None, CallSyntax]:
    """The grammar, and how the answer's calls are read.

    A call that must come is bound from the first token on; one that may come, from its opening tag on. Without tags,
    or without grammars for this base, calls that may come are only read, and strict ones checked.

    Raises:
        GrammarError: a schema cannot be kept to; `param` names it.
    """
    strict = await _argument_grammars(body, grammars)
    functions, content = body.callable_functions, None
    if not body.must_call and (content := await run_in_threadpool(format_source, body.response_format, None)):
        await grammars.compile(content)  # on its own, so that a complaint names it
    grammar: AnyGrammar | None = None
    if body.must_call or content is not None:
        source = await run_in_threadpool(tool_format.calls_grammar, functions, body.only_one_call, content)
        grammar = await grammars.compile(source)
    elif tool_format.begin:
        grammar = await _triggered(body, tool_format, grammars)
    checked = {} if grammar is not None else strict
    names = {function.name: checked.get(function.name) for _, function in functions}
    return grammar, CallSyntax(tool_format, names, body.must_call)


async def _argument_grammars(body: ChatRequest, grammars: TenantGrammars) -> dict[str, Grammar]:
    """Of each function whose arguments are bound; compiled one by one, so that a complaint names its schema."""
    found = {}
    for index, function in body.callable_functions:
        if function.strict or body.must_call:
            param = f"tools[{index}].function.parameters"
            source = await run_in_threadpool(grammar_source.json_schema, function.schema_of_arguments, param)
            found[function.name] = await grammars.compile(source)
    return found


async def _triggered(body: ChatRequest, tool_format: ToolFormat, grammars: TenantGrammars) -> AnyGrammar | None:
    try:
        call = await grammars.compile(await run_in_threadpool(tool_format.call_grammar, body.callable_functions))
    except GrammarsUnavailableError:
        return None
    return TriggeredGrammar(call, tool_format.begin, 1 if body.only_one_call else None)
