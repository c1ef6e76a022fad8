"""Every mixer there is. Adding one: write its file, add its line; the tests pick it up from its TINY."""
from importlib import import_module
from types import ModuleType

TOKEN = {
    "attention": "stepladder.model.token.attention",
    "gla": "stepladder.model.token.gla",
    "gated_delta": "stepladder.model.token.gated_delta",
    "deltanet": "stepladder.model.token.deltanet",
    "mamba2": "stepladder.model.token.mamba2",
    "retention": "stepladder.model.token.retention",
    "mamba": "stepladder.model.token.mamba",
}
CHANNEL = {
    "swiglu": "stepladder.model.channel.swiglu",
    "moe": "stepladder.model.channel.moe",
}


def find(table: dict[str, str], kind: str) -> ModuleType:
    """The mixer's module: it has `Spec` (its knobs), `Mixer` (the class) and `TINY` (what the tests run)."""
    if kind not in table:
        raise ValueError(f"no mixer {kind!r}; there are {', '.join(table)}")
    return import_module(table[kind])
