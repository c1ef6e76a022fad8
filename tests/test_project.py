"""The rules of the house, read off the source: who imports whom, where outside packages enter, how long things are."""
from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks

from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.parallel import support

ROOT = Path(__file__).resolve().parents[1]
IMPORTED_BY = os.getpid()
MAY_IMPORT = {      # layer -> the layers it knows, and the packages from outside
    "launch": ({"launch", "parallel", "model", "data", "ops"}, {"torch", "numpy", "matplotlib"}),
    "parallel": ({"parallel", "model", "ops"}, {"torch"}),
    "model": ({"model", "ops"}, {"torch"}),
    "ops": ({"ops", "kernels"}, {"torch"}),
    "kernels": ({"kernels"}, {"torch"}),
    "data": ({"data"}, {"torch", "numpy"}),
}
DOORS = {           # package -> where it enters
    "triton": r"kernels/.*", "megablocks": r"ops/experts\.py", "webdataset": r"data/shards\.py",
    "fsspec": r"data/fetch\.py",
    "tokenizers": r"data/tokenizer\.py", "tiktoken": r"data/tokenizer\.py", "zstandard": r"data/documents\.py",
    "deepspeed": r"parallel/(zero|offload)\.py", "mpi4py": r"launch/world\.py",
    "torch.utils.tensorboard": r"launch/log\.py", "tensorboard": r"launch/log\.py",
    "torch.distributed": r"(parallel|launch)/.*",      # never in model, ops, kernels, data: they know no ranks
}
ENVIRONMENT = {     # file -> why it may touch os.environ
    "launch/world.py": "the one reader",
    "launch/cli.py": "names the rank in an error, and leaves word of a refusal, without importing torch",
    "launch/train.py": "sets cuBLAS's workspace; reads nothing",
    "launch/demo.py": "hands it on to the programs it starts",
}
NAMELESS = {"utils", "util", "helpers", "common", "base", "core", "misc", "__init__"}
FUNCTION_LINES, FILE_LINES = 80, 400


