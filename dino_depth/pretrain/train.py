"""The pretraining loop."""

import contextlib
import logging
import signal
import threading
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from dino_depth import distributed
from dino_depth.compiled import compiling, probe_compiler
from dino_depth.config import PretrainConfig
from dino_depth.device import autocast, has_bfloat16_units, pick_device, reuse_memory
from dino_depth.errors import ConfigError, Interrupted, ReportedError
from dino_depth.pretrain import checkpoint
from dino_depth.pretrain.crops import check_crops
from dino_depth.pretrain.health import CollapseGate, measure
from dino_depth.pretrain.in_loop import Evaluations, check_evaluation
from dino_depth.pretrain.initialize import initialize
from dino_depth.pretrain.loading import SIGNALS, make_loader, next_crops, order_of, place
from dino_depth.pretrain.optim import build_optimizer, clip, schedule, set_rates
from dino_depth.pretrain.resident import ResidentMaps
from dino_depth.pretrain.run_folder import RunFolder
from dino_depth.pretrain.shards import DepthShards
from dino_depth.pretrain.student_teacher import Batch, Networks, Student, teacher_targets, update_teacher
from dino_depth.progress import Progress, peak_memory
from dino_depth.vit import probe_attention

__all__ = ["check_settings", "pretrain"]

BAD_STEPS = 3  # steps without a finite loss, in a row, that end a run
PARTS = ("backbone", "dino_head", "ibot_head")
SCHEDULED = ("lr", "weight_decay", "momentum", "teacher_temperature")


