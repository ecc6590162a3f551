"""Reading YAML files into frozen dataclasses, with errors that name the path of the wrong key.

A misspelt key, or `1e-3` (which PyYAML reads as a string), is an error when the file is read, such
as `expected float, got '1e-3' at spec.spacing[2]`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pipeline.errors import ConfigError
from pipeline.types import PathOrStr

T = TypeVar("T")
NO_RENAMES: Mapping[str, str] = types.MappingProxyType({})


def load_config(
    kind: type[T], path: PathOrStr, where: str, renamed: Mapping[str, str] = NO_RENAMES
) -> T:
    """Return the content of a YAML file as a dataclass.

    Args:
        kind: type of the result, a dataclass; its fields may be dataclasses, tuples, dicts,
            Literals and unions.
        path: the YAML file.
        where: name of the top level, such as "spec", with which key paths in error messages begin.
        renamed: old name → present name of keys, for files of earlier versions.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a wrong key or value; the message
            has the path of the key.
    """
    content = read_yaml(path, where)
    try:
        return parse_config(kind, rename_keys(content, renamed, where), where)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_yaml(path: PathOrStr, content_name: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: the YAML file.
        content_name: what the file contains, such as "spec"; used in error messages.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key twice.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); "
            f"expected the YAML file of the {content_name}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that raises an error for repeated keys, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def rename_keys(content: Any, renamed: Mapping[str, str], where: str) -> Any:
    """Return the content of a YAML file with old keys of the top level renamed.

    Args:
        content: content of the file; anything but a mapping is returned unchanged.
        renamed: old name → present name of keys.
        where: name of the top level, with which key paths in error messages begin.

    Raises:
        ConfigError: a key is present under both names.
    """
    if not isinstance(content, dict):
        return content
    present = {}
    for key, value in content.items():
        name = renamed.get(key, key)
        if name != key and name in content:
            raise ConfigError(
                f"{where}.{key} and {where}.{name} are the old and the present name of one key: "
                f"keep {where}.{name} only"
            )
        present[name] = value
    return present


def parse_config(kind: type[T], value: Any, where: str) -> T:
    """Return a value from a YAML file, converted to the type `kind`.

    Lists become tuples and whole numbers become floats where the type requires it; any other value
    of a wrong type is an error.

    Args:
        kind: type of the result: a dataclass, or any type that its fields may have.
        value: value as PyYAML returns it.
        where: path of the value in the file, such as "spec.network", for error messages.

    Raises:
        ConfigError: the value does not have the type, for example
            `expected float, got '1e-3' at spec.spacing[2]`.
    """
    result: T = _parse(kind, value, where)
    return result


def _parse(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _parse_union(arguments, value, where)
    if origin is Literal:
        return _parse_literal(arguments, value, where)
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is dict:
        return _parse_dict(arguments, value, where)
    return _parse_scalar(kind, value, where)


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch("a mapping", value, where)
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key {where}.{key}; {_suggestion(str(key), list(known))}")
    for name, field in known.items():
        if name not in value and _is_required(field):
            raise ConfigError(f"{where}.{name} is missing")
    types_of = get_type_hints(kind)
    return kind(**{key: _parse(types_of[key], v, f"{where}.{key}") for key, v in value.items()})


def _suggestion(key: str, known: list[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _parse_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _parse(kind, value, where)
        except ConfigError as error:
            errors.append(error)
    # the first type of a union is the usual one: its error is the most helpful
    raise errors[0]


def _parse_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices:
        raise _mismatch("one of " + ", ".join(map(repr, choices)), value, where)
    return value


def _parse_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _mismatch("a list", value, where)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise _mismatch(f"{len(kinds)} items", value, where)
    return tuple(
        _parse(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _parse_dict(kinds: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _mismatch("a mapping", value, where)
    key_kind, value_kind = kinds
    return {
        _parse(key_kind, key, where): _parse(value_kind, item, f"{where}.{key}")
        for key, item in value.items()
    }


def _parse_scalar(kind: Any, value: Any, where: str) -> Any:
    # in Python True is an int, in a configuration it is not
    if isinstance(value, bool) != (kind is bool):
        raise _mismatch(kind.__name__, value, where)
    if kind is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, kind):
        raise _mismatch(kind.__name__, value, where)
    return value


def _mismatch(expected: str, value: Any, where: str) -> ConfigError:
    return ConfigError(f"expected {expected}, got {value!r} at {where}")
