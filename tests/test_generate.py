"""Generating: the recurrent form says what the parallel form says, and a row's text is its own."""
from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import corpora
import pytest
import tiny
import torch

from stepladder.data.tokenizer import Tokenizer
from stepladder.launch import cli
from stepladder.launch.generate import Sampling, _next, choose, find, restore, sample
from stepladder.model.decoder import Decoder
from stepladder.model.leaf import Leaf
from stepladder.parallel.build import build
from stepladder.parallel.checkpoint_read import names
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [35], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 43]]
CELLS = [*product(tiny.CROSSED, ["swiglu0", "moe0", "moe1"], ["standard", "ladder"]), ("every", "between", "mixed"),
         *((token, "moe1", "ladder") for token in tiny.TOKENS if token not in tiny.CROSSED)]


def model(token: str = "every", channel: str = "between", lag: str = "mixed", layers: int = 4) -> Decoder:
    cfg = tiny.config(token, channel, lag, layers)
    return build(cfg, Mesh(Parallel(), CPU), seed=5, dtype=torch.float64).decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return model()


@torch.inference_mode()
def likeliest(decoder: Decoder, tokens: list[int]) -> list[int]:
    """The parallel form's choice after each token."""
    s = decoder(torch.tensor([tokens]), tiny.plain(1, len(tokens)))
    return decoder.finish(s)[0][0].argmax(-1).tolist()


@pytest.mark.parametrize(("token", "channel", "lag"), CELLS)
def test_greedy_is_the_argmax_of_the_parallel_form(token, channel, lag):
    decoder = model(token, channel, lag)
    for prompt, more in zip(PROMPTS, sample(decoder, PROMPTS, 12, GREEDY, chunk=4), strict=True):
        assert len(more) == 12
        assert more == likeliest(decoder, prompt + more)[len(prompt) - 1:-1]


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 512])
def test_any_prefill_chunks_give_the_same(decoder, chunk):
    how = Sampling(temperature=1.5, seed=3)
    assert sample(decoder, PROMPTS, 20, how, chunk=chunk) == sample(decoder, PROMPTS, 20, how, chunk=7)


def test_a_row_does_not_depend_on_the_others(decoder):
    together = sample(decoder, PROMPTS, 20, Sampling(seed=3))
    assert together == [sample(decoder, [p], 20, Sampling(seed=3 + row))[0] for row, p in enumerate(PROMPTS)]


def test_rows_with_the_same_prompt_differ(decoder):
    first, second = sample(decoder, [[1, 2], [1, 2]], 20, Sampling(temperature=2.0))
    assert first != second


def test_every_token_is_drawn_anew(decoder):
    [more] = sample(decoder, PROMPTS[:1], 40, Sampling(temperature=1e9, top_k=2))        # the best or the second, 1 : 1
    best = likeliest(decoder, PROMPTS[0] + more)[len(PROMPTS[0]) - 1:-1]
    assert 10 < sum(a == b for a, b in zip(more, best, strict=True)) < 30


def test_a_seed_repeats_its_text_and_fewer_tokens_are_its_beginning(decoder):
    more = sample(decoder, PROMPTS, 30, Sampling(temperature=2.0, seed=7))
    assert more == sample(decoder, PROMPTS, 30, Sampling(temperature=2.0, seed=7))
    assert more != sample(decoder, PROMPTS, 30, Sampling(temperature=2.0, seed=8))
    assert [row[:11] for row in more] == sample(decoder, PROMPTS, 11, Sampling(temperature=2.0, seed=7))


@pytest.mark.parametrize("how", [Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-300)])
def test_the_narrowest_choice_is_greedy(decoder, how):
    assert sample(decoder, PROMPTS, 20, how) == sample(decoder, PROMPTS, 20, GREEDY)


def test_a_row_ends_before_the_stop_token_and_the_others_go_on(decoder):
    free = sample(decoder, PROMPTS, 20, GREEDY)
    stop = free[0][6]
    heard: list[list[int]] = [[], [], []]
    ended = sample(decoder, PROMPTS, 20, GREEDY, stop=stop, on_token=lambda row, token: heard[row].append(token))
    assert ended == [row[:row.index(stop)] if stop in row else row for row in free]
    assert heard == ended
    assert len(ended[0]) < 20
    assert max(map(len, ended)) == 20


