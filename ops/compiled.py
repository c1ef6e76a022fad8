"""torch.compile, for functions that are given to it one by one."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(f: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """f, compiled when it is first called, once a process.

    Every shape gets code of its own, so that what a step computes does not depend on the shapes that came before it,
    and a resumed run repeats it, up to 64 of them: then torch goes on uncompiled, and warns. dynamic: for small code
    that meets new sizes all the time.
    """
    allow_variants()
    return torch.compile(f, dynamic=dynamic)


def allow_variants() -> None:
    """More than torch's 8 of one function, after which it would go on uncompiled: norms alone have one for each number
    of late outputs, each with and without gradients, and for every shape of rows."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
