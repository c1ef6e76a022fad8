"""Recurrent mixers against implementations that nobody here wrote; runs where transformers is installed."""
from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.func import functional_call

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import blocks
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

pytest.importorskip("transformers")
D = tiny.WIDTH


def theirs(name: str) -> tuple[Any, Any]:
    """Modules with the configuration and with the layers of one of their models."""
    return (import_module(f"transformers.models.{name}.configuration_{name}"),
            import_module(f"transformers.models.{name}.modeling_{name}"))


def ours(spec: Any) -> Any:
    """A mixer whose every weight is random, those that begin as constants too."""
    cfg = ModelConfig(vocab=8, width=D, layers=1, blocks={"b": BlockConfig(spec, tiny.CHANNELS["swiglu0"])},
                      pattern=("b",), std=0.2)
    mixer = blocks(build(cfg, Mesh(Parallel(), torch.device("cpu")), seed=3).decoder)[0].token
    gen = torch.Generator().manual_seed(1)
    for p in mixer.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=gen))
    return mixer


def qwen3_next() -> tuple[Any, nn.Module, dict[str, Tensor]]:
    c, m = theirs("qwen3_next")
    spec = replace(tiny.TOKENS["gated_delta1"], negative=False)
    K, V, G, r = spec.key_dim, spec.value_dim, spec.heads, spec.value_heads // spec.heads
    w = ours(spec)
    config = c.Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=G, linear_num_value_heads=r * G, linear_key_head_dim=K,
        linear_value_head_dim=V, linear_conv_kernel_dim=spec.taps, rms_norm_eps=1e-6)
    by_head = lambda *parts: torch.cat([z.view(G, -1, D) for z in parts], 1).flatten(0, 1)
    return w, m.Qwen3NextGatedDeltaNet(config, 0), {
        "in_proj_qkvz.weight": by_head(w.wq, w.wk, w.wv, w.out_gate), "in_proj_ba.weight": by_head(w.wb, w.wa),
        "conv1d.weight": torch.cat([w.conv_q, w.conv_k, w.conv_v]).unsqueeze(1), "dt_bias": w.dt_bias,
        "A_log": w.A_log, "norm.weight": w.norm, "out_proj.weight": w.wo}


def mamba2(which: str) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    c, m = theirs("mamba2")
    spec = tiny.TOKENS[which]
    w = ours(spec)
    config = c.Mamba2Config(
        hidden_size=D, num_heads=spec.heads, head_dim=spec.value_dim, expand=spec.heads * spec.value_dim // D,
        state_size=spec.key_dim, n_groups=spec.groups, conv_kernel=spec.taps, layer_norm_epsilon=1e-6, chunk_size=16)
    return w, m.Mamba2Mixer(config, 0), {
        "in_proj.weight": torch.cat([w.wz, w.wx, w.wB, w.wC, w.wdt]), "dt_bias": w.dt_bias, "A_log": w.A_log,
        "conv1d.weight": torch.cat([w.conv_x, w.conv_B, w.conv_C]).unsqueeze(1),
        "conv1d.bias": torch.cat([w.bias_x, w.bias_B, w.bias_C]), "D": w.skip, "norm.weight": w.norm,
        "out_proj.weight": w.wo}


def mamba() -> tuple[Any, nn.Module, dict[str, Tensor]]:
    c, m = theirs("mamba")
    spec = tiny.TOKENS["mamba0"]
    w = ours(spec)
    config = c.MambaConfig(hidden_size=D, expand=spec.inner // D, state_size=spec.state, conv_kernel=spec.taps,
                           time_step_rank=w.wdt.shape[1], use_mambapy=False)
    return w, m.MambaMixer(config, 0), {
        "in_proj.weight": torch.cat([w.wx, w.wz]), "conv1d.weight": w.conv_x.unsqueeze(1), "conv1d.bias": w.bias_x,
        "x_proj.weight": w.select, "dt_proj.weight": w.wdt, "dt_proj.bias": w.dt_bias,
        "A_log": w.A_log.view(-1, spec.state), "D": w.skip, "out_proj.weight": w.wo}


@pytest.mark.parametrize("pair", [qwen3_next, lambda: mamba2("mamba20"), lambda: mamba2("mamba21"), mamba],
                         ids=["Qwen3-Next", "Mamba-2", "Mamba-2 in groups", "Mamba"])
def test_a_mixer_equals_that_of_transformers(pair: Any) -> None:
    """Output, and gradients of the input and of every weight; in single precision, to which theirs casts."""
    mixer, reference, weights = pair()
    names = dict(reference.named_parameters())
    assert {name: p.shape for name, p in names.items()} == {name: w.shape for name, w in weights.items()}
    gen = torch.Generator().manual_seed(2)
    x, way = (torch.randn(2, 70, D, generator=gen) for _ in range(2))
    x.requires_grad_()
    found: list[list[Tensor]] = []
    for y in (mixer(x, Context.plain(2, 70)), functional_call(reference, weights, (x,))):
        found.append([y, *torch.autograd.grad((y * way).sum(), [x, *mixer.parameters()], retain_graph=True)])
    for what, got, want in zip(("output", "input", *mixer.decls), *found, strict=True):
        assert float((got - want).detach().norm() / want.detach().norm()) < 1e-5, what
