"""Where there is no GPU, triton interprets kernels; it reads this once, when kernels are imported."""
from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
