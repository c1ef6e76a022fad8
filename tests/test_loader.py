"""The loader: the order of the data follows from the seed and the corpus, whoever reads it and wherever it resumes."""

import gc
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from corpora import corpus, texts

from stepladder.data import pack, tokenizer
from stepladder.data.loader import IGNORE, Batch, Cursor, Loader, Source, merge
from stepladder.data.manifest import Columns
from stepladder.data.shards import Corpus, ShardError

EOT = 256


@pytest.fixture(scope="module", autouse=True)
def served() -> None:
    """The server of which data workers are forked is that of the ranks of other tests."""
    ranks.serve()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("made") / "a", texts(400))


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("second") / "b", texts(300, "b"))


def loader(*folders: Path | str, **options) -> Loader:
    sources = [Source(f"s{i}", str(folder)) for i, folder in enumerate(folders)]
    plain = {"seq": 50, "rows": 4, "lanes": 8, "seed": 1, "prefetch": 0}
    return Loader(options.pop("sources", sources), **{**plain, **options})


def take(count: int, *folders: Path | str, **options) -> list[Batch]:
    made = loader(*folders, **options)
    try:
        return list(itertools.islice(made, count))
    finally:
        made.close()


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.cursor == b.cursor


def global_rows(steps: int, dp_size: int, cursor: Cursor | None, *folders, rows: int, **options):
    """The rows of all ranks in the run's order, and the merged cursor after them."""
    ranks = [
        take(steps, *folders, dp_rank=rank, dp_size=dp_size, rows=rows, cursor=cursor, **options)
        for rank in range(dp_size)
    ]
    first = cursor["row"] if cursor else 0
    ordered = {}
    for rank, batches in enumerate(ranks):
        n = first + (rank - first) % dp_size
        for batch in batches:
            for row in zip(*batch[:3], strict=True):
                ordered[n] = row
                n += dp_size
    assert sorted(ordered) == list(range(first, first + steps * rows * dp_size))
    return [ordered[n] for n in sorted(ordered)], merge(batches[-1].cursor for batches in ranks)


def same_rows(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True)
    )


def stream(rows, lane: int, lanes: int = 8) -> list[int]:
    return torch.cat([row[0] for row in rows[lane::lanes]]).tolist()


def whole_documents(ids: list[int]) -> list[str]:
    text = tokenizer.load("bytes")
    ends = [i for i, token in enumerate(ids) if token == EOT]
    return [text.decode(ids[a:b]) for a, b in zip([0, *[e + 1 for e in ends]], ends, strict=False)]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_global_batches_are_the_same_across_a_change_of_ranks(made, second, rows):
    """dp 1 -> 2 -> 4 -> 1, each part from the merged cursor of the one before, equals the run that never changed."""
    found, cursor = [], None
    for dp_size, steps in ((1, 8), (2, 6), (4, 5), (1, 4)):
        part, cursor = global_rows(steps, dp_size, cursor, made, second, rows=rows, heldout=0.1)
        cursor = json.loads(json.dumps(cursor))
        found += part
    whole, end = global_rows(44, 1, None, made, second, rows=rows, heldout=0.1)
    assert same_rows(found, whole)
    assert cursor == end


