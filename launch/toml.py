"""TOML tables to dataclasses and back. The types of the fields are the rules, and every complaint is a sentence."""
from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

MEANT = {"fp16": "bf16", "float16": "bf16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


class ConfigError(ValueError):
    """A run that cannot start; the message names the key, both values and the way out."""


class Rule(NamedTuple):
    """Which values a field may have: `Annotated[int, Rule(lambda n: n >= 1, "at least 1")]`."""
    holds: Callable[[Any], bool]
    text: str


Reader = Callable[[Any, str], Any]
Readers = Mapping[tuple[type, str], Reader]


def read(cls: type, table: Any, path: str, readers: Readers = types.MappingProxyType({})) -> Any:
    """Build the dataclass `cls` of a table found at `path`; `readers[cls, field]` reads what a type cannot say.

    Unknown, missing, ill-typed and out-of-range keys raise ConfigError.
    """
    if not isinstance(table, dict):
        raise wrong_type(path, table, "a table")
    known = {f.name: f for f in fields(cls)}
    for key in table:
        if key not in known:
            raise ConfigError(_unknown(key, known, path))
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for name, declared in known.items():
        where = f"{path}.{name}" if path else name
        if name in table:
            reader = readers.get((cls, name))
            values[name] = reader(table[name], where) if reader else _value(hints[name], table[name], where, readers)
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise ConfigError(f"{where} is missing" if path else f"section [{where}] is missing")
    try:
        return cls(**values)
    except ValueError as error:    # a rule of the class itself, which does not know its path
        text = str(error)
        raise ConfigError(text if text.startswith(f"{path}.") else f"{path}: {text}") from None


def _value(kind: Any, value: Any, path: str, readers: Readers) -> Any:
    """`value` as the type `kind` wants it, checked."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value, rule = _value(args[0], value, path, readers), args[1]
        if not rule.holds(value):
            raise ConfigError(f"{path} = {text(value)} is out of range; it must be {rule.text}")
        return value
    if origin is Literal:
        if value not in args:
            one_of = ", ".join(map(text, args))
            raise ConfigError(f"{path} = {text(value)} is not one of {one_of}{nearest(value, args)}")
        return value
    if origin in (Union, types.UnionType):    # X | None: TOML has no null, an absent key is the None
        return _value(next(a for a in args if a is not type(None)), value, path, readers)
    if origin is tuple:
        return _list(args, value, path, readers)
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong_type(path, value, "a table")
        return {name: _value(args[1], v, f"{path}.{name}", readers) for name, v in value.items()}
    return read(kind, value, path, readers) if is_dataclass(kind) else _scalar(kind, value, path)    # pyright: ignore


def _list(args: tuple[Any, ...], value: Any, path: str, readers: Readers) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise wrong_type(path, value, "a list")
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise ConfigError(f"{path} = {text(value)} has {len(value)} values; it must have {len(args)}")
    return tuple(_value(arg, v, f"{path}[{i}]", readers) for i, (arg, v) in enumerate(zip(args, value, strict=True)))


SCALARS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and value is True and path.endswith(".ahead"):      # one block ahead is what pre-gating means
        value = 1
    if type(value) is not kind or (kind is float and not math.isfinite(value)):    # type(): isinstance(True, int) holds
        raise wrong_type(path, value, SCALARS[kind])
    return value


def wrong_type(path: str, value: Any, expected: str) -> ConfigError:
    """The error for a value of another type than `expected` says in words."""
    hint = f", like {int(value)}" if type(value) is float and value.is_integer() else ""
    return ConfigError(f"{path} = {text(value)} must be {expected}{hint}")


def _unknown(key: str, known: Iterable[str], path: str) -> str:
    what, whole = (f"key {path}.{key}", f"[{path}]") if path else (f"section [{key}]", "a run")
    return f"unknown {what}{nearest(key, known)}; {whole} knows {', '.join(known)}"


def nearest(name: Any, known: Iterable[Any]) -> str:
    """A question about the known name that means the same, or that `name` resembles, or nothing."""
    names = list(map(str, known))
    near = [x for x in names if x == MEANT.get(str(name))] or get_close_matches(str(name), names, n=1)
    return f", did you mean {near[0]}?" if near else ""


def flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A run's tables as one, with keys as on the command line: {"data": {"seq": 8}} -> {"data.seq": 8}"""
    out = {}
    for name, value in table.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return out


def differing(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys that have not one value in all tables, and what each has; strings without quotes."""
    said = [{key: value if isinstance(value, str) else text(value) for key, value in table.items()} for table in tables]
    rows = {key: [table.get(key, "absent") for table in said] for table in said for key in table}
    return [(key, values) for key, values in rows.items() if len(set(values)) > 1]


def write(table: dict[str, Any]) -> str:
    """A nested dict as TOML text, one [section] a level; keys whose value is None are left out."""
    return "\n".join(_sections(table, ""))


def _sections(table: dict[str, Any], path: str) -> list[str]:
    inner = {name: v for name, v in table.items() if isinstance(v, dict)}
    lines = [f"{_key(name)} = {text(v)}" for name, v in table.items() if name not in inner and v is not None]
    if path and (lines or not inner):
        lines = [f"[{path}]", *lines, ""]
    for name, v in inner.items():
        lines += _sections(v, f"{path}.{_key(name)}" if path else _key(name))
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else text(name)


def text(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):    # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(k)} = {text(v)}' for k, v in value.items())}}}"
    return str(value)    # str(float) is repr(float): it reads back to the same bits
