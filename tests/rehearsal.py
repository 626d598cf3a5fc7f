"""A GPU that computes nothing: the training step runs on it as on a real one, to see what it would be asked to do.

Tensors on the CPU are real. Whatever would lie on the GPU is a fake tensor of torch's, which has a device, a type and a
shape but no values, so that a wrong device or type fails as it would there. A small C library (:func:`stand_in`) stands
in for CUDA's runtime and driver, because autograd, streams and pinned memory ask them; nothing is ever launched.
"""

import contextlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["GPU", "Rehearsal", "rehearsing", "stand_in"]

GPU = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).resolve().parents[1] / "dino_depth") + "/"
# Their results depend on values, in size or as a number: the host waits for everything before them.
NUMBERS = {"_local_scalar_dense", "item", "is_nonzero"}
READS = {"nonzero", "masked_select", "bincount", "equal", "_unique2", "_linalg_svd"}
COPIES = {"copy_", "_to_copy", "to"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# They launch no kernel.
FREE = {
    "device", "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
}  # fmt: skip

STAND_IN = r"""
#include <stdlib.h>
#include <string.h>
#define ZERO(name) int name(void) { return 0; }
static void *pinned[1 << 16]; static int count;
int cudaHostAlloc(void **p, size_t n, unsigned f) { *p = pinned[count++ % (1 << 16)] = malloc(n); return 0; }
int cudaFreeHost(void *p) { return 0; }
int cudaPointerGetAttributes(int *a, const void *p) {
  memset(a, 0, 32);
  for (int i = 0; i < count && i < 1 << 16; i++) if (pinned[i] == p) a[0] = 1;
  return 0;
}
static int set(int *out, int value) { *out = value; return 0; }
int cudaGetDevice(int *d) { return set(d, 0); }
int cudaGetDeviceCount(int *d) { return set(d, 1); }
int cudaDriverGetVersion(int *v) { return set(v, 13000); }
int cudaRuntimeGetVersion(int *v) { return set(v, 13000); }
int cudaDeviceGetAttribute(int *v) { return set(v, 0); }
int cudaStreamIsCapturing(void *s, int *v) { return set(v, 0); }
int cudaStreamGetCaptureInfo(void *s, int *v) { return set(v, 0); }
int cudaStreamGetCaptureInfo_v2(void *s, int *v) { return set(v, 0); }
int cudaDeviceGetStreamPriorityRange(int *a, int *b) { *b = -1; return set(a, 0); }
int cudaEventElapsedTime(float *f) { *f = 1; return 0; }
int cudaEventCreateWithFlags(void **e, unsigned f) { *e = malloc(8); return 0; }
int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { *s = malloc(8); return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = (size_t)141 << 30; return 0; }
/* memory, warp, threads of a block, capability: where CUDA 12 and 13 agree */
int cudaGetDeviceProperties(char *p, int d) {
  memset(p, 0, 1008); strcpy(p, "stand-in");
  *(size_t *)(p + 288) = (size_t)141 << 30; *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024; *(int *)(p + 360) = 9;
  return 0;
}
int cudaGetDeviceProperties_v2(char *p, int d) { return cudaGetDeviceProperties(p, d); }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; return set(active, 1); }
static int nothing(void) { return 0; }
static int entry(const char *name, void **f) {
  *f = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)cuDevicePrimaryCtxGetState; return 0;
}
int cudaGetDriverEntryPointByVersion(const char *n, void **f, unsigned v, unsigned long long g, int *s) {
  if (s) *s = 0; return entry(n, f);
}
int cudaGetDriverEntryPoint(const char *n, void **f, unsigned long long g, int *s) {
  if (s) *s = 0; return entry(n, f);
}
"""
SUCCEED = (
    "cudaDeviceSynchronize cudaEventDestroy cudaEventQuery cudaEventRecord cudaEventRecordWithFlags "
    "cudaEventSynchronize cudaFree cudaGetLastError cudaPeekAtLastError cudaSetDevice cudaStreamQuery "
    "cudaStreamSynchronize cudaStreamWaitEvent cudaThreadExchangeStreamCaptureMode"
).split()


def stand_in(folder: Path) -> dict[str, str] | str:
    """Builds the library; the environment in which a process takes it for CUDA, or why there is none."""
    if not sys.platform.startswith("linux") or not torch.backends.cuda.is_built():
        return "torch is built without CUDA"
    if torch.cuda.is_available():
        return "there is a real GPU"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return "no C compiler"
    # torch loads its interface to the driver whole: every name in it has to be there.
    loaded = Path(torch.__file__).with_name("lib") / "libcaffe2_nvrtc.so"
    wanted = {name.decode() for name in re.findall(rb"\x00(cu[A-Z]\w+)(?=\x00)", loaded.read_bytes())}
    names = [*SUCCEED, *sorted(wanted - {"cuDevicePrimaryCtxGetState"})]
    source, library = folder / "stand_in.c", folder / "libcuda.so.1"
    source.write_text(STAND_IN + "\n".join(f"ZERO({name})" for name in names) + "\n")
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"LD_PRELOAD": str(library)} if done.returncode == 0 else f"{compiler}: {done.stderr.strip()[:300]}"


