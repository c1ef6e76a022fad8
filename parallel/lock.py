"""One program at a time writes to a run folder."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from stepladder.parallel.checkpoint_folder import CheckpointError


class InUse(CheckpointError):
    """Another program writes to the run folder, or did on a machine of which its server has not heard since."""

    passing = True  # it may be over when this one is started again


class Lock:
    """Holds RUN/.lock while a program writes to the run folder; a second program is refused.

    The folder is made if need be, and taken away again if an error leaves nothing else in it. One that holds anything
    but a run is refused: its files would be written over.
    """

    def __init__(self, run: Path) -> None:
        self.run = Path(run)
        self.path = self.run / ".lock"

    def __enter__(self) -> "Lock":
        self._claim()
        self.file = open(self.path, "a+")
        try:
            # lockf, not flock: a flock is inherited by forked data workers, which would hold the run for the seconds
            # that they outlive a killed trainer.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise InUse(
                f"run folder {self.path.parent} is in use by {holder}; stop it or give this run another folder"
            ) from None
        except OSError as error:
            self.file.close()
            way = "mount its file system with locks (Lustre: -o flock), or give this run another folder"
            raise CheckpointError(f"{self.path} cannot be locked ({error.strerror}); {way}") from None
        with contextlib.suppress(OSError):  # a full disk holds the lock, too
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.new:
            with contextlib.suppress(OSError):  # somebody removed it, or a full disk: the error says more
                if [f.name for f in self.run.iterdir()] == [self.path.name]:
                    self.path.unlink()
                    self.run.rmdir()
        self.file.close()  # which unlocks

    def _claim(self) -> None:
        self.new = not self.run.exists()
        if not self.new and not self.run.is_dir():
            raise ValueError(f"{self.run} is a file; give a folder with --folder")
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--folder {self.run} cannot be made ({error.strerror}); give another") from None
        found = {f.name for f in self.run.iterdir()}
        if found and not found & {".lock", "checkpoints", "metrics.jsonl", "slurm"}:
            raise ValueError(f"{self.run} holds {min(found)!r} and no run; give a new or empty folder with --folder")
