"""Options as fields of a frozen dataclass, which define name, type, default, bounds and help once.

A class derives from :class:`Options` and declares its fields by :func:`option`. Values from Python
or a file are checked like those from the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from cifar_jax.errors import CifarJaxError, UsageError

REQUIRED: Any = dataclasses.MISSING

CHECKPOINT_HELP = "the network: a run's folder (its best step is used), or one checkpoints/<step>"


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    unit: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the value when the option is not given; ``None`` and 0 often mean "off".
            ``REQUIRED`` makes the option mandatory; such fields must come first.
        help: one sentence for ``--help``.
        group: the heading in ``--help``; None puts it among the options of every command.
        unit: what a number counts, e.g. ``"images"``.
        at_least, above, at_most, below: bounds of a number, checked by :class:`Options`.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "unit": unit,
            "bounds": {rule: limit for rule, limit in bounds.items() if limit is not None},
        },
    )


def option_of(config: type[Any], name: str, *, group: str) -> Any:
    """The option that ``config`` has under that name, in another ``group``."""
    field = config.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata={**field.metadata, "group": group})


def flag(name: str) -> str:
    """The option's spelling on the command line: ``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


_BOUND_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that are checked when they are created.

    Raises:
        UsageError: a field is of a wrong type, empty, or out of bounds.
    """

    def __post_init__(self) -> None:
        _check(self)


def _check(options: Options) -> None:
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not is_of_type(value, hints[field.name]):
            raise wrong_type(flag(field.name), value, hints[field.name])
        values = value if isinstance(value, tuple) else (value,)
        check_not_empty(flag(field.name), values)
        bounds = field.metadata["bounds"]
        for number in values:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            holds = all(_BOUND_HOLDS[rule](number, limit) for rule, limit in bounds.items())
            if (isinstance(number, float) and not math.isfinite(number)) or not holds:
                raise UsageError(
                    f"{flag(field.name)} {number} is out of range",
                    fix=f"give a number {describe_bounds(bounds) or 'that is finite'}",
                )


def check_not_empty(name: str, values: Sequence[Any]) -> None:
    """Raise ``UsageError`` if a string is empty, as from an unset shell variable.

    As a path it would mean the current directory, and elsewhere the default.
    """
    if "" in values:
        raise UsageError(f"{name} '' is empty", fix="give a value, or leave it out")


def describe_bounds(bounds: dict[str, float]) -> str:
    """The bounds of an option in words: "at least 0 and below 1"."""
    return " and ".join(f"{rule} {describe_number(limit)}" for rule, limit in bounds.items())


def describe_number(value: Any) -> str:
    """A float in short form; anything else as ``str``."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether ``value`` is valid for an option annotated with ``hint``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_type(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(is_of_type(item, arguments[0]) for item in value)
    if isinstance(value, bool):  # bool is a subclass of int
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def wrong_type(name: str, value: Any, hint: Any) -> CifarJaxError:
    """The ``UsageError`` for an option ``name`` with a ``value`` that ``hint`` does not allow."""
    kind = _describe_type(hint)
    cure = f"give {kind}"
    if typing.get_origin(hint) is typing.Literal:
        near = difflib.get_close_matches(str(value), typing.get_args(hint), n=1)
        cure = f"did you mean {near[0]}?" if near else "choose one of these"
    return UsageError(f"{name} {value!r} is not {kind}", fix=cure)


def _describe_type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe_type, arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else repr(arguments[0])
    if origin is tuple:
        return f"a tuple in which each is {_describe_type(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return names.get(hint, "None")