class Rehearsal(TorchDispatchMode):
    """Inside, tensors of the GPU are fake, and what it is asked to do is recorded. What is read of it is 0.

    Args:
        values: each fake tensor then has a twin on the CPU, to which the same is done: what is read are its values.
            Devices, types and shapes are still those that the GPU would be asked for, and both must agree on them.

    Attributes:
        calls: operations that launch kernels: number by (``file:function: operation``, types it writes); of autograd's
            own, the operation alone.
        bytes: read and written by them, each argument and result once.
        waits: where the host waits for the GPU, ``file:function: operation``.
    """

    def __init__(self, values: bool = False):
        super().__init__()
        self.fake, self.values = FakeTensorMode(allow_non_fake_inputs=True), values
        self.forget()

    def forget(self):
        self.calls, self.bytes, self.waits = Counter(), 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inside = [leaf for leaf in tensors if isinstance(leaf, FakeTensor)]
        device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if not inside and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if name == "record_stream":
            return None
        result = self._read(func, name, args, kwargs, device) if inside else None
        if result is not None:
            return result
        outside = any(leaf.dim() for leaf in tensors if not isinstance(leaf, FakeTensor))
        unpinned = any(not leaf.is_pinned() for leaf in tensors if not isinstance(leaf, FakeTensor))
        # Copied from the host; an index that lies there is copied too.
        if (outside or name in COPIES and unpinned) and not _waits_not(name, args, kwargs):
            self.waits[_where(name)] += 1
        by_value = name in READS or (
            name in INDEXING and any(part is not None and part.dtype == torch.bool for part in args[1])
        )
        if by_value:
            self.waits[_where(name)] += 1
        twin = func(*self._twins(args), **self._twins(kwargs)) if self.values else None
        if by_value and self.values:
            result = tree_map_only(torch.Tensor, lambda part: self._without_content(part, inside[0].device), twin)
        else:
            args, kwargs = tree_map_only(torch.Tensor, self._without_content, (args, kwargs))
            with self.fake:
                result = func(*args, **kwargs)
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if self.values:
            twins = [leaf for leaf in tree_leaves(twin) if isinstance(leaf, torch.Tensor)]
            for leaf, part in zip(found, twins, strict=True):
                assert (leaf.shape, leaf.dtype) == (part.shape, part.dtype), (name, leaf, part)
                leaf.twin = part
        if not func.is_view and name not in FREE:
            written = sorted({str(leaf.dtype).removeprefix("torch.") for leaf in found or inside})
            self.calls[_where(name), ",".join(written)] += 1
            self.bytes += sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in [*inside, *found]}.values())
        return result

    def _read(self, func, name: str, args: tuple, kwargs: dict, device: torch.device | None):
        """The result of what brings something to the host; None for anything else."""
        if name in NUMBERS:
            found = args[0].twin if self.values else torch.zeros((), dtype=args[0].dtype)
            result = bool(found) if name == "is_nonzero" else found.item()
        elif name in COPIES and name != "copy_" and device is not None and device.type == "cpu":
            if self.values:
                result = func(*self._twins(args), **self._twins(kwargs)).clone()
            else:
                result = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif name == "copy_" and not isinstance(args[0], FakeTensor):
            result = args[0].copy_(args[1].twin) if self.values else args[0].zero_()
        else:
            return None
        if not _waits_not(name, args, kwargs):
            self.waits[_where(name)] += 1
        return result

    def _twins(self, arguments):
        """``arguments`` as a CPU would be given them."""
        arguments = tree_map_only(FakeTensor, lambda part: part.twin, arguments)
        return tree_map_only(torch.device, lambda _: torch.device("cpu"), arguments)

    def _without_content(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return FakeTensor(self.fake, tensor.detach().to("meta"), device or tensor.device)


@contextlib.contextmanager
def rehearsing(values: bool = False) -> Iterator[Rehearsal]:
    """A :class:`Rehearsal`, and what torch does to a GPU's tensors where no dispatch mode sees it."""
    tensor, get_item, set_item = torch.tensor, torch.Tensor.__getitem__, torch.Tensor.__setitem__

    def on_the_device(index, device: torch.device):
        return tensor(index).to(device) if isinstance(index, list) else index

    def made(*values, device=None, **options):
        there = device is not None and torch.device(device).type == "cuda"
        return tensor(*values, **options).to(device) if there else tensor(*values, device=device, **options)

    def numpy(values: FakeTensor, **_):
        raise TypeError("a tensor of the GPU is no array")

    # Which functions a device is set for, torch lists once: of its own, not of those below.
    with torch.device("cpu"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        # A module's weights become fake tensors.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        patch.setattr(torch, "tensor", made)
        patch.setattr(torch.Tensor, "__getitem__", lambda self, i: get_item(self, on_the_device(i, self.device)))
        patch.setattr(
            torch.Tensor, "__setitem__", lambda self, i, value: set_item(self, on_the_device(i, self.device), value)
        )
        patch.setattr(FakeTensor, "tolist", lambda values: values.cpu().tolist())  # not number by number
        patch.setattr(FakeTensor, "numpy", numpy)
        # A twin has no operations of cuDNN.
        with torch.backends.cudnn.flags(enabled=not values), Rehearsal(values) as rehearsal:
            yield rehearsal


def _waits_not(name: str, args: tuple, kwargs: dict) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def _where(name: str) -> str:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_code.co_name}: {name}" if frame else name