def test_spare_ids_of_the_model_are_never_chosen(decoder):
    rows = sample(decoder, [[1]] * 8, 40, Sampling(temperature=50.0), vocab=9)
    assert {token for row in rows for token in row} == set(range(9))


def drawn(probs: list[float], how: Sampling, draws: int = 20_000) -> torch.Tensor:
    """Share of each token among many draws; what all logits have in common (1000 here) must not matter."""
    logits = (torch.tensor(probs).log() + 1000).expand(draws, -1)
    luck = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return choose(logits, luck, how).bincount(minlength=len(probs)) / draws


PROBS = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(("how", "expected"), [
    (Sampling(), PROBS),
    (Sampling(temperature=0.5), [p * p for p in PROBS]),
    (Sampling(top_k=2), [0, 0.4, 0, 0.3, 0]),
    (Sampling(top_k=99), PROBS),
    (Sampling(top_p=0.69), [0, 0.4, 0, 0.3, 0]),               # the fewest that reach top_p
    (Sampling(top_p=0.71), [0, 0.4, 0, 0.3, 0.15]),
    (Sampling(top_k=3, top_p=0.8), [0, 0.4, 0, 0.3, 0]),       # 0.7 of the 0.85 that top_k leaves
    (Sampling(temperature=0.5, top_p=0.9), [0, 0.16, 0, 0.09, 0.0225]),     # temperature first: 0.25 of 0.285
])  # fmt: skip
def test_draws_have_the_distribution_asked_for(how, expected):
    share, whole = drawn(PROBS, how), torch.tensor(expected) / sum(expected)
    assert (share[whole == 0] == 0).all()
    assert (share - whole).abs().max() < 0.015


def test_the_ends_of_luck_stay_inside_the_set():
    luck = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor(PROBS).log().expand(2, -1)
    assert choose(logits, luck, Sampling(top_k=3)).tolist() == [1, 4]
    assert choose(logits, luck, Sampling()).tolist() == [1, 2]
    banned = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    assert choose(banned, luck, Sampling()).tolist() == [1, 1]


def test_rare_tokens_of_a_large_vocabulary_are_told_apart():
    V, rare = 2**17, 1e-9
    logits = torch.full((V,), rare).log().index_fill(0, torch.tensor([5]), 0.0)
    luck = (1 + rare * (torch.arange(50, dtype=torch.float64) + 0.5)) / (1 + rare * (V - 1))
    assert len(choose(logits.expand(50, V), luck, Sampling()).unique()) == 50


@pytest.mark.parametrize(("prompts", "tokens", "sentence"), [
    ([], 5, "there is no prompt"),
    ([[1], []], 5, "prompt 2 of 2 is empty"),
    ([[1, 48]], 5, "prompt 1 has token 48, but the model's vocabulary ends at 47"),
    ([[-1]], 5, "prompt 1 has token -1"),
    ([[1]], 0, "tokens = 0 must be at least 1"),
])  # fmt: skip
def test_prompts_that_cannot_be_read_are_refused(decoder, prompts, tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(decoder, prompts, tokens, GREEDY)


@pytest.mark.parametrize(("value", "why"), [(math.nan, "neither is {}"), (1e308, "its weights are, and too large")])
def test_logits_that_are_not_finite_are_refused(value, why):
    broken = model()
    name, weight = [*broken.named_parameters()][-1]
    weight.data.fill_(value)
    with pytest.raises(ValueError, match="the logits after 9 tokens of prompt 1 are not finite; " + why.format(name)):
        sample(broken, PROMPTS, 5, GREEDY)


@pytest.mark.parametrize(("knob", "value"), [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.1), ("seed", -1), ("seed", 2**64),
])  # fmt: skip
def test_knobs_out_of_range_are_refused(knob, value):
    with pytest.raises(ValueError, match=f"{knob} = .* must"):
        Sampling(**{knob: value})


