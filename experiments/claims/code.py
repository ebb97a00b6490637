"""Which code a number comes from: a measurement, and all that it uses of this folder."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any


def code_of(measure: Callable[..., Any]) -> str:
    """What tells this code of a measurement from another.

    Comments, docstrings, judges, other claims' measurements and ``cifar_jax`` itself are left out.
    """
    found: dict[str, str] = {}
    _reach(measure.__module__, measure.__name__, found)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def _reach(module: str, name: str, found: dict[str, str]) -> None:
    """Add to ``found`` how ``name`` is defined in ``module``, and what that names, and so on."""
    where = f"{module}.{name}"
    if where in found:
        return
    for node in _definitions(module).get(name, ()):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            _reach(node.module, name, found)
            continue
        found[where] = found.get(where, "") + ast.unparse(node)
        for inner in _names(node):
            _reach(module, inner, found)


@functools.cache
def _definitions(module: str) -> dict[str, list[ast.stmt]]:
    """What defines each name of ``module``, imports from this folder included; no docstrings."""
    definitions: dict[str, list[ast.stmt]] = defaultdict(list)
    for node in ast.parse(inspect.getsource(importlib.import_module(module))).body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
                inner.body = inner.body[1:] or [ast.Pass()]
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                definitions[name].append(node)
            case ast.ImportFrom(module=str(source)) if source.startswith("claims."):
                for alias in node.names:
                    definitions[alias.name].append(node)
            case ast.Assign(targets=targets):
                for target in targets:
                    for name in _names(target):
                        definitions[name].append(node)
            case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
                for name in _names(target):
                    definitions[name].append(node)
    return definitions


def _names(node: ast.AST) -> list[str]:
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
