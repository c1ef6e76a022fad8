"""DeepSpeed's door. ZeRO holds the matrices, as FSDP2 does in shard.py, and owns their backward and their step.

Everything else stays as it is: norms, decays, biases and routers are hidden from DeepSpeed, stay fp32 and are summed
explicitly; one global norm clips both; and the update is torch's fused AdamW, which DeepSpeed calls on its flat pieces.
"""
from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stepladder.parallel.build import Parts
from stepladder.parallel.labels import span
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

MOMENTS = "exp_avg", "exp_avg_sq"
BUCKET = 50_000_000      # gradients summed at once; DeepSpeed would take ten times the memory
SUB_GROUP = 100_000_000  # weights updated at once where they come from a disk; memory holds four times as many numbers

Verdict = Callable[[Tensor], tuple[Tensor, Tensor]]      # norm of the matrices' gradient -> divisor, 1 for no update


def missing(layout: Parallel) -> str | None:
    """What this machine lacks, and what to do about it: the package, or a disk to offload to."""
    if find_spec("deepspeed") is None:
        return ('parallel.engine = "deepspeed" needs package deepspeed, which is not installed; '
                "pip install 'stepladder[deepspeed]', or drop the engine: FSDP2 needs nothing")
    return _no_disk(layout.nvme) if layout.nvme else None


def _no_disk(path: str) -> str | None:
    """Why nothing can be kept in a folder. It is not made: a mistyped one may be on another disk."""
    other = "or drop nvme: host memory does without"
    if not Path(path).is_dir():
        return (f'parallel.nvme = "{path}" is no folder of {gethostname()}; make it, on a local disk of every machine, '
                f"{other}")
    try:
        with TemporaryDirectory(prefix="stepladder-", dir=path):
            return None
    except OSError as error:
        return (f'parallel.nvme = "{path}" takes no files on {gethostname()} ({error.strerror}); name a folder on a '
                f"local disk of every machine, {other}")


def _deepspeed(mesh: Mesh) -> Any:
    """The package, without its chatter, and without the collectives in shared memory that it would compile for CPUs.

    ValueError where it cannot read disks.
    """
    deepspeed = import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by the names that older versions of torch know them by.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if mesh.device.type == "cpu":
        import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    builders = import_module("deepspeed.ops.op_builder")
    if mesh.layout.nvme and not builders.AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(f'parallel.nvme = "{mesh.layout.nvme}" needs libaio, which DeepSpeed does not find to compile '
                         "its reader with; apt install libaio-dev, or drop nvme: host memory does without")
    return deepspeed


class Zero:
    """The engine around this rank's one stage."""

    def __init__(self, parts: Parts, *, betas: tuple[float, float], eps: float, weight_decay: float):
        mesh, layout, stage = parts.mesh, parts.mesh.layout, parts.pipe.stages[0]
        self.parts, self.stage, self.held = parts, layout.zero_stage, dict[str, Tensor]()
        self.params = {name: stage.decoder.get_parameter(name) for name in parts.sharded}
        # ZeRO-1 sums bf16 gradients in another optimizer of DeepSpeed, which does not survive one that is not finite.
        # With weights in fp32, cast where they are used, it needs no more memory than that.
        half = stage.decoder.dtype == torch.bfloat16 and self.stage > 1
        self.folder = _folder(mesh)
        _hide(stage, self.params)
        self.deepspeed = _deepspeed(mesh)
        config = _config(mesh, half, max(p.numel() for p in self.params.values()), self.folder)
        exact = {f"model/{name}": self._cut(name, p.detach()) for name, p in self.params.items()} if half else {}
        if half:
            for p in self.params.values():
                p.data = p.data.to(torch.bfloat16)
        if self.stage == 3:                   # one by one: the device may not have room for all of them
            self.deepspeed.zero.Init(module=stage, config_dict_or_path=config)
        self.adam = _Adam(self.params.values(), betas, eps, weight_decay)
        self.engine = self.deepspeed.initialize(model=stage, optimizer=self.adam, config=config)[0]
        if self.stage < 3:                    # moments are found from the first step on; a resume wants them before
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self._put(exact)                      # DeepSpeed made its masters of weights that were rounded
        parts.pipe.forward, parts.pipe.backward = self.engine, self.engine.backward
        parts.pipe.at_close = self.close

    def step(self, lr: float, steps: Tensor, verdict: Verdict) -> Tensor:
        """Update as the verdict says; returns the norm of the summed gradient. steps: updates so far."""
        ranks = self.parts.mesh.dp            # DeepSpeed's sums are means over them

        def scale() -> tuple[Tensor, Tensor]:
            divisor, bad = verdict(self._norm())
            return divisor / ranks, bad
        self.adam.lr, self.adam.steps, self.adam.scale = lr, steps, scale
        self.engine.step()
        return self._norm()

    def _norm(self) -> Tensor:
        """Known when DeepSpeed begins to update. Infinite where it does not, the gradient not being finite."""
        mesh, mean = self.parts.mesh, self.engine.optimizer._global_grad_norm
        return torch.as_tensor(mean, dtype=torch.float32, device=mesh.device) * mesh.dp

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """What checkpoints hold of the matrices, in pieces on the host; loaded() takes over what was filled in."""
        tools = self.deepspeed.utils
        self.held = {}
        for name, p in self.params.items():
            self.held[f"model/{name}"] = self._cut(name, tools.safe_get_full_fp32_param(p))
            for key in MOMENTS:
                self.held[f"optimizer/{key}/{name}"] = self._cut(name, tools.safe_get_full_optimizer_state(p, key))
        return {key: self.parts.label(key.rpartition("/")[2], piece) for key, piece in self.held.items()}

    def loaded(self) -> None:
        self._put(self.held)
        self.held = {}

    def _cut(self, name: str, whole: Tensor) -> Tensor:
        mesh, dim = self.parts.mesh, self.parts.sharded[name]
        mine = span(whole.shape[dim], mesh.dp_rank, mesh.dp)
        return whole.narrow(dim, mine.start, len(mine)).to("cpu", copy=True)

    @torch.no_grad()
    def _put(self, pieces: dict[str, Tensor]) -> None:
        """Weights, the masters and those computed with, and moments."""
        tools = self.deepspeed.utils
        for key, piece in pieces.items():
            kind, _, name = key.rpartition("/")
            p, whole = self.params[name], self._join(name, piece)
            if kind == "model":
                tools.safe_set_full_fp32_param(p, whole)
                with self.deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                    p.data.copy_(whole)
            else:
                tools.safe_set_full_optimizer_state(p, whole, kind.rpartition("/")[2])

    def _join(self, name: str, piece: Tensor) -> Tensor:
        whole: Any = self.parts.label(name, piece.to(self.parts.mesh.device))
        return whole if self.parts.mesh.alone else whole.full_tensor()

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)      # each rank of a machine tries; the last one succeeds