@pytest.mark.gpu
@pytest.mark.parametrize("how", [GREEDY, Sampling(top_k=20, top_p=0.9)])
@torch.inference_mode()
def test_a_step_on_a_gpu_never_waits(how):
    gpu = torch.device("cuda")
    decoder = build(tiny.config("every", "moe1", "ladder"), Mesh(Parallel(), gpu), seed=5, dtype=torch.bfloat16).decoder
    states, tokens, read = decoder.begin(2, 9), torch.tensor([[1], [2]], device=gpu), torch.zeros(2, device=gpu).long()
    luck = torch.rand(2, dtype=torch.float64, device=gpu)
    try:
        for n in range(3):
            tokens = choose(_next(decoder, tokens, read + n, states), luck, how).unsqueeze(1)
            torch.cuda.set_sync_debug_mode("error")          # after the first step: kernels may wait when first loaded
    finally:
        torch.cuda.set_sync_debug_mode("default")


# From here on: a run of two steps, by the command line.

RUN = """
[model]
vocab = 300           # the tokenizer has 257
width = 32
layers = 2
pattern = ["gla", "full"]
std = 0.3
[model.blocks.gla]
token = { kind = "gla", heads = 2, key_dim = 8, value_dim = 16 }
channel = { kind = "moe", experts = 4, top_k = 2, hidden = 32 }
lag = [1, 1]
[model.blocks.full]
token = { kind = "attention", heads = 4, head_dim = 8, max_length = 64 }
channel = { kind = "swiglu", hidden = 64 }
lag = [1, 1]
[data]
seq = 32
batch_tokens = 128
rows = 4
lanes = 2
[data.sources.small]
shards = "SHARDS"
[train]
steps = 2
device = "cpu"
dtype = "fp32"
[optimizer]
lr = 1e-3
"""


