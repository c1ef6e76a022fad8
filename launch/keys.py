"""stepladder keys: every key of a run, read off the dataclasses: their types, and the comments beside their fields."""
from __future__ import annotations

import argparse
import ast
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from stepladder.launch.config import Run
from stepladder.launch.toml import SCALARS, ConfigError, nearest, text
from stepladder.model.config import BlockConfig
from stepladder.model.registry import CHANNEL, TOKEN, find

MIXERS = {"token": TOKEN, "channel": CHANNEL}      # by the field of a block, whose type does not say


class Section(NamedTuple):
    """A table of a run's TOML."""
    name: str              # "data.sources", or a mixer's kind
    written: str           # as it stands in the file
    about: str
    cls: type


def run(args: argparse.Namespace) -> None:
    """The program: `stepladder keys [NAME]`."""
    print(markdown(args.name))


def markdown(name: str | None = None) -> str:
    """The reference of the README, or its part about a section, with those inside it, or a mixer."""
    known = list(sections(Run))
    chosen = [s for s in known if name is None or f"{s.name}.".startswith(f"{name}.")]
    if not chosen:
        names = [s.name for s in known]
        raise ConfigError(f"{name} is no section of a run and no mixer{nearest(name, names)}; there are "
                          f"{', '.join(names)}")
    return "\n\n".join(f"**`{s.written}`** {s.about}\n\n{_table(s.cls)}" for s in chosen)


def sections(cls: type, path: str = "") -> Iterator[Section]:
    """The tables inside one, depth first, and after a block's the mixers that it may have."""
    for key, hint in get_type_hints(cls).items():
        inner = _inner(hint)
        if inner is not None:
            written = f"[{path}{key}{'.NAME' if get_origin(hint) is dict else ''}]"
            yield Section(path + key, written, inner.__doc__ or "", inner)
            yield from sections(inner, f"{path}{key}.")
    if cls is BlockConfig:
        for key, table in MIXERS.items():
            for kind in table:
                mixer = find(table, kind)
                wanted = "".join(f", {f.name} = ..." for f in fields(mixer.Spec) if f.default is MISSING)
                about = (mixer.__doc__ or "").splitlines()[0]
                yield Section(kind, f'{key} = {{ kind = "{kind}"{wanted} }}', about, mixer.Spec)


def _inner(hint: Any) -> type | None:
    """The dataclass of a field that is a table, or has tables by names of the user's."""
    hint = get_args(hint)[1] if get_origin(hint) is dict else hint
    return hint if is_dataclass(hint) else None  # pyright: ignore[reportReturnType]


def _table(cls: type) -> str:
    hints, said = get_type_hints(cls, include_extras=True), comments(cls)
    rows = [("key", "value", "default", "what it is")]
    for field in fields(cls):
        key, hint = field.name, hints[field.name]
        if key != "kind" and _inner(hint) is None:
            value = f"a mixer: {', '.join(MIXERS[key])}" if hint is Any else values(hint)
            rows.append((f"`{key}`", value, _default(field), said[key]))
    a, b, c = (max(len(row[i]) for row in rows) for i in range(3))
    head, *lines = [f"| {key:{a}} | {value:{b}} | {default:{c}} | {about} |" for key, value, default, about in rows]
    return "\n".join([head, "|---|---|---|---|", *lines])


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "required"
    return "absent" if field.default is None else f"`{text(field.default)}`"


def values(hint: Any) -> str:
    """What a field of this type may be, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{values(args[0])}, {args[1].text}"
    if origin is Literal:
        return ", ".join(f"`{text(arg)}`" for arg in args)
    if origin in (Union, types.UnionType):      # X | None: absent
        return values(args[0])
    if origin is tuple:
        return f"a list{'' if args[-1] is Ellipsis else f' of {len(args)}'}, each {values(args[0])}"
    return SCALARS.get(hint, "a table")


def comments(cls: type) -> dict[str, str]:
    """What stands beside each field of a dataclass, and in lines of its own below it, in the source."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found, ends = {}, [*(node.lineno for node in tree.body[1:]), len(source)]
    for node, end in zip(tree.body, ends, strict=True):
        if isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = " ".join(said[n] for n in range(node.lineno, end) if n in said)
    return found
