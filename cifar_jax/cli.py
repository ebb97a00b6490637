"""The command line of every command: the parser for its options, and how it runs and exits.

A command declares its options as a dataclass of :mod:`cifar_jax.options`, builds a parser with
:func:`make_parser`, and runs under :func:`run`, which turns errors into one line and an exit code.
Standard library only, so that a wrong option is reported before anything slow is imported.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import functools
import io
import operator
import os
import signal
import sys
import tempfile
import threading
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cifar_jax import __version__
from cifar_jax.errors import (
    CifarJaxError,
    ExitCode,
    ResourceError,
    Stopped,
    UsageError,
    first_line,
)
from cifar_jax.options import (
    REQUIRED,
    check_not_empty,
    describe_bounds,
    describe_number,
    flag,
    wrong_type,
)
from cifar_jax.system.allocator import keep_freed_memory
from cifar_jax.system.compilation_cache import use_compilation_cache

_DEBUG = "--debug"


def _parse_value(name: str, hint: Any, text: str) -> Any:
    """The value of option ``name``, annotated with type ``hint``, from its text.

    Raises:
        UsageError: the text is not a value of that type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        alternatives = [argument for argument in arguments if argument is not type(None)]
        if len(alternatives) == 1:
            return _parse_value(name, alternatives[0], text)
        for alternative in alternatives:
            with contextlib.suppress(CifarJaxError):
                return _parse_value(name, alternative, text)
        raise wrong_type(name, text, functools.reduce(operator.or_, alternatives))
    if origin is typing.Literal:
        if text not in arguments:
            raise wrong_type(name, text, hint)
        return text
    if origin is tuple:
        items = [item.strip() for item in text.removesuffix(",").split(",")]
        if arguments[0] is str:  # names, not paths: a ~ is a ~
            return tuple(items)
        return tuple(_parse_value(name, arguments[0], item) for item in items)
    if hint is int or hint is float:
        try:
            return hint(text)
        except ValueError:
            raise wrong_type(name, text, hint) from None
    return os.path.expanduser(text)  # a shell leaves the ~ of --checkpoint=~/run


def _initials(option: str) -> str:
    return "".join(word[:1] for word in option.split("-"))


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line and say how to fix them."""

    def parse_given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The options given in ``argv``, by field name; raises ``UsageError``."""
        namespace, unknown = self.parse_known_intermixed_args(argv)
        vars(namespace).pop("debug", None)  # for run() alone
        for action in self._actions:  # also those that are not fields of Options, such as --workdir
            value = getattr(namespace, action.dest, None)
            name = (*action.option_strings, action.metavar)[0]
            check_not_empty(str(name), value if isinstance(value, list) else [value])
        if unknown:
            name = unknown[0].split("=")[0]
            options = list(self._option_string_actions)
            short = [option for option in options if _initials(option) == name.strip("-")]  # --lr
            near = short or difflib.get_close_matches(name, options, n=1)
            cure = f"did you mean {near[0]}?" if near else "see --help for all options"
            kind = "option" if name.startswith("-") else "argument"
            raise UsageError(f"unknown {kind} {name}", fix=cure)
        return vars(namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "), fix="see --help")


def make_parser(config_type: type, *, prog: str, description: str) -> Parser:
    """A parser with an option for each field of ``config_type``, which omits options not given."""
    parser = Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=100
        ),
    )
    parser.add_argument("--version", action="version", version=f"cifar_jax {__version__}")
    parser.add_argument(_DEBUG, action="store_true", help="show where in the code an error arose")
    hints = typing.get_type_hints(config_type)
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for field in dataclasses.fields(config_type):
        metadata, hint = field.metadata, hints[field.name]
        heading = metadata["group"]
        group = groups.get(heading) or parser.add_argument_group(heading)
        groups[heading] = group
        help_text = metadata["help"].replace("%", "%%") + _describe_default(field)
        if hint is bool:
            group.add_argument(
                flag(field.name), action=argparse.BooleanOptionalAction, help=help_text
            )
        else:
            group.add_argument(
                flag(field.name),
                type=functools.partial(_parse_value, flag(field.name), hint),
                metavar=_metavar(hint),
                required=field.default is REQUIRED,
                help=help_text,
            )
    return parser


