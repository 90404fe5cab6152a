"""A Slurm and a Ray cluster on this machine, each of two nodes with one CPU: what `make cluster-up` starts.

    python scripts/cluster.py up [slurm] [ray]      # both if none is named; prints the variables by which it is found
    python scripts/cluster.py down [slurm] [ray]
    python scripts/cluster.py lacking               # what has to be installed first; `make cluster-packages` does that

It needs neither root nor systemd, and installs nothing. A node is a set of processes, so both have this machine's disk
and its name; `kill` and `start` of a node are what tests and `benchmarks/cluster_kills.py` do to it.
"""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

FOLDER = Path(tempfile.gettempdir()) / f"moe-lab-cluster-{os.getuid()}"  # a path of a socket has at most 107 bytes
DEBIAN = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
"""Which Debian package has a command."""
_START_S = 60.0
_MARK = "MOE_LAB_CLUSTER_NODE"  # in the environment of a daemon and of what it starts
# An idle node gets a job within a second, and one that was put back within seconds (cred_expire); a node that does not
# answer for 10 seconds is down.
_SLURM_CONF = """
ClusterName=moe-lab
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
GresTypes=gpu
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=10
ReturnToService=2
KillWait=5
NodeName=node1 NodeHostname={host} Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=node2 NodeHostname={host} Port={ports[2]} CPUs=1 RealMemory=1000 Gres=gpu:1
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


class ClusterError(Exception):
    """It cannot be started; one line that says why."""


class Cluster:
    """Daemons whose files are in one folder. Another process that knows the folder can end them."""

    nodes: tuple[str, ...] = ()

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def lacking() -> str | None:
        """What has to be installed before it can start, as a sentence; None if nothing."""
        raise NotImplementedError

    def up(self) -> None:
        """Start it and wait until its nodes take work. Raises `ClusterError`."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The variables by which commands find it."""
        raise NotImplementedError

    def down(self) -> None:
        """End all of its processes and remove its folder."""
        for name in reversed(self._commands()):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, name: str, before: Sequence[str] = ()) -> None:
        """Start a daemon again, as it was started before; `before` are words before its command."""
        command = [*before, *self._commands()[name]]
        with open(self.folder / f"{name}.log", "ab") as log:
            subprocess.Popen(
                command,
                env={**os.environ, **self.environment(), _MARK: f"{self.folder}:{name}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def processes(self, name: str) -> list[int]:
        """A daemon and all that it started."""
        return list(_marked(f"{self.folder}:{name}"))

    def running(self, words: str) -> list[int]:
        """The processes of all nodes that have these words in their command line."""
        found = []
        for process in (process for node in self.nodes for process in self.processes(node)):
            with suppress(OSError):  # it has ended
                line = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ")
                if words in line.decode(errors="replace"):
                    found.append(process)
        return found

    def kill(self, name: str) -> None:
        """End a daemon and all that it started by SIGKILL, as a node that loses its power."""
        while processes := self.processes(name):
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def _commands(self) -> dict[str, list[str]]:
        try:
            return dict(json.loads((self.folder / "commands.json").read_text()))
        except FileNotFoundError:
            return {}

    def _begin(self) -> None:
        if self._commands():
            raise ClusterError(f"{self.folder} has a cluster already; end it with `make cluster-down`")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _start_all(self, commands: dict[str, list[str]]) -> None:
        (self.folder / "commands.json").write_text(json.dumps(commands, indent=1))
        for name in commands:
            self.start(name)

    def _wait(self, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not is_up():
            if time.monotonic() > deadline:
                for name in self._commands():
                    self.kill(name)
                (self.folder / "commands.json").unlink()
                raise ClusterError(f"the {type(self).__name__} cluster did not start; see {self.folder}/*.log")
            time.sleep(0.1)


class Slurm(Cluster):
    """munged, slurmctld and two slurmd."""

    nodes = ("node1", "node2")

    @staticmethod
    def lacking() -> str | None:
        """See `Cluster.lacking`."""
        if not sys.platform.startswith("linux"):
            return "Slurm runs on Linux only"
        packages = [package for command, package in DEBIAN.items() if shutil.which(command, path=_PATH) is None]
        return f"Slurm lacks Debian's {' '.join(packages)}" if packages else None

    def up(self) -> None:
        """See `Cluster.up`."""
        self._begin()
        for part in ("state", *self.nodes):
            (self.folder / part).mkdir(exist_ok=True)
        self.folder.chmod(0o755)  # munged wants its socket reachable
        key = self.folder / "munge.key"
        key.unlink(missing_ok=True)
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        names = {"host": platform.node(), "user": getpass.getuser(), "folder": self.folder, "ports": _free_ports(3)}
        (self.folder / "slurm.conf").write_text(_SLURM_CONF.format(**names).lstrip())
        (self.folder / "gres.conf").write_text("NodeName=node2 Name=gpu File=/dev/null\n")  # a GPU in name only
        files = ("key-file=munge.key", "socket=munge.socket", "pid-file=munged.pid", "seed-file=munged.seed")
        places = ["--" + file.replace("=", f"={self.folder}/") for file in files]
        self._start_all(
            {
                "munged": [_found("munged"), "--foreground", *places],
                "slurmctld": [_found("slurmctld"), "-D"],
                **{node: [_found("slurmd"), "-D", "-N", node] for node in self.nodes},
            }
        )
        self._wait(lambda: self.states() == ["idle"] * len(self.nodes))

    def states(self) -> list[str]:
        """What slurmctld says of each node; nothing while it does not answer."""
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        return subprocess.run(
            command, env={**os.environ, **self.environment()}, capture_output=True, text=True, check=False
        ).stdout.split()

    def environment(self) -> dict[str, str]:
        """See `Cluster.environment`."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}


class Ray(Cluster):
    """A head and one more node."""

    nodes = ("head", "node")

    @staticmethod
    def lacking() -> str | None:
        """See `Cluster.lacking`."""
        return None if importlib.util.find_spec("ray") else "Ray lacks the package ray"

    def up(self) -> None:
        """See `Cluster.up`."""
        self._begin()
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"]
        ray += ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        (port,) = _free_ports(1)
        (self.folder / "port").write_text(str(port))
        token = self.folder / "token"  # of this cluster alone: else `ray start` makes one in the person's home
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        head = [*ray, "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        self._start_all({"head": head, "node": [*ray, f"--address=127.0.0.1:{port}"]})
        self._wait(lambda: all("Ray runtime started" in self._log(name) for name in self.nodes))

    def environment(self) -> dict[str, str]:
        """See `Cluster.environment`."""
        address, token = f"127.0.0.1:{(self.folder / 'port').read_text()}", (self.folder / "token").read_text()
        return {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


CLUSTERS: dict[str, type[Cluster]] = {"slurm": Slurm, "ray": Ray}
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))  # daemons are not for everybody


def _found(command: str) -> str:
    place = shutil.which(command, path=_PATH)
    assert place is not None, command
    return place


def _free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]  # all at once, so that they differ
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _marked(mark: str) -> set[int]:
    """The processes of a daemon and their descendants, whatever session or parent they have by now."""
    marked: list[int] = []
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            state, parent, *_ = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if state == "Z":
                continue
            children.setdefault(int(parent), []).append(int(entry.name))
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                marked.append(int(entry.name))
    seen: set[int] = set()
    while marked:
        process = marked.pop()
        if process not in seen:
            seen.add(process)
            marked += children.get(process, [])
    return seen


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "lacking"])
    parser.add_argument("kinds", nargs="*", choices=[[], *CLUSTERS], help="slurm, ray; both if none is given")
    arguments = parser.parse_args()
    kinds = {kind: CLUSTERS[kind] for kind in arguments.kinds or CLUSTERS}
    if arguments.action == "down":
        for kind, make in kinds.items():
            make(FOLDER / kind).down()
        return 0
    lacking = [reason for make in kinds.values() if (reason := make.lacking()) is not None]
    if lacking:
        print(f"cluster.py: {'; '.join(lacking)}; `make cluster-packages` installs it", file=sys.stderr)
        return 1
    if arguments.action == "up":
        for kind, make in kinds.items():
            cluster = make(FOLDER / kind)
            try:
                cluster.up()
            except ClusterError as error:
                print(f"cluster.py: {error}", file=sys.stderr)
                return 1
            for key, value in cluster.environment().items():
                print(f"export {key}={value}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