class _Stop:
    """Remembers that one of ``SIGNALS`` came, so that the loop can stop between two steps."""

    def __enter__(self):
        self.asked, self.name, self._before = False, "another rank", {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.asked, self.name = True, signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_settings(config: PretrainConfig, ranks: int, shards: DepthShards | None = None):
    """Refuses what cannot work on any machine; without ``shards``, what shows before they are there.

    Raises:
        ConfigError: naming the setting.
    """
    train = config.train
    if train.steps < 1 or train.batch < 1 or train.accumulate < 1 or train.keep < 1 or train.checkpoint_every < 1:
        raise ConfigError("train.steps, batch, accumulate, keep and checkpoint_every must be at least 1")
    if not train.timeout > 0:
        raise ConfigError(f"train.timeout must be above 0 seconds, got {train.timeout}")
    if train.batch % (train.accumulate * ranks):
        raise ConfigError(
            f"train.batch {train.batch} must divide by train.accumulate {train.accumulate} times {ranks} processes"
        )
    if train.batch // (train.accumulate * ranks) < 2 and config.loss.koleo_weight:
        raise ConfigError("KoLeo needs at least 2 maps per pass and process: raise train.batch or lower accumulate")
    if shards and (count := order_of(shards, config).count) < train.batch:
        raise ConfigError(f"{config.data.shards}: {count} samples are too few for train.batch {train.batch}")
    check_crops(config.crops, config.model.patch_size)
    if shards:
        check_evaluation(config)


def _check_attention(config: PretrainConfig, device: torch.device):
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    if reason := probe_attention(config.model.attention, device.type, dtype):
        raise ConfigError(f"model.attention {config.model.attention} does not work here: {reason}")
    if config.train.compile and config.model.attention == "xformers":
        raise ConfigError("train.compile needs model.attention grouped or varlen: xformers is compiled anew every step")
    if config.train.compile and (reason := probe_compiler(device)):
        raise ConfigError(f"train.compile does not work here: {reason}")


def pretrain(config: PretrainConfig):
    """Runs, or resumes, a pretraining; see :class:`PretrainConfig`.

    Raises:
        ConfigError: settings that cannot work.
        DataError: a shard or sample is corrupt.
        GateError: the run collapsed or stalled.
        Interrupted: a signal came; a checkpoint is written.
        ReportedError: the loss was not finite three times in a row; another rank failed, is missing or holds other
            weights, and the message names it.
    """
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if device.type == "cpu":
        reuse_memory()
    log = logging.getLogger("dino_depth")
    log.handlers = [logging.NullHandler()]
    distributed.start(device, config.train.timeout)
    with contextlib.ExitStack() as closing:
        closing.callback(distributed.stop)
        try:
            with distributed.naming_the_cause():
                _run(config, device, closing)
        except Exception as error:
            log.error("%s", error)
            raise


def _run(config: PretrainConfig, device: torch.device, closing: contextlib.ExitStack):
    shards = DepthShards.configured(config.data)
    check_settings(config, distributed.world_size(), shards)
    _check_attention(config, device)
    torch.manual_seed(config.train.seed)
    student = Networks(config).to(device)
    teacher = Networks(config).to(device).requires_grad_(False)
    if config.init_from and not checkpoint.checkpoints(Path(config.out)):
        initialize(student, config.init_from)
    teacher.load_state_dict(student.state_dict())
    optimizer = build_optimizer(student, config)
    gate = CollapseGate(config.health, config.train.steps)
    run = closing.enter_context(contextlib.closing(RunFolder(config, shards)))
    first, bad = 0, 0
    if found := checkpoint.checkpoints(run.path):
        state = checkpoint.load(found[-1])
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        gate.restore(state["gate"])
        first, bad = state["step"], state["bad"]
    distributed.require_equal("the step they start from", first)
    distributed.require_equal_weights({"student": student, "teacher": teacher}, first)
    resident = ResidentMaps(shards, config.data, device) if config.data.on_device else None
    if config.data.resident and resident is None:
        shards.make_resident()
    run.open_metrics(first)
    products = "bfloat16" if config.train.precision == "bf16" and has_bfloat16_units(device) else "float32"
    begun, ranks = "resumed" if first else "started", distributed.world_size()
    where = f"{ranks} x {device.type}" if ranks > 1 else device
    run.log.info("%s at step %d of %d on %s, %s products", begun, first, config.train.steps, where, products)
    with compiling(config.train.compile), _Stop() as stop, Evaluations(config, run) as evaluations:
        _loop(config, device, shards, resident, student, teacher, optimizer, gate, run, evaluations, first, bad, stop)
        evaluations.finish(stop)


@contextlib.contextmanager
def _loading(shards: DepthShards, config: PretrainConfig, first_step: int, device: torch.device, resident):
    loader = make_loader(shards, config, first_step, device, resident and resident.validity)
    try:
        yield loader
    finally:
        # An error's traceback would keep the iterator alive, and with it the worker processes.
        getattr(loader, "_shutdown_workers", lambda: None)()


def _loop(config, device, shards, resident, student, teacher, optimizer, gate, run, evaluations, first, bad, stop):
    train, passes, ranks = config.train, config.train.accumulate, distributed.world_size()
    since, since_step, seconds_waiting = time.perf_counter(), first, 0.0
    progress = Progress("pretrain", train.steps, "steps", first) if run.writes else contextlib.nullcontext()

    networks = {"student": student, "teacher": teacher}
    paying = Student(student, config)
    if ranks > 1:
        paying = DistributedDataParallel(paying, gradient_as_bucket_view=True)

    def save(done: int):
        distributed.note(done, "writing a checkpoint")
        distributed.require_equal_weights(networks, done)
        if run.writes:
            state = {"step": done, "bad": bad, "gate": gate.state(), "optimizer": optimizer.state_dict()}
            state |= {name: part.state_dict() for name, part in networks.items()}
            checkpoint.save(state, checkpoint.checkpoint_path(run.path, done))
            checkpoint.prune(run.path, train.keep)
            run.log.info("checkpoint after step %d", done)
        distributed.barrier()  # a rank that ended now could take the one that writes with it

    evaluations.update(first, teacher)
    with progress, _loading(shards, config, first, device, resident) as loader:
        for step in range(first, train.steps):
            now = schedule(config, step)
            set_rates(optimizer, now)
            sums = {}
            for turn in range(passes):
                distributed.note(step, "reading maps")
                waiting = time.perf_counter()
                crops = next_crops(loader, config, step, resident)
                batch = Batch.make(*crops, device, config, step, place(config, turn))
                seconds_waiting += time.perf_counter() - waiting
                distributed.note(step, "computing")
                with contextlib.nullcontext() if ranks == 1 or turn == passes - 1 else paying.no_sync():
                    with autocast(device, train.precision):
                        temperature, iterations = now.teacher_temperature, config.loss.sinkhorn_iterations
                        targets = teacher_targets(teacher, batch, temperature, iterations)
                        losses = paying(batch, targets)
                    (losses["loss"] / passes).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach() / passes
            norms = clip(student, config.optim.clip)
            finite = torch.isfinite(sums["loss"]) & torch.isfinite(norms).all()
            # Ranks agree, in one reduction, whether a step counts and whether to stop.
            flags = torch.stack([~finite, finite.new_tensor(stop.asked)]).int()
            failed, stopping = distributed.read(distributed.all_sum(flags))
            if failed:
                bad += 1
                run.log.warning("step %d skipped: loss %s, gradient norms %s", step, sums["loss"], norms.tolist())
            else:
                bad = 0
                optimizer.step()
                update_teacher(teacher, student, now.momentum)
            optimizer.zero_grad()
            done = step + 1
            if bad == BAD_STEPS:
                good = checkpoint.checkpoints(run.path)
                where = good[-1] if good else "none yet"
                raise ReportedError(f"step {step}: loss not finite {bad} times in a row; last good checkpoint: {where}")
            health = measure(targets) if done % config.health.every == 0 and not failed else {}
            if done % train.log_every == 0 or health or done == train.steps:
                elapsed = time.perf_counter() - since
                means = distributed.all_sum(torch.stack([*sums.values()])).div_(ranks).tolist()
                slowest = float(distributed.all_max(torch.tensor(seconds_waiting, device=device)))
                figures = {
                    "loss" if name == "loss" else f"loss/{name}": mean for name, mean in zip(sums, means, strict=True)
                }
                figures |= {f"schedule/{name}": float(getattr(now, name)) for name in SCHEDULED}
                figures |= {f"gradient/{name}": float(norm) for name, norm in zip(PARTS, norms, strict=True)}
                figures |= {f"health/{name}": value for name, value in health.items()}
                figures |= {"speed/maps_per_second": (done - since_step) * train.batch / elapsed}
                figures |= {"speed/data_wait": slowest / elapsed}
                figures |= {"speed/peak_memory_gib": peak_memory() / 2**30}
                run.write_metrics(done, figures)
                since, since_step, seconds_waiting = time.perf_counter(), done, 0.0
            if health:
                gate.check(health, done)
            stopping = stopping and done < train.steps
            # While losses are not finite, older checkpoints are the better ones to keep.
            if (done % train.checkpoint_every == 0 and not bad) or done == train.steps or stopping:
                save(done)
            evaluations.update(done, teacher)
            if run.writes:
                progress.advance(1, f"loss {float(sums['loss']):.3f}")
            if stopping:
                raise Interrupted(f"{run.path}: stopped after step {done} by {stop.name}; continue with --resume")
