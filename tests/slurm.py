"""A Slurm of one node, for tests and measurements: its own daemons, on loopback alone.

    python tests/slurm.py FOLDER

Brings up munge, slurmctld and slurmd (Debian: `apt install slurm-wlm munge`) with their files, keys
and free ports under FOLDER, says so, and stays until its standard input ends; then it ends every
process that came of it, jobs included. Put FOLDER/bin first on PATH: it holds the commands with
this cluster's configuration, which reach jobs too (Snakemake's plugin drops SLURM_CONF there).
It needs no systemd and no accounts, and knows nothing of another Slurm on the machine.
"""

import contextlib
import ctypes
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

COMMANDS = (
    "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr", "sshare",
)  # fmt: skip
DAEMONS = ("munged", "slurmctld", "slurmd")
NODE = "node"  # its name in this cluster; it is this machine
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# `cred_expire`: a job that lost its node waits that long, in seconds, before it is started again.
CONFIGURATION = """\
ClusterName=kdlib
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=2
NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} RealMemory=16000
PartitionName=debug Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs this needs and the machine does not have."""
    return [name for name in (*DAEMONS, *COMMANDS) if not shutil.which(name, path=SBIN)]


class Cluster:
    """A running cluster, from outside of the process that holds it.

    Attributes:
        folder: Where its files are; short, as sockets lie in it.
        environment: The variables of a shell that uses it.
        cpu_s: CPU seconds of all its processes, jobs included; known when it has ended.
    """

    cpu_s: float

    def __init__(self, folder: Path, holder: subprocess.Popen) -> None:
        self.folder, self._holder = folder, holder
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        self.environment = own_variables() | {"PATH": path}

    def run(self, command: str, *arguments: str) -> str:
        """What one of Slurm's commands prints."""
        process = subprocess.run(
            [self.folder / "bin" / command, *arguments],
            env=self.environment, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        if process.returncode:
            raise RuntimeError(f"{command} {arguments}: {process.stderr}")
        return process.stdout

    def jobs(self) -> list[list[str]]:
        """Id, state and comment (`rule_NAME_wildcards_...`) of each job there is or was."""
        told = self.run("squeue", "--states=all", "--noheader", "--format=%i|%T|%k")
        return [line.split("|", 2) for line in told.splitlines()]

    def lose_node(self) -> None:
        """The node loses its power: its daemon and all of its jobs' processes are gone."""
        self._ask("lose")
        self.run("scontrol", "update", f"nodename={NODE}", "state=down", "reason=power")

    def return_node(self) -> None:
        """The node starts again."""
        self._ask("return")
        self.run("scontrol", "update", f"nodename={NODE}", "state=resume")

    def _ask(self, what: str) -> None:
        print(what, file=self._holder.stdin, flush=True)
        if (told := self._holder.stdout.readline()) != f"{what}: done\n":
            raise RuntimeError(f"{what}: the cluster says {told!r}")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster while the block runs; whatever ends the block, or this process, ends the cluster.

    Raises: RuntimeError with the daemons' last words when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        command = [sys.executable, __file__, folder]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            try:
                if not holder.stdout.readline().startswith("up"):
                    raise RuntimeError(f"no cluster: {_last_words(Path(folder))}")
                yield (made := Cluster(Path(folder), holder))
                holder.stdin.close()
                made.cpu_s = float(holder.stdout.readline())
            finally:
                holder.stdin.close()
                try:
                    holder.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    holder.kill()  # its daemons die with it
                    raise


def _last_words(folder: Path) -> str:
    logs = {path.name: path.read_text().splitlines()[-3:] for path in folder.glob("*.log")}
    return "; ".join(f"{name}: {' / '.join(lines)}" for name, lines in logs.items())


class Holder:
    """The process that holds the daemons: whatever they fork ends up as its descendant."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, {}
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for name in ("munge", "state", "spool", "bin"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
        (folder / "munge" / "key").chmod(0o600)
        free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ports = [server.getsockname()[1] for server in free]
        for server in free:
            server.close()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=folder, node=NODE, ports=ports, user=os.getuid(), cpus=os.cpu_count(),
                host=socket.gethostname().split(".")[0],
            )
        )  # fmt: skip
        for name in COMMANDS:
            path = folder / "bin" / name
            real = shutil.which(name, path=SBIN)
            path.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n')
            path.chmod(0o755)

    def start(self, name: str, *options: str) -> None:
        """Start a daemon as a child, which dies with this process."""
        with open(self.folder / f"{name}.out.log", "a") as log:
            self.started[name] = subprocess.Popen(
                [shutil.which(name, path=SBIN), *options],
                env=own_variables() | {"SLURM_CONF": str(self.folder / "slurm.conf")},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(
                    PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0
                ),
            )  # fmt: skip

    def up(self) -> bool:
        """Start all daemons; whether the node is ready within 20 seconds."""
        munge = self.folder / "munge"
        files = [f"--{what}={munge / name}" for what, name in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("seed-file", "seed"),
            ("log-file", "log"),
        )]  # fmt: skip
        self.start("munged", "--foreground", "--force", *files)
        wait_for(lambda: (munge / "socket").exists(), 10)
        self.start("slurmctld", "-D")
        self.start("slurmd", "-D", "-N", NODE)
        return wait_for(self._idle, 20)

    def _idle(self) -> bool:
        command = [self.folder / "bin" / "sinfo", "--noheader", "--format=%T"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=5)
        except subprocess.TimeoutExpired:
            return False
        return told.stdout.strip() == "idle"

    def end(self, kept: tuple[str, ...] = ()) -> None:
        """Kill every descendant but the daemons that are kept, and wait until they are gone."""
        spared = {self.started[name].pid for name in kept}
        while found := descendants(spared):
            # all are stopped before any is killed: a daemon would report the end of its job
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            for pid in found:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)

    def serve(self) -> None:
        """Do what is asked, a word a line, until the input ends."""
        for line in sys.stdin:
            if line == "lose\n":
                self.end(kept=("munged", "slurmctld"))
            elif line == "return\n":
                self.start("slurmd", "-D", "-N", NODE)
            print(line.strip() + ": done", flush=True)


def own_variables() -> dict[str, str]:
    """The environment without the variables of a Slurm of which this process is itself a job."""
    foreign = ("SLURM_", "SBATCH_", "SRUN_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


def descendants(spared: set[int]) -> set[int]:
    """Ids of this process's children, their children and so on, without the spared and theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" ", 1)
            children.setdefault(int(rest.rpartition(")")[2].split()[1]), []).append(int(pid))
    found, ahead = set(), [os.getpid()]
    while ahead:
        fresh = set(children.get(ahead.pop(), ())) - spared
        found |= fresh
        ahead.extend(fresh)
    return found


def wait_for(is_so: Callable[[], object], seconds: float, every: float = 0.05) -> bool:
    """Whether something becomes so in time."""
    deadline = time.monotonic() + seconds
    while not (so := is_so()) and time.monotonic() < deadline:
        time.sleep(every)
    return bool(so)


def _stop(signum: int, frame: object) -> None:
    sys.exit(f"stopped by signal {signum}")


def main() -> int:
    """Hold a cluster until the standard input ends."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever started us decides
    folder = Path(sys.argv[1]).resolve()
    holder = Holder(folder)
    try:
        if not holder.up():
            print(f"down: {_last_words(folder)}", flush=True)
            return 1
        print(f"up: put {folder}/bin first on PATH; ends with this input", flush=True)
        holder.serve()
    finally:
        holder.end()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(used.ru_utime + used.ru_stime, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
