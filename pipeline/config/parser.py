"""A YAML file as a frozen dataclass, or an error that names the key.

Spec and run are read through here, so that `1e-3` (a string to PyYAML) or a misspelt key stops at once with the path to it.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pipeline.errors import ConfigError
from pipeline.types import PathOrStr

T = TypeVar("T")


def load_config(kind: type[T], path: PathOrStr, where: str) -> T:
    """The dataclass `kind` that a YAML file holds.

    Args:
        kind: a frozen dataclass; nested dataclasses, tuples, dicts, Literals and unions with None are understood.
        path: the YAML file.
        where: the name that errors give the top level, such as "spec".

    Raises:
        ConfigError: the file is missing, is not YAML, or a value does not fit; the message has the path to the key.
    """
    content = read_yaml(path, where)
    try:
        return parse_config(kind, content, where)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_yaml(path: PathOrStr, where: str) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: the file is missing, is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected the YAML file of the {where}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own rule, which PyYAML does not keep: the keys of a mapping are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def parse_config(kind: type[T], value: Any, where: str) -> T:
    """`value` (what YAML gave) as `kind`.

    Raises:
        ConfigError: `expected float, got '1e-3' at spec.spacing[2]`.
    """
    result: T = _convert(kind, value, where)
    return result


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise _mismatch("one of " + ", ".join(map(repr, arguments)), value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch("a mapping", value, where)
        return {
            _convert(arguments[0], k, where): _convert(arguments[1], v, f"{where}.{k}")
            for k, v in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) is (kind is bool) and isinstance(value, kind):
        return value
    raise _mismatch(kind.__name__, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch("a mapping", value, where)
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = (
                f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"
            )
            raise ConfigError(f"unknown key {where}.{key}{hint}")
    hints = get_type_hints(kind)
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}.{name} is missing")
    return kind(
        **{key: _convert(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    )


def _union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in arguments:
        if kind is type(None) and value is None:
            return None
    reasons = []
    for kind in (kind for kind in arguments if kind is not type(None)):
        try:
            return _convert(kind, value, where)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(reasons[0])


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _mismatch("a list", value, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise _mismatch(f"{len(arguments)} items", value, where)
    return tuple(
        _convert(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _mismatch(expected: str, value: Any, where: str) -> ConfigError:
    return ConfigError(f"expected {expected}, got {value!r} at {where}")