def test_an_epoch_has_every_document_exactly_once_across_a_change_of_ranks(made):
    found, cursor = [], None
    for dp_size in (1, 2, 8, 4, 1):
        part, cursor = global_rows(40, dp_size, cursor, made, rows=8 // dp_size)
        found += part
    epoch: list[str] = []
    for lane in range(8):
        told = whole_documents(stream(found, lane))
        first_again = next(i for i, text in enumerate(told) if text in told[:i])
        epoch += told[:first_again]
        assert max(Counter(told).values()) - 1 <= len(told) // first_again, "a lane repeats before it is through"
    assert Counter(epoch) == Counter(texts(400))


def test_epochs_and_seeds_give_other_orders(made):
    rows, cursor = global_rows(200, 1, None, made, rows=8)
    told = whole_documents(stream(rows, 0))
    size = next(i for i, text in enumerate(told) if text in told[:i])
    assert cursor["state"]["0"]["sources"]["s0"][0] >= 2
    assert told[:size] != told[size : 2 * size]
    assert sorted(told[:size]) == sorted(told[size : 2 * size])
    other, _ = global_rows(200, 1, None, made, rows=8, seed=2)
    assert whole_documents(stream(other, 0))[:size] != told[:size]


def test_the_order_is_what_it_was_when_the_format_was_fixed(made):
    """Not a property, a promise: a later version continues an older run's data."""
    first = take(1, made, seq=12)[0]
    assert tokenizer.load("bytes").decode(first.tokens.flatten().tolist()) == PROMISE


PROMISE = "a0105 bbbbbba0138 iiiiiia0018 ssssssa0340 cccccc"


def continues(batches: list[Batch], made: Path) -> bool:
    """Whether a loader started from each batch's cursor gives the next batch."""
    return all(same(take(1, made, cursor=a.cursor)[0], b) for a, b in itertools.pairwise(batches))


def prefetched(made: Path) -> list[Batch]:
    ahead = loader(made, prefetch=8)
    first = next(ahead)
    while ahead._queue.qsize() < 8:
        time.sleep(0.01)
    batches = [first, *itertools.islice(ahead, 4)]
    ahead.close()
    return batches


def test_prefetched_rows_do_not_advance_the_cursor(made):
    batches = prefetched(made)
    assert all(same(a, b) for a, b in zip(batches, take(5, made), strict=True))
    assert continues(batches, made)


def test_a_cursor_that_follows_the_reader_would_be_noticed(made, monkeypatch):
    """The mutation of the test above: lanes hand out their live state, which prefetching moves on."""
    real, live = pack.Lane.state, {}

    def state(self):
        live.setdefault(id(self), {}).update(real(self))
        return live[id(self)]

    with monkeypatch.context() as patch:
        patch.setattr(pack.Lane, "state", state)
        batches = prefetched(made)
    assert not continues(batches, made)


def test_batches_do_not_depend_on_the_workers(made, second):
    told = take(12, made, second, rows=3, heldout=0.1)
    for workers in (1, 3):
        ahead = loader(made, second, rows=3, heldout=0.1, workers=workers, prefetch=2)
        assert all(same(a, b) for a, b in zip(told, ahead, strict=False))
        again = take(2, made, second, rows=3, heldout=0.1, workers=workers, cursor=told[3].cursor, dp_size=1)
        assert all(same(a, b) for a, b in zip(told[4:6], again, strict=True))
        ahead.close()


def test_a_killed_worker_is_an_error_that_names_it(made):
    ahead = loader(made, workers=2, prefetch=1)
    next(ahead)
    victim = next(p for p in multiprocessing.active_children() if p.name == "data worker 1")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(victim.pid, number)
        next(ahead)  # a scheduler's signals are the parent's business
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=rf"data worker 1 \(process {victim.pid}\) was killed by signal 9"):
        list(ahead)
    with pytest.raises(ChildProcessError):
        next(ahead)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("data worker")]


def test_a_dropped_loader_leaves_no_thread(made):
    before = threading.active_count()
    next(loader(made, prefetch=3))
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_targets_and_starts_are_right_at_the_borders_of_documents(made):
    rows, _ = global_rows(60, 1, None, made, rows=8)
    borders = cut = 0
    for lane in range(8):
        ids = stream(rows, lane)
        for at, (tokens, targets, start) in enumerate(rows[lane::8]):
            for i in range(50):
                here = at * 50 + i
                if here + 1 == len(ids):
                    continue
                want = IGNORE if ids[here] == EOT else ids[here + 1]
                assert targets[i] == want
                assert start[i] == (i == 0 or ids[here - 1] == EOT)
                borders += want == IGNORE
            cut += int(targets[-1] != IGNORE)
            assert tokens[0] == ids[at * 50]
    assert borders > 300
    assert cut > 50, "rows end in the middle of documents, with a target from the next row"


def test_pieces_of_a_long_document_do_not_see_each_other(tmp_path):
    """A document longer than a block is read as several; only the last piece ends with the end of text."""
    folder = corpus(tmp_path / "long", [chr(97 + i) * 1000 for i in range(20)])
    rows, _ = global_rows(100, 1, None, folder, rows=4, lanes=4)
    tokens, targets, start = (torch.stack(part) for part in zip(*rows, strict=True))
    inside = targets != IGNORE
    assert bool((targets[inside] == tokens[inside])[targets[inside] != EOT].all())
    changes = tokens[:, 1:] != tokens[:, :-1]
    assert bool((start[:, 1:] | ~changes | (tokens[:, 1:] == EOT)).all())
    assert int((targets == IGNORE).sum()) >= 4 * int((tokens == EOT).sum()) > 0