def _metavar(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(argument) for argument in arguments if argument is not type(None))
    if origin is typing.Literal:
        return "|".join(arguments)
    if origin is tuple:
        one = _metavar(arguments[0])
        return f"{one},{one},..."
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _describe_default(field: dataclasses.Field[Any]) -> str:
    default, unit = field.default, field.metadata["unit"]
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif default is None or default is REQUIRED or default == ():
        shown = ""
    else:
        shown = describe_number(default)
    bounds = describe_bounds(field.metadata["bounds"])
    parts = [unit or "", bounds, f"default {shown}" if shown else ""]
    described = "; ".join(part for part in parts if part)
    return f" [{described}]" if described else ""


def run(main: Callable[[], None], *, beside_training: bool = False) -> NoReturn:
    """Run a command and exit: its errors become one line on stderr and an exit code.

    Args:
        beside_training: whether it may share a GPU with a training run, and so allocates memory
            there only as needed. JAX would take three quarters at once.
    """
    status = int(ExitCode.BUG)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`: the next file would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115

    def leave() -> None:
        # C++ threads may still be running, and would crash an interpreter that is being torn down.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # before JAX and others register theirs, so that theirs run first
    status = _run(main, beside_training)
    sys.exit(status)


def _run(main: Callable[[], None], beside_training: bool = False) -> int:
    def on_sigterm(signum: int, frame: types.FrameType | None) -> None:
        raise Stopped(signum, "nothing more was saved")

    signal.signal(signal.SIGTERM, on_sigterm)
    sys.unraisablehook = _on_ignored
    for stream in (sys.stdout, sys.stderr):  # file names need not fit the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if beside_training:
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        keep_freed_memory()
        use_compilation_cache()
        try:
            main()
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # argparse's, after --help
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return ExitCode.BUG
        return end.code or ExitCode.OK
    except BrokenPipeError:  # as with `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("cifar_jax: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except Stopped as stop:
        print(f"cifar_jax: {stop}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if _DEBUG in sys.argv:
            traceback.print_exc()
        told = error if isinstance(error, CifarJaxError) else _told(error)
        print(f"cifar_jax: error: {told}", file=sys.stderr)
        return told.exit_code
    return ExitCode.OK


def _on_ignored(ignored: sys.UnraisableHookArgs) -> None:
    """Handle an exception that Python cannot raise, as in a destructor or a C++ thread.

    A signal's must not be lost, so the signal is sent again. Others are shown only with
    ``--debug``, such as those of TensorStore's writes that finish after the one that failed.
    """
    error = ignored.exc_value
    if isinstance(error, Stopped | KeyboardInterrupt):
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        again = threading.Timer(0.1, os.kill, (os.getpid(), signum))
        again.daemon = True
        again.start()
    elif _DEBUG in sys.argv:
        sys.__unraisablehook__(ignored)


# Messages of CUDA's libraries when they cannot start, mostly for lack of memory.
_GPU_IS_TAKEN = (
    "DNN library initialization failed",
    "blasCreate",
    "solverDnCreate",
    "CUDA_ERROR_OUT_OF_MEMORY",
)


def _told(error: Exception) -> CifarJaxError:
    """The message for an exception that was not handled where it arose."""
    reason = first_line(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
        return ResourceError(
            f"out of memory: {reason}",
            fix="use a smaller --batch-size if the command has one, in training --accumulate 2, 4, "
            "...; or close another program that holds memory",
        )
    if any(words in str(error) for words in _GPU_IS_TAKEN):
        return ResourceError(
            f"the GPU cannot be used: {reason}",
            fix="another process may hold the GPU: stop it, or set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 for both; if there is none, check the driver",
        )
    if isinstance(error, OSError):
        return ResourceError(
            reason,
            fix="free space or fix permissions there, or choose another path",
        )
    with tempfile.NamedTemporaryFile(
        "w", prefix="cifar_jax-", suffix=".txt", delete=False, errors="backslashreplace"
    ) as file:
        traceback.print_exception(error, file=file)
    return CifarJaxError(
        f"a bug of this program: {type(error).__name__}: {reason}",
        fix=f"report it, with the traceback in {file.name}",
    )
