"""JSON: what was written is read back equal, and anything else is refused by the name of its place."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from tokencache_compile import CacheConfig, CachePlan, Schedule
from tokencache_compile.ir import CacheSpec, StepIO, TensorSpec
from tokencache_compile.json_data import from_json, to_json


@dataclass(frozen=True)
class Inner:
    dtype: torch.dtype
    ratio: float


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    many: tuple[Inner, ...]
    maybe: Inner | None
    table: dict[str, Inner]
    flag: bool
    anything: Any


INNER = Inner(torch.bfloat16, 0.5)
VALUE = Outer("x", "b", (1, "y"), (INNER, INNER), None, {"k": INNER}, True, {"free": [1, None, "z"]})

PLAN = CachePlan(CacheConfig(keep=((3, 0), (1, 2)), groups=(0, 1), schedule=Schedule(full=(0, 2))), 16, 3, 1, ((3, 0), (1, 2)))
SPECS = TensorSpec("x", (2, 3), torch.float16), TensorSpec("y", (), torch.int64)
IO = StepIO("P", (3, 0), ("x", "step"), SPECS[:1], SPECS[1:], 1, ("y",), ((0, 3),))


@pytest.mark.parametrize("value", [VALUE, INNER, PLAN, IO, CacheSpec("update", (1, 1, 3), torch.float8_e4m3fn, torch.float32, -1.0)])
def test_there_and_back(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    back = from_json(type(value), json.loads(text), "file")
    assert back == value and type(back) is type(value) and hash(str(back)) == hash(str(value))


def changed(path: str, value: Any) -> Any:
    """The JSON of :data:`VALUE` with one place changed; a dot goes down into objects and lists."""
    data: Any = json.loads(json.dumps(to_json(VALUE)))
    *way, last = path.split(".")
    place = data
    for key in way:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", 1, "f.name is 1, where str is needed"),
        ("name", None, "f.name is None, where str is needed"),
        ("kind", "c", "f.kind is 'c', where one of 'a', 'b' is needed"),
        ("kind", ["a"], "f.kind is ['a'], where one of 'a', 'b' is needed"),
        ("pair", [1], "f.pair is [1], where a list of 2 is needed"),
        ("pair", {"0": 1}, "where a list is needed"),
        ("pair.0", True, "f.pair[0] is True, where int is needed"),
        ("pair.0", 1.0, "f.pair[0] is 1.0, where int is needed"),
        ("many.1.dtype", "float17", "f.many[1].dtype is 'float17', where a dtype is needed"),
        ("many.1.dtype", "nn", "f.many[1].dtype is 'nn', where a dtype is needed"),
        ("many.1.dtype", 16, "f.many[1].dtype is 16, where a dtype is needed"),
        ("many.0.ratio", "0.5", "f.many[0].ratio is '0.5', where float is needed"),
        ("many.0.ratio", True, "f.many[0].ratio is True, where float is needed"),
        ("many.0", [], "f.many[0] is [], where an object is needed"),
        ("maybe", {}, "f.maybe has nothing for a Inner; exactly dtype, ratio are needed"),
        ("table", [], "f.table is [], where an object is needed"),
        ("table.k", None, "f.table.k is None, where an object is needed"),
        ("table.k.more", 1, "f.table.k has dtype, more, ratio for a Inner; exactly dtype, ratio are needed"),
        ("flag", 1, "f.flag is 1, where bool is needed"),
    ],
)
def test_what_is_no_such_value(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(Outer, changed(path, value), "f")


def test_what_a_class_refuses_is_named_by_its_place() -> None:
    data = to_json(PLAN)
    data["config"]["ratio"] = 2
    with pytest.raises(ValueError, match=r"^plan\.config: ratio=2 was asked for"):
        from_json(CachePlan, data, "plan")


def test_long_values_are_cut() -> None:
    with pytest.raises(ValueError) as raised:
        from_json(Outer, changed("name", list(range(100_000))), "f")
    assert len(str(raised.value)) < 200
