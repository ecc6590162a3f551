from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.config.parser import load_config, parse_config
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: float = 1.0
    flag: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    triple: tuple[float, float, float] = (1.0, 2.0, 3.0)
    many: tuple[str, ...] = ()
    names: dict[str, int] = field(default_factory=dict)
    choice: Literal["a", "b"] | None = None
    either: int | tuple[int, ...] = 0
    inner: Inner = field(default_factory=Inner)


def test_values_are_converted_to_their_types() -> None:
    """Lists become tuples, whole numbers become floats for float fields, null becomes None."""
    content = {
        "count": 3,
        "triple": [1, 2.5, 3],
        "many": ["x"],
        "names": {"y": 2},
        "choice": None,
        "either": [1, 2],
        "inner": {"number": 2, "flag": True},
    }
    read = parse_config(Outer, content, "top")
    assert read == Outer(
        count=3,
        triple=(1.0, 2.5, 3.0),
        many=("x",),
        names={"y": 2},
        either=(1, 2),
        inner=Inner(number=2.0, flag=True),
    )
    assert isinstance(read.triple[0], float)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"triple": [1, 2, "1e-3"]}, "expected float, got '1e-3' at top.triple[2]"),
        ({"triple": [1, 2]}, "expected 3 items, got [1, 2] at top.triple"),
        ({"triple": 1}, "expected a list, got 1 at top.triple"),
        ({"many": "abc"}, "expected a list, got 'abc' at top.many"),
        ({"count": 1.5}, "expected int, got 1.5 at top.count"),
        ({"count": True}, "expected int, got True at top.count"),
        ({"count": None}, "expected int, got None at top.count"),
        ({"inner": {"flag": 1}}, "expected bool, got 1 at top.inner.flag"),
        ({"inner": {"number": "fast"}}, "expected float, got 'fast' at top.inner.number"),
        ({"inner": []}, "expected a mapping, got [] at top.inner"),
        ({"names": [1]}, "expected a mapping, got [1] at top.names"),
        ({"names": {"y": "2"}}, "expected int, got '2' at top.names.y"),
        ({"names": {1: 2}}, "expected str, got 1 at top.names"),
        ({"either": "c"}, "expected int, got 'c' at top.either"),
        ({"choice": "c"}, "expected one of 'a', 'b', got 'c' at top.choice"),
        ({"cuont": 1}, "unknown key top.cuont; did you mean count?"),
        (
            {"zzz": 1},
            "unknown key top.zzz; "
            "expected one of count, triple, many, names, choice, either, inner",
        ),
        ({"inner": {"fleg": True}}, "unknown key top.inner.fleg; did you mean flag?"),
    ],
)
def test_the_message_holds_the_path_to_a_wrong_value(change: dict[Any, Any], says: str) -> None:
    """Next to what was expected and what was found."""
    with pytest.raises(ConfigError) as raised:
        parse_config(Outer, {"count": 1} | change, "top")
    assert str(raised.value) == says


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{}", "top.count is missing"),
        (b"", "expected a mapping, got None at top"),
        (b"a: [1", "is not YAML"),
        (b"count: 1\ncount: 2", "count is given twice"),
        (b"\xff\xfe\x00\x01", "is not YAML"),
        (None, "cannot be read (No such file or directory); expected the YAML file of the top"),
    ],
)
def test_the_message_holds_the_path_of_a_wrong_file(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    """The message begins with it."""
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load_config(Outer, path, "top")
    assert str(raised.value).startswith(f"{path}: ")
    assert says in str(raised.value)
