"""A real Slurm cluster on one machine, for tests: every node has a network, a host name and processes of its own."""
from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

WANTED = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
CONFIG = """\
ClusterName=mini
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={0}/munge/socket,cred_expire=5
SlurmctldPidFile={0}/slurmctld.pid
SlurmdPidFile={0}/%n.pid
SlurmdSpoolDir={0}/spool-%n
StateSaveLocation={0}/state
SlurmctldLogFile={0}/slurmctld.log
SlurmdLogFile={0}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1,sched_interval=1,bf_interval=1
KillWait=10
CompleteWait=0
WaitTime=0
SlurmdTimeout={2}
MessageTimeout={3}
UnkillableStepTimeout=15
NodeName=n[1-{1}] NodeAddr=10.77.0.[1-{1}] CPUs=8 RealMemory=1000000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""
ENTER = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; export SLURM_CONF=$2/slurm.conf; shift 2; exec "$@"'
_number = itertools.count()
INIT = 'mount -t proc proc /proc; slurmd -D -N "$1" & wait; wait'     # as process 1 of a node, bash reaps


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in WANTED if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    return f"{', '.join(absent)} not found: apt-get install slurmctld slurmd slurm-client munge iproute2" * bool(absent)


class Cluster:
    """`nodes` virtual hosts n1, n2, ... and the controller ctl, on a bridge that leads nowhere else."""

    def __init__(self, folder: Path, nodes: int, silence: int = 60) -> None:
        """silence: seconds after which a node that says nothing is down."""
        self.folder, self.nodes = folder, nodes
        self.tag = f"sl{os.getpid()}-{next(_number)}"          # of one process's clusters, which may run beside another
        self.processes: dict[str, subprocess.Popen] = {}
        for name in ("munge", "state", *(f"spool-n{i}" for i in range(1, nodes + 1))):
            (folder / name).mkdir(parents=True)
        key = folder / "munge" / "key-file"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        hosts = {"ctl": 254, **{f"n{i}": i for i in range(1, nodes + 1)}}
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{prefix}10.77.0.{i} {name}\n" for name, i in hosts.items() for prefix in ("", "::ffff:")))
        (folder / "slurm.conf").write_text(CONFIG.format(folder, nodes, silence, min(10, silence)))

    def __enter__(self) -> Cluster:
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for name in ("ctl", *(f"n{i}" for i in range(1, self.nodes + 1))):
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{name}"], capture_output=True)

    def _up(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}={munge}/{name}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", ["munged", "--foreground", "--force", *files])    # force: the folder is root's alone
        self._wait("munged", (munge / "socket").exists)
        self._ip(f"netns add {self.tag}-ctl", "-n ctl link set lo up", "-n ctl link add br0 type bridge",
                 "-n ctl addr add 10.77.0.254/24 dev br0", "-n ctl link set br0 up")
        self._start("ctl", [*self._within("ctl"), "slurmctld", "-D", "-c"])
        for i in range(1, self.nodes + 1):
            self._ip(f"netns add {self.tag}-n{i}", f"link add v{i} netns {self.tag}-ctl type veth peer name eth0 "
                     f"netns {self.tag}-n{i}", f"-n ctl link set v{i} master br0 up", f"-n n{i} link set lo up",
                     f"-n n{i} addr add 10.77.0.{i}/24 dev eth0", f"-n n{i} link set eth0 up")
            self.on(f"n{i}")
        self.idle()

    def idle(self) -> None:
        """Wait until no node has anything to do."""
        asks = "sinfo", "-h", "-N", "-p", "low", "-t", "idle"
        self._wait("the nodes", lambda: self.call(*asks, check=False).count("\n") == self.nodes, 30)

    def on(self, node: str) -> None:
        """Power on."""
        init = ["unshare", "--pid", "--fork", "--kill-child", "bash", "-c", INIT, "_", node]
        self._start(node, [*self._within(node), *init])

    def off(self, node: str) -> None:
        """Power off: all processes of the node vanish."""
        self.processes[node].kill()
        self.processes[node].wait()

    def call(self, *command: str, check: bool = True, **kw: object) -> str:
        """What a command says on the login node."""
        done = subprocess.run([*self._within("ctl"), *command], capture_output=True, text=True, timeout=20, **kw)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """The job's number. The user's umask protects nothing."""
        return self.call("sbatch", "--parsable", *options, str(script), cwd=script.parent, umask=0).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, state: str, limit: float, restarts: int = 0) -> dict[str, str]:
        """Wait for a job to be in a state, after at least so many restarts."""
        job: dict[str, str] = {}
        hurried = set()

        def there() -> bool:
            job.update(self.job(number))
            if job["Reason"] == "BeginTime" and job["Restarts"] not in hurried:    # six seconds after a requeue; but in
                hurried.add(job["Restarts"])                # the second of its end its credentials count as revoked
                self.call("scontrol", "update", f"jobid={number}", "StartTime=now+2", check=False)
            return job["JobState"] == state and int(job["Restarts"]) >= restarts
        self._wait(f"job {number} to be {state}", there, limit, lambda: f"it is {job.get('JobState')}")
        return job

    def _within(self, name: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.tag}-{name}", "unshare", "-u", "-m", "--", "bash", "-c", ENTER, "_",
                name, str(self.folder)]

    def _ip(self, *lines: str) -> None:
        for line in lines:
            words = line.split()
            if words[0] == "-n":
                words[1] = f"{self.tag}-{words[1]}"
            subprocess.run(["ip", *words], check=True, capture_output=True)

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def _wait(self, what: str, there: Callable[[], bool], limit: float = 15,
              why: Callable[[], str] = lambda: "") -> None:
        began = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if there():
                    return
            waited = time.monotonic() - began
            assert waited < limit, f"waited {limit:.0f} s for {what}; {why()}\n{self._logs()}"
            time.sleep(min(0.5, 0.05 + waited / 20))         # asking costs a hundredth of a second of a core

    def _logs(self) -> str:
        return "".join(f"--- {f.name}\n{f.read_text(errors='replace')[-800:]}\n" for f in self.folder.glob("*.out"))