WORDS = """{"version": "1.0", "added_tokens": [{"id": 0, "content": "<|endoftext|>", "single_word": false,
 "lstrip": false, "rstrip": false, "normalized": false, "special": true}], "normalizer": null, "pre_tokenizer": null,
 "post_processor": null, "decoder": null,
 "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}, "merges": []}}"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    shards = corpora.corpus(folder / "shards", corpora.texts(60))
    (folder / "run.toml").write_text(RUN.replace("SHARDS", str(shards)))
    command = [sys.executable, "-m", "stepladder.launch.cli", "train", "run.toml", "--folder", "run"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def generate(capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = cli.main(["generate", *map(str, args)])
    return code, *capsys.readouterr()


def loaded(run: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    path = find(run)
    cfg = cli.import_module("stepladder.launch.config").load(run / "config.toml").model
    return restore(path, cfg, CPU, dtype)


def test_streamed_text_is_the_decoded_text(trained, capsys):
    code, out, err = generate(capsys, trained, "--prompt", "naïve 😀", "--tokens", 40, "--seed", 4)
    words = Tokenizer()
    prompt = words.encode("naïve 😀").tolist()
    more = sample(loaded(trained), [prompt], 40, Sampling(seed=4), stop=words.eot, vocab=words.vocab)[0]
    assert (code, out) == (0, words.decode(prompt + more) + "\n")
    assert err.startswith(f"step 2, {len(more)} tokens in ")


def test_several_prompts_are_printed_one_after_the_other(trained, capsys):
    flags = ("--tokens", 9, "--temperature", 0)
    alone = [generate(capsys, trained, "--prompt", text, *flags)[1] for text in ("ab", "c", "d")]
    lines = trained.parent / "prompts.txt"
    lines.write_text("c\nd\n")
    code, out, _ = generate(capsys, trained, "--prompt", "ab", "--prompt-file", lines, *flags)
    assert code == 0
    assert out == "".join(f"--- prompt {i}\n{text}\n" for i, text in enumerate(alone, 1))


def test_a_checkpoint_folder_and_its_tokenizer_may_be_given(trained, capsys):
    flags = ("--prompt", "ab", "--tokens", 62)              # exactly max_length
    code, shown, _ = generate(capsys, trained, *flags)
    assert code == 0
    assert generate(capsys, find(trained), *flags, "--tokenizer", "bytes")[1] == shown


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(tmp_path, trained, capsys):
    other = Tokenizer(WORDS)
    other.save(tmp_path)
    flags, copy = ("--prompt", "a", "--tokens", 9), trained / "tokenizer.json"
    words, trained_with = copy.read_bytes(), f"tokenizer bytes {Tokenizer().hash[:12]}, and"
    code, out, err = generate(capsys, trained, *flags, "--tokenizer", tmp_path)
    assert (code, out) == (2, "")
    assert err.endswith(f"{trained_with} --tokenizer {tmp_path} is bpe-2 {other.hash[:12]}; drop the flag\n")
    other.save(trained)
    try:
        code, out, err = generate(capsys, trained, *flags)
        assert (code, out) == (2, "")
        assert err.endswith(f"{trained_with} the tokenizer found for it is bpe-2 {other.hash[:12]}; "
                            "give that with --tokenizer\n")
    finally:
        copy.write_bytes(words)


def test_weights_are_those_of_the_checkpoint_and_routers_stay_fp32(trained):
    exact, cast = loaded(trained), loaded(trained, torch.bfloat16)
    assert {f"model/{name}" for name, _ in exact.named_parameters()} == {
        name for name in names(find(trained)) if name.startswith("model/")}
    for (name, p), q in zip(exact.named_parameters(), cast.parameters(), strict=True):
        leaf = cast.get_submodule(name.rpartition(".")[0])
        assert isinstance(leaf, Leaf)
        assert q.dtype == (torch.float32 if leaf.replicated or p.ndim == 1 else torch.bfloat16)
        assert torch.equal(p.to(q.dtype), q)
    wide, tokens = loaded(trained), torch.tensor([[5, 7, 11, 13]])
    wide.dtype = torch.bfloat16               # casts at use, as training does
    logits = [d.finish(d(tokens, tiny.plain(1, 4)))[0] for d in (wide, cast)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("args", "sentence"), [
    ((), "there is no prompt to continue; give --prompt TEXT or --prompt-file FILE"),
    (("--prompt", ""), "prompt 1 of 1 is empty"),
    (("--prompt", "\udcff"), "the prompts are not UTF-8 text"),
    (("--prompt", "a", "--seed", "-3"), "seed = -3 must be 0 or more"),
    (("--prompt", "a", "--tokens", "64"),
     "prompt 1 of 1 tokens and 64 more exceed model.blocks.full.token.max_length = 64"),
    (("--prompt", "a", "--device", "cuda"), "--device cuda, but torch finds no GPU here"),
    (("--prompt", "a", "--tokenizer", "nowhere"), "nowhere: no such tokenizer"),
    (("--prompt-file", "nowhere"), "nowhere: No such file"),
])  # fmt: skip
def test_bad_input_is_one_sentence(trained, capsys, monkeypatch, args, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = generate(capsys, trained, *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"stepladder: {sentence}")
    assert err.count("\n") == 1


def test_folders_without_checkpoints_are_refused(tmp_path, trained, capsys):
    for folder, sentence in ((tmp_path, "holds no checkpoint"), (tmp_path / "nowhere", "no such folder")):
        code, _, err = generate(capsys, folder, "--prompt", "a")
        assert code == 2
        assert f"{folder}" in err
        assert sentence in err


def test_a_damaged_checkpoint_is_refused(tmp_path, trained, capsys):
    path = tmp_path / "copy"
    path.mkdir()
    for file in find(trained).iterdir():
        data = bytearray(file.read_bytes())
        data[-9] ^= file.suffix == ".bin"
        (path / file.name).write_bytes(data)
    code, _, err = generate(capsys, path, "--prompt", "a")
    assert code == 2
    assert "checksum" in err


def test_a_run_is_sampled_without_its_shards(trained, capsys):
    shards = trained.parent / "shards"
    shards.rename(trained.parent / "away")
    try:
        assert generate(capsys, trained, "--prompt", "a", "--tokens", 9)[0] == 0
    finally:
        (trained.parent / "away").rename(shards)


def test_shards_that_are_gone_are_named_with_the_way_out(trained, capsys):
    shards, copy = trained.parent / "shards", trained / "tokenizer.json"
    words = copy.read_bytes()
    shards.rename(trained.parent / "moved")
    copy.unlink()
    try:
        flags = ("--prompt", "a", "--tokens", 9)
        code, _, err = generate(capsys, trained, *flags)
        assert code == 2
        assert f"data.sources.small.shards = '{shards}'" in err
        assert "give --tokenizer" in err
        assert generate(capsys, trained, *flags, "--tokenizer", trained.parent / "moved")[0] == 0
    finally:
        copy.write_bytes(words)
        (trained.parent / "moved").rename(shards)
