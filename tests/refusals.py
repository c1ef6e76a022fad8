"""What tests of bad input share: a folder with a run and its shards, and programs that must refuse in one sentence."""
from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from corpora import corpus, texts

from stepladder.launch import cli, world

RUN = """
[model]
vocab = 288           # the tokenizer has 257
width = 16
layers = 4
pattern = ["gla", "full"]
[model.blocks.gla]
token = { kind = "gla", heads = 2, key_dim = 8, value_dim = 8 }
channel = { kind = "moe", experts = 4, top_k = 2, hidden = 16, ahead = 1 }
lag = [1, 1]
[model.blocks.full]
token = { kind = "attention", heads = 4, kv_heads = 2, head_dim = 8, max_length = 64 }
channel = { kind = "swiglu", hidden = 16 }
[data]
seq = 32
batch_tokens = 256
rows = 2
lanes = 4
[data.sources.small]
shards = "shards"
[train]
steps = 2
device = "cpu"
dtype = "fp32"
[optimizer]
lr = 1e-3
"""
GLA, FULL = "model.blocks.gla", "model.blocks.full"
FOLDER = Path("runs/run")    # where `stepladder train run.toml` writes, under tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("bad input") / "shards", texts(120))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with run.toml and shards; what a run changes in its process is put back after it."""
    shutil.copytree(prepared, tmp_path / "shards")
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]):
    """Runs `stepladder train run.toml ARGS` -> what it printed."""
    def run(*args: str, code: int = 0) -> str:
        assert cli.main(["train", "run.toml", *args]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return out
    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Runs `stepladder ARGS`, which must fail properly -> (its sentence, what it printed before)."""
    def run(*args: str, prefix: str = "stepladder: ") -> tuple[str, str]:
        assert cli.main(args) == 2
        out, err = capsys.readouterr()
        assert err.startswith(prefix)
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err.removeprefix(prefix).rstrip("\n"), out
    return run


@pytest.fixture
def before_work(refused, monkeypatch: pytest.MonkeyPatch):
    """As `refused`, for `train run.toml ARGS`: no step is made and nothing is saved. Gives the sentence."""
    def run(*args: str, ranks: int = 1) -> str:
        if ranks > 1:
            for name, value in (("RANK", 0), ("WORLD_SIZE", ranks), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 1)):
                monkeypatch.setenv(name, str(value))
            monkeypatch.setattr(world.World, "connect", lambda *_: pytest.fail("the ranks would have been joined"))
        sentence, out = refused("train", "run.toml", *args)
        assert " loss " not in out
        assert not list(FOLDER.glob("checkpoints/*"))
        return sentence
    return run
