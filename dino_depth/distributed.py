"""Rank, world size and reductions, each the identity in a single process; and who is to blame when a rank is missing.

torch's process group says that a collective failed or timed out, but not which rank kept the others waiting, nor why.
So every rank notes in the group's store what it is doing (:func:`note`) and, when it ends early, its reason; the ranks
that wait for it read both and report them (:func:`naming_the_cause`).
"""

import contextlib
import datetime
import os
import re
import socket
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_depth.errors import ConfigError, Interrupted, ReportedError

__all__ = [
    "all_gather",
    "all_max",
    "all_sum",
    "broadcast",
    "barrier",
    "gather",
    "naming_the_cause",
    "note",
    "rank",
    "require_equal",
    "require_equal_weights",
    "start",
    "stop",
    "wait",
    "world_size",
]

GRACE_SECONDS = 5.0  # how long a rank that failed waits for what the others have to say

_store: dist.Store | None = None
_timeout = 600.0


def start(device: torch.device, timeout: float = 600.0):
    """Joins the process group that torchrun or ``dino-depth submit`` describes; does nothing without one.

    Args:
        timeout: seconds that a rank waits for another before it gives up.

    Raises:
        ConfigError: Slurm started several processes that know nothing of each other.
        ReportedError: not all ranks came in time.
    """
    global _store, _timeout
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError("srun started several processes without a process group: use dino-depth submit, or torchrun")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    wait = datetime.timedelta(seconds=timeout)
    try:
        store, here, world = next(dist.rendezvous("env://", timeout=wait))
        # torchrun's agent keeps one store over all its restarts, in which addresses of dead ranks are still written.
        store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-of-{world}", store)
        # A GPU's collectives are watched by ``wait``, which can say more; torch's own watchdog is the second line.
        late = wait + datetime.timedelta(seconds=60 if device.type == "cuda" else 0)
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=here, world_size=world, timeout=late, device_id=bound)
        _store, _timeout = dist.PrefixStore("dino-depth", store), timeout
        _store.set(f"host/{rank()}", socket.gethostname())
        barrier()
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise ReportedError(f"rank {os.environ.get('RANK')}: the ranks did not meet: {line}") from None


def stop():
    """Leaves the process group."""
    global _store
    _store = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Returns when every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The first rank's tensor, in place of every rank's; no gradient."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # Every rank computes the same function of the gathered rows, so its own rows' gradient is complete; gradients
        # are averaged over ranks afterwards, which divides by the world size what only one rank contributes.
        return gradient.chunk(world_size())[rank()] * world_size()


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks, (world * rows, ...), with the gradient of a function that all ranks compute alike."""
    return _AllGather.apply(tensor) if world_size() > 1 else tensor


def gather(value) -> list:
    """A small Python value of every rank, in order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait(there: torch.cuda.Event | None):
    """Waits for a GPU to come there; if it has to wait for another rank too long, that is an error instead of a hang.

    Raises:
        DistBackendError: another rank did not answer within the timeout.
    """
    if there is None:
        return
    if world_size() == 1:
        there.synchronize()
        return
    deadline = time.monotonic() + _timeout
    while not there.query():
        if time.monotonic() > deadline:
            raise dist.DistBackendError(f"timed out after {_timeout:.0f} s")
        time.sleep(1e-4)


def require_equal(what: str, value):
    """Refuses ranks that disagree about what all must share.

    Raises:
        ConfigError: on every rank, naming each value.
    """
    values = gather((socket.gethostname(), value))
    if any(other != value for _, other in values):
        listed = "; ".join(f"rank {number} ({host}) {other}" for number, (host, other) in enumerate(values))
        raise ConfigError(f"the ranks differ in {what}: {listed}; do all nodes see the same files?")


