"""What tests of shards from elsewhere share: a corpus, a server that serves it with faults, and what was read of it."""
from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from corpora import corpus, texts

from stepladder.data.fetch import Limits
from stepladder.data.shards import Corpus

PATIENT = Limits(retries=3, stall=30, total=60, pause=0.01)


class Server:
    """Serves a folder and does to each file, request by request, what `faults` says; counts the requests."""

    def __init__(self, folder: Path):
        self.folder, self.faults, self.asked = folder, {}, Counter()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.strip("/")
                server.asked[name] += 1
                plan = server.faults.get(name, [])
                server.answer(self, name, plan.pop(0) if plan else "")

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, name: str, fault: str) -> None:
        data = (self.folder / name).read_bytes()
        if fault == "silent":
            self.released.wait(60)
            return
        if fault.startswith("to "):
            handler.send_response(302)
            handler.send_header("Location", fault.removeprefix("to "))
            handler.end_headers()
            return
        if fault.isdigit():
            handler.send_error(int(fault))
            return
        if fault == "short":
            data = data[:900]
        if fault == "wrong":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if fault == "slow":
            time.sleep(0.1)
        if fault == "drip":
            for at in range(len(data)):
                if self.released.wait(0.05):
                    return
                handler.wfile.write(data[at : at + 1])
        handler.wfile.write(data[: len(data) // 2] if fault in ("cut", "half") else data)
        if fault == "half":
            self.released.wait(60)

    def shards_asked(self) -> int:
        return sum(count for name, count in self.asked.items() if name.endswith(".tar"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("made") / "out", texts(400), shard_bytes=2000)


@pytest.fixture
def server(made):
    serving = Server(made)
    yield serving
    serving.released.set()
    serving.httpd.shutdown()
    serving.httpd.server_close()


def blocks(found: Corpus) -> list[bytes]:
    at = [(i, j) for i, shard in enumerate(found.manifest.shards) for j in range(len(shard.blocks))]
    return [block.tokens.tobytes() + block.pieces.tobytes() for block in (found.read(i, j) for i, j in at)]


def gib(count: float, folder: Path) -> float:
    """A cache limit for so many shards."""
    return count * max(path.stat().st_size for path in folder.glob("*.tar")) / 2**30
