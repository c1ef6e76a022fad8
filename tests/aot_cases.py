"""The launches of every shape that a kernel family ships for; tests/aot.py compiles them. A family is a function."""
from __future__ import annotations
