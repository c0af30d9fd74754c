"""A Slurm cluster on this machine, for tests: a controller and nodes that are processes, in one folder.

    python tools/slurm_here.py FOLDER --nodes 3        # starts it; prints the environment variable that it needs
    SLURM_CONF=FOLDER/slurm.conf sinfo
    python tools/slurm_here.py FOLDER --stop

Debian: apt-get install slurmctld slurmd slurm-client munge. It must run as root, as slurmd must.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
MinJobAge=3600
KillWait=5
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that this machine does not have."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def start(folder: Path, nodes: int) -> dict[str, str]:
    """Start a cluster of so many nodes with one core each. Returns the environment that its commands need."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = [_free_port() for _ in range(nodes + 1)]
    lines = [
        f"NodeName=node{n} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000"
        for n, port in enumerate(ports[1:], 1)
    ]
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname(), port=ports[0], folder=folder, nodes="\n".join(lines)).lstrip()
    )
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
    files["seed-file"] = "munge.seed"
    _run(environment, ["munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items())])
    _run(environment, ["slurmctld", "-c", "-f", str(config)])
    for n in range(1, nodes + 1):
        (folder / f"spool-node{n}").mkdir(exist_ok=True)
        _run(environment, ["slurmd", "-N", f"node{n}", "-f", str(config)])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        done = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=environment, capture_output=True, text=True)
        if done.stdout.split() == ["idle", str(nodes)]:
            return environment
        time.sleep(0.5)
    stop(folder)
    raise SystemExit(f"the nodes did not become idle; the logs are in {folder}: {done.stdout}{done.stderr}")


def stop(folder: Path) -> None:
    """End all processes of the cluster."""
    for name in (*sorted(folder.glob("slurmd-*.pid")), folder / "slurmctld.pid", folder / "munged.pid"):
        if name.is_file():
            try:
                os.kill(int(name.read_text()), signal.SIGTERM)
            except (ProcessLookupError, ValueError):
                continue
    time.sleep(1)


def _run(environment: dict[str, str], command: list[str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} does not start: {done.stdout}{done.stderr}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="A Slurm cluster on this machine, for tests.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--stop", action="store_true")
    given = parser.parse_args()
    if lacking := missing():
        raise SystemExit(f"not installed: {', '.join(lacking)}. Debian: apt-get install slurmctld slurmd munge")
    if given.stop:
        stop(given.folder.resolve())
    else:
        print(f"export SLURM_CONF={start(given.folder.resolve(), given.nodes)['SLURM_CONF']}")


if __name__ == "__main__":
    main()
