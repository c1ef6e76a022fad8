"""stepladder generate: a run's newest sound checkpoint continues prompts. `sample` is the part for other programs."""
from __future__ import annotations

import argparse
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepladder.data import tokenizer
from stepladder.data.shards import Corpus
from stepladder.data.tokenizer import Tokenizer
from stepladder.launch import config
from stepladder.model.config import ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import Decoder, States, skeleton
from stepladder.model.leaf import Leaf
from stepladder.model.residual import Stream
from stepladder.ops.linear import promote
from stepladder.parallel.checkpoint import CheckpointError, Store, fill, meta, names, valid
from stepladder.parallel.checkpoint_folder import INDEX, read_index


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0         # logits are divided by this; 0: always the likeliest
    top_k: int = 0                   # choose among so many of the likeliest; 0: all
    top_p: float = 1.0               # of those, among the fewest likeliest that sum to top_p
    seed: int = 0                    # of the first row; row r has seed + r

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0 or more; 0 means always the likeliest token")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must not be negative; 0 means all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1; 1 means all tokens")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed = {self.seed} must be 0 or more and below 2^62")


@torch.inference_mode()
def sample(decoder: Decoder, prompts: Sequence[Sequence[int]], tokens: int, how: Sampling, *, stop: int | None = None,
           vocab: int | None = None, chunk: int = 512,
           on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Up to `tokens` more ids for each prompt. What a row gets depends on its own prompt and seed, not on the others.

    stop: a row ends before this id. vocab: only ids below it are chosen (the tokenizer may have fewer than the model).
    chunk: prompt tokens read at once. on_token: told (row, id) as soon as it is chosen.
    Raises ValueError for prompts that the model cannot read, or not that far, and where its logits are not finite.
    """
    check(decoder.cfg, prompts, tokens)
    device = next(decoder.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    states = decoder.begin(len(prompts), max(lengths) + tokens)
    logits = torch.cat([_prefill(decoder, torch.tensor([prompt], device=device), _row(states, r), chunk)
                        for r, prompt in enumerate(prompts)])                              # (B, V)
    luck = _luck(len(prompts), tokens, how.seed).to(device)                                # (B, tokens)
    read = torch.tensor(lengths, device=device)
    out: list[list[int]] = [[] for _ in prompts]
    live = set(range(len(prompts)))       # a row that has ended is computed on unread: the step keeps its shapes
    for n in range(tokens):
        ids = choose(logits[:, :vocab], luck[:, n], how)                                   # (B,)
        ids = ids.where(logits.isfinite().all(-1), -1)
        for row, token in enumerate(ids.tolist()):                                         # the one wait for the device
            if token < 0 and row in live:
                raise ValueError(f"the logits after {lengths[row] + n} tokens of prompt {row + 1} are not finite; "
                                 f"{_broken(decoder)}; choose an earlier checkpoint")
            if token == stop:
                live.discard(row)
            elif row in live:
                out[row].append(token)
                if on_token:
                    on_token(row, token)
        if not live or n + 1 == tokens:
            break
        logits = _next(decoder, ids.unsqueeze(1), read + n, states)
    return out


def choose(logits: Tensor, luck: Tensor, how: Sampling) -> Tensor:
    """logits (B, V), luck (B,) fp64 uniform in [0, 1) -> (B,) ids, by inverting the distribution function.

    Summed in fp64: fp32 merges the tail of a large vocabulary, and luck * mass could round up to mass.
    """
    if how.temperature == 0 or how.top_k == 1:
        return logits.argmax(-1)
    V = logits.shape[-1]
    best, ids = promote(logits).topk(min(how.top_k or V, V))                               # (B, k), likeliest first
    p = ((best - best[:, :1]).double() / how.temperature).exp()                            # unnormalised
    below = p.cumsum(-1)
    kept = below - p < how.top_p * below[:, -1:]
    mass = below.where(kept, 0).amax(-1, keepdim=True)
    at = (below <= luck.unsqueeze(-1) * mass).sum(-1, keepdim=True)
    return ids.gather(-1, at).squeeze(-1)


def check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Refuse what the model cannot continue by `tokens` tokens; prompts are counted from 1."""
    if tokens < 1:
        raise ValueError(f"tokens = {tokens} must be at least 1")
    if not prompts:
        raise ValueError("there is no prompt to continue; give --prompt TEXT or --prompt-file FILE")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; give it at least one token to go on from")
        for token in prompt:
            if not 0 <= token < cfg.vocab:
                raise ValueError(f"prompt {number} has token {token}, but the model's vocabulary ends at "
                                 f"{cfg.vocab - 1}; use the tokenizer it was trained with")
        for name in dict.fromkeys(cfg.pattern[:cfg.layers]):
            longest = getattr(cfg.blocks[name].token, "max_length", 0)
            if longest and len(prompt) + tokens > longest:
                raise ValueError(f"prompt {number} of {len(prompt)} tokens and {tokens} more exceed "
                                 f"model.blocks.{name}.token.max_length = {longest}; shorten it or ask for fewer")


def _next(decoder: Decoder, tokens: Tensor, read: Tensor, states: States) -> Tensor:
    """tokens (B, S) after `read` (B,) others -> logits (B, V) of what follows the last."""
    s = decoder(tokens, Context.after(read, tokens.shape[1]), states)
    return decoder.finish(Stream(s.read(0).h[:, -1:]))[0].squeeze(1)


def _broken(decoder: Decoder) -> str:
    broken = next((name for name, p in decoder.named_parameters() if not p.isfinite().all()), None)
    return f"neither is {broken}" if broken else "its weights are, and too large to compute with"


def _prefill(decoder: Decoder, prompt: Tensor, states: States, chunk: int) -> Tensor:
    """prompt (1, T) -> logits (1, V); attention then needs a mask of chunk x T, not T x T."""
    logits = prompt.new_empty(0)
    for read in range(0, prompt.shape[1], chunk):
        logits = _next(decoder, prompt[:, read:read + chunk], prompt.new_tensor([read]), states)
    return logits


def _row(states: States, row: int) -> States:
    """One row of a batch's states, sharing their memory: states are batch first and updated in place."""
    return {layer: type(state)._make(z[row:row + 1] for z in state) for layer, state in states.items()}


def _luck(rows: int, tokens: int, seed: int) -> Tensor:
    """(rows, tokens) uniform numbers, drawn on the CPU so that a seed means the same on every device."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return torch.stack([torch.rand(tokens, generator=gen, dtype=torch.float64) for gen in generators])


def restore(path: Path, cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The model of a checkpoint, to be computed with in `dtype`; weights are cast one by one as they are read.

    Training casts matrices where they are used and keeps routers and vectors in fp32, so this changes no logit.
    """
    decoder, index, found = skeleton(cfg), read_index(path), names(path)
    for module, leaf in decoder.named_modules():
        if not isinstance(leaf, Leaf):
            continue
        for name, decl in leaf.decls.items():
            key = f"model/{module}.{name}"
            whole = torch.empty(decl.shape, dtype=found[key][1] if key in found else torch.float32)
            fill(path, {key: whole}, index)
            exact = leaf.replicated or len(decl.shape) < 2
            value = whole.to(device, torch.promote_types(dtype, torch.float32) if exact else dtype)
            setattr(leaf, name, nn.Parameter(value, requires_grad=False))
    decoder.dtype = dtype
    return decoder


def find(source: Path) -> Path:
    """A checkpoint folder given as such, or the newest sound one of a run folder."""
    if (source / INDEX).is_file():
        if reason := valid(source):
            raise CheckpointError(f"{reason}; choose another checkpoint, or the run folder for the newest sound one")
        return source
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give the folder of a run, or a checkpoint")
    path = Store(source, note=_note).newest()
    if path is None:
        raise CheckpointError(f"{source} holds no checkpoint (looked for {source / 'checkpoints' / 'step-*'}); "
                              "give the folder of a run, or a checkpoint")
    return path


def run(args: argparse.Namespace) -> int:
    """The program: text to stdout, while it is made if there is one prompt; everything else to stderr."""
    how = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    device = _device(args.device)
    texts = _prompts(args.prompt, args.prompt_file)
    path = find(Path(args.run))
    about = meta(path)
    made = config.parse(tomllib.loads(about["config"]))
    words = _words(args.tokenizer, path, about, made.data)
    prompts = [words.encode(text).tolist() for text in texts]
    check(made.model, prompts, args.tokens)
    decoder = restore(path, made.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    began = time.perf_counter()
    go = partial(sample, decoder, prompts, args.tokens, how, stop=words.eot, vocab=words.vocab)
    if len(prompts) == 1:
        out = _aloud(go, words, prompts[0])
    else:
        out = go()
        for number, (prompt, more) in enumerate(zip(prompts, out, strict=True), 1):
            print(f"--- prompt {number}\n{words.decode([*prompt, *more])}\n")
    took, count = time.perf_counter() - began, sum(map(len, out))
    _note(f"step {about['step']}, {count:,} tokens in {took:.1f} s, {count / took:,.0f} a second on {device.type}")
    return 0


def _aloud(go: Callable[..., list[list[int]]], words: Tokenizer, prompt: Sequence[int]) -> list[list[int]]:
    """Print the one row while it is made; the prompt goes through the decoder too, which may strip its first blank."""
    stream = words.stream()
    print("".join(map(stream.push, prompt)), end="", flush=True)
    out = go(on_token=lambda row, token: print(stream.push(token), end="", flush=True))
    print(stream.end())
    return out


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _device(kind: str) -> torch.device:
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no GPU here; use --device cpu or auto")
    return torch.device("cuda" if kind != "cpu" and torch.cuda.is_available() else "cpu")


def _prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the flags, then one a line of the file."""
    texts = list(given)
    try:
        if file is not None:
            with open(file, encoding="utf-8") as lines:
                texts += [line.rstrip("\n") for line in lines]
        "".join(texts).encode()                        # a flag that was not UTF-8 arrives with surrogates in it
    except UnicodeError as error:
        raise ValueError(f"the prompts are not UTF-8 text ({error}); convert them") from None
    return texts


def _words(given: str | None, checkpoint: Path, about: dict[str, Any], data: config.Data) -> Tokenizer:
    """The tokenizer given or found; ValueError if the model was trained with another: it would speak noise."""
    words = tokenizer.load(given) if given else _tokenizer(checkpoint, data)
    if (trained := about.get("tokenizer")) and trained["hash"] != words.hash:
        what, way = (f"--tokenizer {given}", "drop the flag") if given else \
            ("the tokenizer found for it", "give that with --tokenizer")
        raise ValueError(f"{checkpoint} was trained with the tokenizer {trained['name']} {trained['hash'][:12]}, and "
                         f"{what} is {words.name} {words.hash[:12]}; {way}")
    return words


def _tokenizer(checkpoint: Path, data: config.Data) -> Tokenizer:
    """The copy in the run folder; for a checkpoint that has left its run, the one beside the run's shards."""
    run = checkpoint.parent.parent
    if (run / tokenizer.FILE).is_file():
        return tokenizer.load(run)
    name, source = next(iter(data.sources.items()))
    try:
        return Corpus(source.shards).tokenizer()
    except ValueError as error:
        raise ValueError(f"the run's tokenizer is not found beside data.sources.{name}.shards = {source.shards!r} "
                         f"({error}); give --tokenizer: a tokenizers JSON, a prepared folder or bytes") from None