def test_sequence_length_may_change_on_resume(made):
    rows, cursor = global_rows(8, 1, None, made, rows=8, seq=30)
    longer, _ = global_rows(8, 1, cursor, made, rows=8, seq=70)
    whole, _ = global_rows(16, 1, None, made, rows=8, seq=50)
    for lane in range(8):
        assert stream(rows, lane) + stream(longer, lane) == stream(whole, lane)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.05, 0.95), (1.0, 0.0)])
def test_sources_get_their_share_of_the_tokens(made, second, weights):
    sources = [Source("a", str(made), weights[0]), Source("b", str(second), weights[1])]
    last = take(1500, sources=sources, rows=8, seq=64)[-1].cursor
    used = {name: sum(lane["sources"].get(name, [0] * 4)[3] for lane in last["state"].values()) for name in "ab"}
    total = sum(used.values())
    assert total >= 1500 * 8 * 64
    for source in sources:
        assert abs(used[source.name] / total - source.weight / sum(weights)) < 0.01


def split_documents(folder: Path, **options) -> set[str]:
    rows, _ = global_rows(300, 1, None, folder, rows=2, lanes=2, **options)
    return set(whole_documents(stream(rows, 0, 2))) | set(whole_documents(stream(rows, 1, 2)))


def test_held_out_documents_are_never_trained_on(made):
    train = split_documents(made, heldout=0.1)
    held = split_documents(made, heldout=0.1, split="heldout")
    assert 20 < len(held) < 60
    assert not train & held
    assert train | held == set(texts(400))
    assert split_documents(made, heldout=0.1, split="heldout", seed=9) == held, "the split does not follow the seed"


def test_pieces_of_one_document_stay_on_one_side_of_the_split(tmp_path):
    folder = corpus(tmp_path / "long", [chr(97 + i) * 1000 for i in range(20)])
    sides = []
    for split in ("train", "heldout"):
        rows, _ = global_rows(400, 1, None, folder, rows=2, lanes=2, heldout=0.3, split=split)
        sides.append(set(torch.cat([row[0] for row in rows]).tolist()) - {EOT})
    assert len(sides[0]) + len(sides[1]) == 20
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_shard_stops_the_run_or_is_skipped_and_counted(made, tmp_path, workers):
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    row = Corpus(folder).manifest.shards[1].blocks[2]
    shard = folder / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[int(row[Columns.OFFSET]) + 600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=f"shard-00001.tar: .* at byte {row[Columns.OFFSET]}"):
        take(300, folder, workers=workers)
    ahead = loader(folder, rows=8, on_error="skip", workers=workers)
    rows = [r for batch in itertools.islice(ahead, 300) for r in zip(*batch[:3], strict=True)]
    assert ahead.skipped == 1
    ahead.close()
    told = set().union(*(whole_documents(stream(rows, lane)) for lane in range(8)))
    gone = texts(400)
    first = Corpus(folder).manifest.shards[0].documents + int(row[Columns.FIRST])
    del gone[first : first + int(row[Columns.DOCUMENTS])]
    assert told == set(gone)


