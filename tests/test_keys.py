"""launch/keys.py: the reference lists every key that a run's TOML may have, explains each, and the README holds it."""
from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest

from stepladder.launch import cli, config, keys
from stepladder.launch.toml import Rule
from stepladder.model.registry import CHANNEL, TOKEN, find

ROOT = Path(__file__).resolve().parents[1]
SPECS = {kind: find(table, kind).Spec for table in (TOKEN, CHANNEL) for kind in table}
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def listed(name: str | None = None) -> dict[str, dict[str, list[str]]]:
    """{how a table is written: {key: its other cells}}, read off the Markdown."""
    found = {}
    for part in keys.markdown(name).split("**`")[1:]:
        written, rest = part.split("`** ")
        about, _, *rows = rest.strip().split("\n")
        assert about, written
        cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]
        assert all(len(row) == 4 for row in cells), written
        found[written] = {key.strip("`"): row for key, *row in cells}
    return found


def tables(hint: Any) -> Iterator[type]:
    """Every dataclass that a type names, at any depth."""
    if is_dataclass(hint):
        yield hint  # pyright: ignore[reportReturnType]
    for inner in [*get_args(hint), *(get_type_hints(hint).values() if is_dataclass(hint) else ())]:
        yield from tables(inner)


def test_the_readme_holds_the_generated_reference():
    held = re.search(r"<!-- stepladder keys -->\n(.*?)\n<!-- end -->", (ROOT / "README.md").read_text(), re.S)
    assert held is not None
    assert held[1].strip() == keys.markdown().strip()


def test_every_field_of_a_run_and_of_every_mixer_is_listed_and_explained():
    held = listed()
    shown = {section.cls: held[section.written] for section in keys.sections(config.Run)}
    assert set(shown) == {*tables(config.Run), *SPECS.values()} - {config.Run}
    for cls, rows in shown.items():
        hints = get_type_hints(cls)
        wanted = {f.name for f in fields(cls) if not [*tables(hints[f.name])]} - {"kind"}
        assert set(rows) == wanted, cls
        assert [key for key, (_, _, about) in rows.items() if not about] == [], f"{cls}: no comment beside these"
        assert not (cls.__doc__ or "").startswith(f"{cls.__name__}(") or cls in SPECS.values(), f"{cls}: no docstring"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_keys_of_the_examples_are_all_listed(path: Path):
    table, held = tomllib.loads(path.read_text()), listed()
    shown = {section.name: held[section.written] for section in keys.sections(config.Run)}
    for block in table["model"].pop("blocks").values():
        for mixer in (block["token"], block["channel"]):
            assert mixer.keys() - {"kind"} <= shown[mixer["kind"]].keys()
        assert block.keys() <= shown["model.blocks"].keys()
    for source in table["data"].pop("sources").values():
        assert source.keys() <= shown["data.sources"].keys()
    for section, values in table.items():
        assert values.keys() <= shown[section].keys()


@dataclass(frozen=True)
class Knobs:
    """Of a house that has none."""
    width: Annotated[int, Rule(lambda n: n > 0, "above 0")]    # of the door,
                                                               # in metres # or feet
    bare: float = 0.5
    name: str = "#"    # on the door

    def opened(self) -> bool:
        return True    # not a field's


def test_explanations_are_the_comments_beside_fields_and_below_them():
    assert keys.comments(Knobs) == {"width": "of the door, in metres # or feet", "bare": "", "name": "on the door"}


def test_values_and_defaults_are_those_of_the_types():
    train, optimizer = listed("train")["[train]"], listed("optimizer")["[optimizer]"]
    assert train["steps"][:2] == ["an integer, at least 1", "required"]
    assert train["dtype"][:2] == ['`"bf16"`, `"fp32"`, `"fp64"`', '`"bf16"`']
    assert train["deterministic"][:2] == ["true or false", "absent"]
    assert optimizer["betas"][:2] == ["a list of 2, each a finite number, at least 0 and below 1", "`[0.9, 0.95]`"]
    assert listed("model")["[model]"]["pattern"][0] == "a list, each a string"
    assert listed("model.blocks")["[model.blocks.NAME]"]["channel"][0] == "a mixer: swiglu, moe"


def test_a_section_comes_with_those_inside_it_and_a_mixer_alone():
    assert [*listed("data")] == ["[data]", "[data.sources.NAME]"]
    assert [*listed("mamba")] == ['token = { kind = "mamba", inner = ... }']


def test_an_unknown_name_is_refused_with_the_nearest(capsys):
    assert cli.main(["keys", "gateddelta"]) == 2
    assert ("gateddelta is no section of a run and no mixer, did you mean gated_delta?; there are model, model.blocks, "
            in capsys.readouterr().err)
    assert cli.main(["keys", "optimizer"]) == 0
    assert capsys.readouterr().out.startswith("**`[optimizer]`** AdamW")
