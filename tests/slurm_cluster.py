"""A real Slurm of two nodes on this machine, for tests: its own configuration, ports, key and munge, no accounting.

Both nodes are this machine, so they share its cores and files; their GPUs exist in Slurm's books only. Traps: a
requeued job waits for ``cred_expire`` and one second more, and less than 5 is not accepted; a Unix socket's path must
be short; munge refuses a socket below a folder that others may write, and a key that others may read.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["running_cluster", "unavailable"]

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
NODES = ("n1", "n2")
START_SECONDS = 30
# JobRequeue=0: whatever is requeued in a test asked for it itself.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=0
KillWait=5
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def unavailable() -> str:
    """Why no cluster can be started here; empty where one can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@contextmanager
def running_cluster() -> Iterator[dict[str, str]]:
    """Yields the environment in which Slurm's commands reach the cluster; ends all its processes afterwards."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        stack.callback(_end_stragglers, folder)
        _configure(folder)
        keys = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge/{name}" for option, name in keys.items()]
        stack.enter_context(_daemon(folder, environment, ["munged", "--foreground", *options]))
        _await((folder / "munge" / "socket").exists, folder)
        stack.enter_context(_daemon(folder, environment, ["slurmctld", "-D", "-c"]))
        for node in NODES:
            stack.enter_context(_daemon(folder, environment, ["slurmd", "-D", "-c", "-N", node]))
        _await(lambda: set(_ask(environment, "sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, folder)
        stack.callback(_ask, environment, "scancel", "--full", "--signal=KILL", "--user=root")
        yield environment


def _configure(folder: Path):
    folder.chmod(0o755)
    for name in ("munge", "state"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (folder / "munge" / "key").chmod(0o600)
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [listener.getsockname()[1] for listener in listeners]
    host = socket.gethostname().partition(".")[0]
    (folder / "gres.conf").write_text(
        "NodeName=n[1-2] Name=gpu File=/dev/null\nNodeName=n[1-2] Name=gpu File=/dev/zero\n"
    )
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports))


@contextmanager
def _daemon(folder: Path, environment: dict[str, str], command: list[str]) -> Iterator[None]:
    """Runs a daemon in the foreground, in a session of its own."""
    with (
        open(folder / "daemons.log", "ab") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def _await(ready: Callable[[], bool], folder: Path):
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.rglob("*log")))
            raise RuntimeError(f"the cluster does not start: {logs}")
        time.sleep(0.1)


def _end_stragglers(folder: Path):
    """Kills what still runs under the cluster's configuration: job steps outlive their daemons."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and f"{folder}/".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            pass