def test_skipping_everything_is_an_error_not_a_hang(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        loader(folder)
    with pytest.raises(ValueError, match="cannot read any document of an epoch; prepare or copy its shards again"):
        take(1, folder, on_error="skip")


def test_a_stream_gives_the_same_batches_as_files(made):
    told = take(20, made)
    piped = take(20, sources=[Source("s0", f"pipe:cat {made}")])
    assert all(same(a, b) for a, b in zip(told, piped, strict=True))


def test_waiting_for_data_is_counted(made, monkeypatch):
    ahead = loader(made)
    next(ahead)
    before, real = ahead.waited, pack.Lane.row
    monkeypatch.setattr(pack.Lane, "row", lambda self, seq: (time.sleep(0.02), real(self, seq))[1])
    next(ahead)
    assert ahead.waited - before >= 0.08


def test_the_manifest_hash_follows_sources_names_and_weights(made, second):
    def made_hash(*sources):
        return loader(sources=[Source(*source) for source in sources]).manifest_hash

    one = made_hash(("a", str(made)), ("b", str(second)))
    assert one == made_hash(("a", f"pipe:cat {made}"), ("b", str(second), 1))
    others = [made_hash(("a", str(made))), made_hash(("c", str(made)), ("b", str(second)))]
    others.append(made_hash(("a", str(made), 2.0), ("b", str(second))))
    assert len({one, *others}) == 4
    assert loader(made).tokenizer.name == "bytes"


def test_bad_settings_get_a_sentence(made, second, tmp_path):
    cursor = take(1, made)[0].cursor
    for options, message in (
        ({"lanes": 6, "dp_size": 4}, "lanes = 6 is not divisible by 4"),
        ({"lanes": 4000}, r"source 's0' has \d+ blocks with train documents, .*: use at most \d+ lanes"),
        ({"sources": [Source("a", str(made), -1)]}, "source 'a': weight -1"),
        ({"sources": [Source("a", str(made), float("nan"))]}, "source 'a': weight nan"),
        ({"sources": [Source("a", str(made), float("inf"))]}, "source 'a': weight inf"),
        ({"sources": [Source("a", str(made), 0)]}, "every weight is 0"),
        ({"sources": [Source("a", str(made)), Source("a", str(second))]}, "a name of its own"),
        ({"sources": []}, "at least one is needed"),
        ({"vocab": 256}, "has 257 ids, the model vocab = 256"),
        ({"split": "test"}, "split = 'test': must be one of train, heldout"),
        ({"split": "heldout"}, "heldout = 0.0 with split = 'heldout'"),
        ({"heldout": 1.0}, "heldout = 1.0"),
        (
            {"split": "heldout", "heldout": 0.001},
            r"blocks with heldout documents, fewer than lanes = 8: raise heldout = 0.001 to 0.\d+, ",
        ),
        ({"heldout": 0.999999}, r"has 0 blocks with train documents, .*: lower heldout = 0.999999 to 0.\d+, prepare"),
        ({"on_error": "ignore"}, "on_error = 'ignore'"),
        ({"rows": 0}, "rows = 0"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank = 2"),
        ({"cursor": {**cursor, "lanes": 16}}, "made with lanes = 16, this run has 8"),
        ({"cursor": cursor, "seed": 3}, "made with seed = 1, this run has 3"),
        ({"cursor": {**cursor, "state": {"0": cursor["state"]["0"]}}}, r"lacks lanes \[1, 2, 3, 4, 5, 6, 7\]"),
        (
            {"cursor": cursor, "sources": [Source("other", str(made))]},
            "made with sources .'s0'., this run has .'other'.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            loader(made, **options)


@pytest.mark.parametrize(("split", "share"), [("heldout", 0.001), ("train", 0.999999)])
def test_the_share_that_is_said_to_fit_is_the_next_that_does(made, split, share):
    with pytest.raises(ValueError, match=" to 0") as caught:
        loader(made, split=split, heldout=share)
    said = float(re.search(r" to (0\.\d+), ", str(caught.value))[1])
    loader(made, split=split, heldout=said).close()
    with pytest.raises(ValueError, match="fewer than lanes = 8"):
        loader(made, split=split, heldout=said + (-0.001 if split == "heldout" else 0.001))


def test_sources_of_different_tokenizers_or_types_are_refused(made, tmp_path):
    for change, message in (
        ({"tokenizer": {"name": "bpe-300", "hash": "f" * 64, "vocab": 300, "eot": 0}}, "different tokenizers, bytes"),
        ({"dtype": "uint32"}, "different dtypes, uint16 and uint32"),
    ):
        other = Path(shutil.copytree(made, tmp_path / str(len(message))))
        table = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps({**table, **change}))
        with pytest.raises(ValueError, match=message):
            loader(made, other)


def test_cursors_that_do_not_belong_together_are_not_merged(made):
    ranks = [take(2, made, dp_rank=rank, dp_size=2) for rank in range(2)]
    for cursors, message in (
        ([ranks[0][0].cursor, ranks[1][1].cursor], "different steps or runs"),
        ([ranks[0][0].cursor], "4 of 8 lanes"),
        ([ranks[0][0].cursor, ranks[0][0].cursor], "4 of 8 lanes"),
        ([], "different steps or runs"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(cursors)


def test_tokens_are_int64_and_the_rest_is_what_the_model_expects(made):
    batch = take(1, made)[0]
    assert [(part.dtype, tuple(part.shape)) for part in batch[:3]] == [
        (torch.int64, (4, 50)), (torch.int64, (4, 50)), (torch.bool, (4, 50))]  # fmt: skip
    assert bool(batch.start[:, 0].all())
    assert isinstance(json.dumps(batch.cursor), str)
    assert np.all(batch.tokens.numpy() < 257)