def faults(path: str, source: str) -> list[str]:
    """What a file of the six folders does against the rules."""
    tree, layer = ast.parse(source), path.split("/")[0]
    found = [*imports(path, layer, tree)]
    if NAMELESS & set(Path(path).with_suffix("").parts):
        found.append("is named after nothing")
    if source.count("\n") > FILE_LINES:
        found.append(f"has more than {FILE_LINES} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES:
            found.append(f"{node.name} has {FUNCTION_LINES} lines or more")
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if text in ("os.environ", "os.getenv", "os.putenv") and path not in ENVIRONMENT:
            found.append("touches the environment")
        if text == "torch.distributed" and not re.fullmatch(DOORS["torch.distributed"], path):
            found.append("torch.distributed has another door")
        if isinstance(node, ast.Constant) and (m := re.fullmatch(r"stepladder\.(\w+)\.[\w.]+", str(node.value))):
            found += [f"{layer} names {m[1]}"] * (m[1] not in MAY_IMPORT[layer][0])
    return found


def imports(path: str, layer: str, tree: ast.Module) -> Iterator[str]:
    layers, packages = MAY_IMPORT[layer]
    for names in imported(tree):
        if names[0] == "os.environ" or "os.environ" in names or "os.getenv" in names:
            yield "imports the environment by name"
        for door, where in DOORS.items():
            if any(f"{name}.".startswith(f"{door}.") for name in names) and not re.fullmatch(where, path):
                yield f"{door} has another door"
        top, *rest = names[-1].split(".")
        if top in MAY_IMPORT or not top:
            yield f"imports {top or 'relatively'} bare"
        elif top == "stepladder":
            if not rest or rest[0] not in layers:
                yield f"{layer} imports {''.join(rest[:1]) or 'everything'}"
        elif top not in packages | DOORS.keys() | sys.stdlib_module_names:
            yield f"{top} is not for {layer}"


def imported(tree: ast.Module) -> Iterator[list[str]]:
    """For each import the names it may mean: `from a import b` is a or a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ([alias.name] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ([module, f"{module}.{alias.name}"] for alias in node.names)


def sources() -> list[Path]:
    return [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).rglob("*.py"))]


def test_no_file_breaks_a_rule_of_the_house():
    read = {str(path.relative_to(ROOT)): path.read_text() for path in sources()}
    assert len(read) > 40
    assert {path: bad for path, text in read.items() if (bad := faults(path, text))} == {}


@pytest.mark.parametrize(("path", "source", "fault"), [
    ("model/x.py", "from stepladder.parallel.mesh import Mesh", "model imports parallel"),
    ("model/x.py", "from stepladder import parallel", "model imports parallel"),
    ("model/x.py", "import stepladder.data.loader", "model imports data"),
    ("data/x.py", "def f():\n    from stepladder.model import leaf", "data imports model"),
    ("launch/x.py", "from stepladder.kernels import gla", "launch imports kernels"),
    ("model/x.py", "import_module('stepladder.launch.world')", "model names launch"),
    ("model/x.py", "import torch.distributed as dist", "torch.distributed has another door"),
    ("ops/x.py", "from torch import distributed", "torch.distributed has another door"),
    ("data/x.py", "import torch\ntorch.distributed.get_rank()", "torch.distributed has another door"),
    ("ops/x.py", "import triton.language as tl", "triton has another door"),
    ("data/loader.py", "from webdataset import gopen", "webdataset has another door"),
    ("data/shards.py", "import fsspec", "fsspec has another door"),
    ("launch/train.py", "from torch.utils import tensorboard", "torch.utils.tensorboard has another door"),
    ("launch/train.py", "import deepspeed", "deepspeed has another door"),
    ("parallel/mesh.py", "from mpi4py import MPI", "mpi4py has another door"),
    ("model/channel/moe.py", "import megablocks", "megablocks has another door"),
    ("model/x.py", "import numpy as np", "numpy is not for model"),
    ("launch/x.py", "import pandas", "pandas is not for launch"),
    ("launch/x.py", "from model import leaf", "imports model bare"),
    ("data/x.py", "import kernels", "imports kernels bare"),
    ("data/x.py", "from . import pack", "imports relatively bare"),
    ("parallel/x.py", "import os\nos.environ['RANK']", "touches the environment"),
    ("data/x.py", "import os\nos.getenv('HOME')", "touches the environment"),
    ("data/x.py", "from os import environ", "imports the environment by name"),
    ("model/utils.py", "", "is named after nothing"),
    ("data/__init__.py", "", "is named after nothing"),
    ("launch/x.py", "def f():\n" + "    pass\n" * 80, "f has 80 lines or more"),
    ("launch/x.py", "#\n" * 401, "has more than 400 lines"),
])
def test_every_rule_catches_what_breaks_it(path: str, source: str, fault: str):
    assert fault in faults(path, source)


def test_files_that_may_touch_the_environment_still_do():
    for path in ENVIRONMENT:
        assert "os.environ" in (ROOT / path).read_text(), path


def test_tests_import_the_package_by_its_name():
    for path in (ROOT / "tests").rglob("*.py"):
        tops = {name.split(".")[0] for names in imported(ast.parse(path.read_text())) for name in names}
        assert not tops & set(MAY_IMPORT), path


def test_the_import_name_is_links_to_the_six_folders_and_to_the_jobs():
    links = {path.name: path.resolve() for path in (ROOT / ".src/stepladder").iterdir()}
    assert links == {name: ROOT / name for name in (*MAY_IMPORT, "slurm")}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-data"] == {"stepladder.slurm": ["*.sbatch"]}      # a wheel's stepladder slurm needs them


@pytest.mark.parametrize(("table", "folder"), [(TOKEN, "token"), (CHANNEL, "channel")])
def test_every_mixer_file_is_registered_and_says_what_the_tests_run(table: dict[str, str], folder: str):
    files = {f"stepladder.model.{folder}.{path.stem}" for path in (ROOT / "model" / folder).glob("*.py")}
    assert set(table.values()) == files
    for kind in table:
        mixer = find(table, kind)
        assert mixer.TINY, kind
        assert all(isinstance(spec, mixer.Spec) and spec.kind == kind for spec in mixer.TINY), kind


def test_the_readme_holds_the_generated_support_table():
    held = re.search(r"<!-- stepladder support -->\n(.*?)\n<!-- end -->", (ROOT / "README.md").read_text(), re.S)
    assert held is not None
    assert held[1].strip() == support.markdown().strip()


def test_the_commands_and_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    named = {target for line in re.findall(r"^    make ([a-z -]+)", text, re.M) for target in line.split()}
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for path in re.findall(r"`((?:launch|parallel|model|ops|kernels|data|tests|examples|slurm)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_the_demo_takes_as_long_wherever_it_is_named():
    for path in ("README.md", "Makefile", "examples/demo.toml"):
        assert "some three minutes" in (ROOT / path).read_text(), path


def test_megablocks_is_no_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(p for extra in project["optional-dependencies"].values() for p in extra)]
    assert not [p for p in wanted if p.startswith(("megablocks", "grouped"))]


def lacking(rank: int, n: int, wanted: set[str]) -> tuple[bool, set[str]]:
    return os.getpid() == IMPORTED_BY, wanted - sys.modules.keys()


def test_ranks_are_forked_from_a_server_that_has_imported_their_tests() -> None:
    """A third of a second of every rank."""
    assert ranks.run(1, lacking, {*ranks.PRELOADED}) == [(False, set())]
