"""`rootstock serve`: one option for each setting, made from `service.config`, where they are documented."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional, get_args

import typer
from pydantic.fields import FieldInfo

from service.cli.client import REFUSED, USAGE, fail
from service.config import Settings, SettingsError, load_settings

ENVIRONMENT_ONLY = frozenset({"admin_key"})
"""A secret on the command line is readable by every user of the machine."""


def _serve(**options: Any) -> None:
    """Serve the base, its adapters and fine-tuning until SIGTERM or Ctrl-C.

    Every option is also an environment variable: --ops-port is ROOTSTOCK_OPS_PORT. The admin key is one only:
    ROOTSTOCK_ADMIN_KEY; unset, a key is made and printed once.
    """
    try:
        settings = load_settings({name: value for name, value in options.items() if value is not None})
        _run(settings)
    except SettingsError as error:
        fail(str(error), USAGE)


def _run(settings: Settings) -> None:
    from service.stop_signals import end_at_once_on_signal

    end_at_once_on_signal()
    from adapters.errors import AdapterError  # the service's imports take seconds; client commands go without
    from service.engine.errors import EngineError
    from service.errors import ServiceError
    from service.log import configure_logging
    from service.server import serve

    configure_logging(settings.log_level, settings.log_format)
    try:
        serve(settings)
    except (AdapterError, EngineError, ServiceError) as error:
        fail(error.message, REFUSED)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    is_switch = field.annotation is bool
    default = "" if field.default is None else f" [default: {_shown(field.default)}]"
    option = typer.Option(
        None,
        f"{flag}/--no-{name.replace('_', '-')}" if is_switch else flag,
        help=f"{field.description}{default}".replace("[", r"\["),
        show_default=False,
        metavar=None if is_switch else _metavar(field.annotation),
    )
    # Values stay text: `load_settings` parses flags and environment alike, with one kind of complaint.
    annotation = Optional[bool] if is_switch else Optional[str]  # noqa: UP045 -- evaluated by typer
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _shown(default: object) -> str:
    return default.human_readable() if hasattr(default, "human_readable") else str(default)


def _metavar(annotation: Any) -> str:
    choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
    if choices:
        return "|".join(choices)
    for kind in (annotation, *get_args(annotation)):
        if kind in (int, float):
            return "NUMBER"
    return "TEXT"


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    parameters = [
        _parameter(name, field) for name, field in Settings.model_fields.items() if name not in ENVIRONMENT_ONLY
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


serve = _with_options(_serve)