def require_equal_weights(networks: dict[str, nn.Module], step: int):
    """Compares the bits of every float32 parameter over all ranks.

    Raises:
        ReportedError: on every rank, naming the ranks that hold other weights than most.
    """
    if world_size() == 1:
        return
    weights = {f"{name}.{key}": value for name, part in networks.items() for key, value in part.named_parameters()}
    bits = torch.stack([value.detach().view(torch.int32).sum(dtype=torch.int64) for value in weights.values()])
    parts = [torch.empty_like(bits) for _ in range(world_size())]
    dist.all_gather(parts, bits)
    rows = torch.stack(parts).cpu()  # (world, parameters)
    usual, count = max(((row, int((rows == row).all(1).sum())) for row in rows), key=lambda found: found[1])
    if count == len(rows):
        return
    odd = (rows != usual).any(1).nonzero().flatten().tolist()
    first = [*weights][int((rows != usual).any(0).nonzero()[0])]
    who = f"rank {_listed(odd)} holds other weights than the rest" if count > len(odd) else "the ranks' weights differ"
    raise ReportedError(
        f"{who} after step {step}, in {first} first: this step is not saved; suspect the hardware or libraries there"
    )


def note(step: int, doing: str):
    """Tells the others what this rank does now."""
    if _store is not None:
        _store.set(f"at/{rank()}", f"{step} {time.time()} {doing}")


@contextlib.contextmanager
def naming_the_cause() -> Iterator[None]:
    """Turns a lost connection into one line that says which rank is missing and why.

    A rank that fails by itself leaves its reason to the others and raises its own error. The others, whose collectives
    fail in consequence, raise a ReportedError with that rank's exit code.
    """
    try:
        yield
    except Interrupted:
        raise  # all ranks agreed to stop
    except Exception as error:
        if _store is None:
            raise
        lost = not isinstance(error, ReportedError) and _is_connection(error)
        line = " ".join(str(error).split())
        with contextlib.suppress(RuntimeError):
            _store.set(f"ended/{rank()}", "" if lost else f"{getattr(error, 'exit_code', 1)} {line}")
        cause, missing = _cause(line) if lost else (None, [])
        _leave(missing)
        if cause is not None:
            raise cause from None
        raise


def _is_connection(error: Exception) -> bool:
    # gloo's failures arrive as plain RuntimeErrors.
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def _cause(line: str) -> tuple[ReportedError, list[int]]:
    """What the store says about the ranks that others wait for, and those that said nothing in time."""
    ranks, deadline = range(world_size()), time.monotonic() + GRACE_SECONDS
    try:
        while True:
            ended = {number: _found(f"ended/{number}") for number in ranks}
            for number, said in ended.items():
                if said:
                    code, _, reason = said.partition(" ")
                    error = ReportedError(f"{_named(number)} failed: {reason}")
                    error.exit_code = int(code)
                    return error, []
            if None not in ended.values() or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        missing = [number for number, said in ended.items() if said is None]
        if not missing:
            return ReportedError(f"rank {rank()}: the ranks lost each other: {line[:200]}"), []
        silent = "; ".join(f"{_named(number)} {_last_seen(number)}" for number in missing)
        return ReportedError(f"{silent}. It is dead or too slow (timeout {_timeout:.0f} s): {line[:160]}"), missing
    except RuntimeError:
        return ReportedError(f"rank 0, whose process keeps the list of ranks, is gone: {line[:200]}"), []


def _found(key: str) -> str | None:
    return _store.get(key).decode() if _store.check([key]) else None


def _named(number: int) -> str:
    return f"rank {number} ({_found(f'host/{number}') or 'unknown host'})"


def _last_seen(number: int) -> str:
    seen = _found(f"at/{number}")
    if seen is None:
        return "has not begun its first step"
    step, moment, doing = seen.split(" ", 2)
    return f"does not answer; it was last seen in step {step}, {doing}, {time.time() - float(moment):.0f} s ago"


def _leave(missing: list[int]):
    """Lets the process that may keep the store for all wait until the others have read it, the ``missing`` excepted."""
    here, others = rank(), [number for number in range(world_size()) if number not in missing]
    with contextlib.suppress(RuntimeError):
        _store.set(f"left/{here}", "")
        if here:
            return
        dist.destroy_process_group()  # closes the connections, by which the others notice
        deadline = time.monotonic() + GRACE_SECONDS + 1
        while not _store.check([f"left/{number}" for number in others]) and time.monotonic() < deadline:
            time.sleep(0.1)


def _listed(numbers: list[int]) -> str:
    return re.sub(r", (\d+)$", r" and \1", ", ".join(map(str, numbers)))