class _Adam(torch.optim.Optimizer):
    """torch's fused AdamW on whatever DeepSpeed puts in front of it, with moments that appear when they are asked for.

    torch's own class keeps its count of steps as a tensor of the state, which DeepSpeed would swap out like a moment.
    """
    lr: float
    steps: Tensor
    scale: Callable[[], tuple[Tensor, Tensor]]

    def __init__(self, params: Iterable[nn.Parameter], betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {})
        self.state = _Moments()  # pyright: ignore[reportAttributeAccessIssue]
        self.betas, self.eps, self.decay = betas, eps, weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        divisor, bad = self.scale()
        for p in (p for group in self.param_groups for p in group["params"]):
            here = partial(torch.Tensor.to, device=p.device, copy=True)
            first, second = (self.state[p][key] for key in MOMENTS)
            assert p.grad is not None
            adamw([p], [p.grad], [first], [second], [], [here(self.steps)], grad_scale=here(divisor),
                  found_inf=here(bad), fused=True, amsgrad=False, maximize=False, lr=self.lr, beta1=self.betas[0],
                  beta2=self.betas[1], eps=self.eps, weight_decay=self.decay)


class _Moments(dict[Tensor, dict[str, Tensor]]):
    def __missing__(self, p: Tensor) -> dict[str, Tensor]:
        self[p] = {key: torch.zeros_like(p, requires_grad=False) for key in MOMENTS}
        return self[p]


def _hide(module: nn.Module, params: dict[str, nn.Parameter]) -> None:
    """Take every other parameter off the list that DeepSpeed reads; the module's code finds it as before."""
    ours = {id(p) for p in params.values()}
    for part in module.modules():
        for name, p in [*part.named_parameters(recurse=False)]:
            if id(p) not in ours:
                delattr(part, name)
                part.__dict__[name] = p


def _folder(mesh: Mesh) -> Path | None:
    """A new folder of this run on the local disk of each machine: DeepSpeed's file names are the same in every run."""
    if not mesh.layout.nvme:
        return None
    token = [token_hex(4)]
    if not mesh.alone:
        dist.broadcast_object_list(token)
    folder = Path(mesh.layout.nvme) / f"stepladder-{token[0]}"
    folder.mkdir(exist_ok=True)
    return folder


def _config(mesh: Mesh, half: bool, largest: int, folder: Path | None) -> dict[str, Any]:
    """largest: numbers in the largest matrix."""
    layout = mesh.layout
    zero: dict[str, Any] = {"stage": layout.zero_stage, "reduce_bucket_size": BUCKET,
                            "stage3_param_persistence_threshold": 0}
    if layout.offload:
        home = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
        if folder is not None:
            home |= {"device": "nvme", "nvme_path": str(folder)}
            zero["sub_group_size"] = SUB_GROUP
        zero["offload_optimizer"] = home
        if layout.zero_stage == 3:
            zero["offload_param"] = home | {"buffer_size": largest + (1 << 20)}
    return {"train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": False, "steps_per_print": None,
            "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": half}, "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": zero}
