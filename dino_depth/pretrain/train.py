"""The pretraining loop."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dino_depth import checkpoint, distributed
from dino_depth.compiled import compiling, probe_compiler
from dino_depth.config import PretrainConfig
from dino_depth.device import autocast, gpu_figures, has_bfloat16_units, pick_device, reuse_memory
from dino_depth.errors import ConfigError, Interrupted, ReportedError
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.crops import check_crops
from dino_depth.pretrain.distill import check_second_teacher
from dino_depth.pretrain.health import measure
from dino_depth.pretrain.in_loop import Evaluations, check_evaluation
from dino_depth.pretrain.initialize import initialize
from dino_depth.pretrain.loading import make_loader, next_batch, on_device, open_maps, order_of
from dino_depth.pretrain.maps import Maps
from dino_depth.pretrain.optim import clip, schedule, set_rates
from dino_depth.pretrain.overlap import Behind, ahead
from dino_depth.pretrain.run_folder import RunFolder
from dino_depth.pretrain.state import TrainingState
from dino_depth.pretrain.stop import Stop
from dino_depth.pretrain.student_teacher import Networks, Student, teacher_targets, update_teacher
from dino_depth.pretrain.surface_loss import check_surface_loss
from dino_depth.progress import Progress, peak_memory
from dino_depth.shards import DepthShards
from dino_depth.terminal import TerminalWarnings
from dino_depth.vit import probe_attention

__all__ = ["check_settings", "pretrain"]

BAD_STEPS = 3  # steps without a finite loss, in a row, that end a run
SCHEDULED = ("lr", "weight_decay", "momentum", "teacher_temperature")


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
    loss = config.loss
    if not (0 < loss.mask_ratio[0] <= loss.mask_ratio[1] <= 1) or not 0 <= loss.mask_share <= 1:
        found = f"{list(loss.mask_ratio)} and {loss.mask_share}"
        raise ConfigError(f"loss.mask_ratio needs 0 < low <= high <= 1 and loss.mask_share 0 to 1, got {found}")
    for name in ("dino", "ibot", "koleo", "dense", "surface"):
        if not 0 <= (weight := getattr(loss, f"{name}_weight")) < math.inf:
            raise ConfigError(f"loss.{name}_weight must be at least 0 and finite, got {weight}")
    for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
        if not getattr(loss, name) > 0:
            raise ConfigError(f"loss.{name} must be above 0, got {getattr(loss, name)}")
    for name in ("lr", "clip"):
        if not getattr(config.optim, name) > 0:
            raise ConfigError(f"optim.{name} must be above 0, got {getattr(config.optim, name)}")
    check_second_teacher(config)
    check_surface_loss(config)
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
    with Stop(config.out) as stop, contextlib.ExitStack() as closing:
        distributed.start(device, config.train.timeout)
        if distributed.rank() == 0:
            log.handlers = [TerminalWarnings()]
        closing.callback(distributed.stop)
        try:
            with distributed.naming_the_cause():
                _run(config, device, stop, closing)
        except Exception as error:
            log.error("%s", error)
            raise


def _run(config: PretrainConfig, device: torch.device, stop: Stop, closing: contextlib.ExitStack):
    shards = DepthShards.configured(config.data)
    check_settings(config, distributed.world_size(), shards)
    _check_attention(config, device)
    state = TrainingState.begin(config, device)
    if config.init_from and not checkpoint.checkpoints(Path(config.out)):
        initialize(state.student, config.init_from)
        state.teacher.load_state_dict(state.student.state_dict())
    run = closing.enter_context(contextlib.closing(RunFolder(config, shards)))
    if found := checkpoint.newest(run.path):
        state.restore(found[1])
    distributed.require_equal("the step they start from", state.step)
    distributed.require_equal_weights(state.networks, state.step)
    maps = open_maps(shards, config.data, device)
    run.open_metrics(state.step)
    _say_how_it_begins(config, device, state.step, run)
    evaluations = closing.enter_context(Evaluations(config, run))
    with compiling(config.train.compile), _batches(maps, config, state.step, device) as batches:
        stop.steps = True
        _loop(config, device, batches, state, run, evaluations, stop)
    evaluations.finish(stop)


def _say_how_it_begins(config: PretrainConfig, device: torch.device, first: int, run: RunFolder):
    lengths = {"optim.warmup": config.optim.warmup}
    if config.loss.needs_teacher:
        lengths["loss.teacher_temperature_warmup"] = config.loss.teacher_temperature_warmup
        lengths["optim.freeze_last_layer"] = config.optim.freeze_last_layer
    for name, steps in lengths.items():
        if steps > config.train.steps // 2:
            run.log.warning(
                "%s is %d of train.steps %d: it was meant for a longer run", name, steps, config.train.steps
            )
    products = "bfloat16" if config.train.precision == "bf16" and has_bfloat16_units(device) else "float32"
    begun, ranks = "resumed" if first else "started", distributed.world_size()
    where = f"{ranks} x {device.type}" if ranks > 1 else device
    run.log.info("%s at step %d of %d on %s, %s products", begun, first, config.train.steps, where, products)


@contextlib.contextmanager
def _batches(maps: Maps, config: PretrainConfig, first_step: int, device: torch.device):
    """An iterator over the batches of every pass of every step."""
    loader = make_loader(maps, config, first_step, device)
    passes = range((config.train.steps - first_step) * config.train.accumulate)
    try:
        yield ahead((on_device(next_batch(loader), maps, device) for _ in passes), device)
    finally:
        # An error's traceback would keep the iterator alive, and with it the worker processes.
        getattr(loader, "_shutdown_workers", lambda: None)()


def _save(state: TrainingState, run: RunFolder, keep: int):
    distributed.note(state.step, "writing a checkpoint")
    distributed.require_equal_weights(state.networks, state.step)
    if run.writes:
        checkpoint.save(state.saved(), checkpoint.checkpoint_path(run.path, state.step))
        checkpoint.prune(run.path, keep)
        run.log.info("checkpoint after step %d", state.step)
    distributed.barrier()  # a rank that ended now could take the one that writes with it


def _judge(state: TrainingState, run: RunFolder, step: int, failed: float, loss: float, norms: list[float]):
    """Counts steps without a finite loss.

    Raises:
        ReportedError: there were ``BAD_STEPS`` in a row.
    """
    if not failed:
        state.bad = 0
        return
    state.bad += 1
    run.log.warning("step %d skipped: loss %s, gradient norms %s", step, loss, norms)
    if state.bad == BAD_STEPS:
        good = checkpoint.checkpoints(run.path)
        where = good[-1] if good else "none yet"
        raise ReportedError(f"step {step}: loss not finite {state.bad} times in a row; last good checkpoint: {where}")


def _loop(
    config: PretrainConfig,
    device: torch.device,
    batches: Iterator[Batch],
    state: TrainingState,
    run: RunFolder,
    evaluations: Evaluations,
    stop: Stop,
):
    train, passes, ranks = config.train, config.train.accumulate, distributed.world_size()
    student, teacher, optimizer = state.student, state.teacher, state.optimizer
    since, since_step, seconds_waiting = time.perf_counter(), state.step, 0.0
    progress = Progress("pretrain", train.steps, "steps", state.step) if run.writes else contextlib.nullcontext()
    paying, behind = Student(student, config), Behind(device)
    if ranks > 1:
        paying = DistributedDataParallel(paying, gradient_as_bucket_view=True)

    evaluations.update(state.step, teacher)
    with progress:
        for step in range(state.step, train.steps):
            now = schedule(config, step)
            set_rates(optimizer, now)
            sums = {}
            for turn in range(passes):
                distributed.note(step, "reading maps")
                moment = time.perf_counter()
                batch = next(batches)
                seconds_waiting += behind.idle_since(moment)
                distributed.note(step, "computing")
                with contextlib.nullcontext() if ranks == 1 or turn == passes - 1 else paying.no_sync():
                    with autocast(device, train.precision):
                        temperature, iterations = now.teacher_temperature, config.loss.sinkhorn_iterations
                        targets = teacher_targets(teacher, batch, temperature, iterations, state.second)
                        losses = paying(batch, targets)
                    (losses["loss"] / passes).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach() / passes
            norms = clip(student, config.optim.clip)
            finite = torch.isfinite(sums["loss"]) & torch.isfinite(norms).all()
            # Ranks agree, in one reduction, whether a step counts and whether to stop.
            asked = torch.full((), float(stop.asked), device=device)
            flags = distributed.all_sum(torch.stack([(~finite).float(), asked]))
            # Whether to move is decided where the weights are: without a finite loss the student stays as it is.
            optimizer.found_inf = flags[0].clamp(max=1)
            optimizer.step()
            update_teacher(teacher, student, now.momentum)
            optimizer.zero_grad()
            behind.put(step, torch.cat([flags, sums["loss"][None], norms]))
            state.step = done = step + 1

            # From here on the host waits for the device, but not after a plain step.
            health_due = done % config.health.every == 0 and targets.classes is not None
            logged, kept = done % train.log_every == 0 or health_due, done % train.checkpoint_every == 0
            rows = behind.take(logged or kept or done == train.steps)
            stopping = stop.asked if ranks == 1 else any(row[1] for _, row in rows)
            rows += behind.take(True) if stopping else []
            for number, (failed, _, loss, *parts) in rows:
                _judge(state, run, number, failed, loss, parts)
            health = measure(targets, done // config.health.every % 10 == 1) if health_due and not state.bad else {}
            if logged or done == train.steps:
                elapsed = time.perf_counter() - since
                figures = _figures(sums, norms, student, torch.full((), seconds_waiting, device=device))
                figures["speed/data_wait"] /= elapsed
                figures |= {f"schedule/{name}": float(getattr(now, name)) for name in SCHEDULED}
                figures |= {f"health/{name}": value for name, value in health.items()}
                figures |= {"speed/maps_per_second": (done - since_step) * train.batch / elapsed}
                figures |= {"speed/peak_memory_gib": peak_memory() / 2**30}
                figures |= {f"speed/{name}": value for name, value in gpu_figures(device).items()}
                run.write_metrics(done, figures)
                since, since_step, seconds_waiting = time.perf_counter(), done, 0.0
            if health:
                state.gate.check(health, done)
            stopping = stopping and done < train.steps
            # While losses are not finite, older checkpoints are the better ones to keep.
            if (kept and not state.bad) or done == train.steps or stopping:
                _save(state, run, train.keep)
            evaluations.update(done, teacher)
            if run.writes:
                progress.advance(1, f"loss {rows[-1][1][2]:.3f}" if rows else "")
            if stopping:
                raise Interrupted(f"{run.path}: stopped after step {done} by {stop.name}; continue with --resume")


def _figures(sums: dict[str, Tensor], norms: Tensor, student: Networks, waited: Tensor) -> dict[str, float]:
    """Losses of all ranks, gradient norms, and the seconds that the slowest rank waited for data, read at once."""
    ranks = distributed.world_size()
    means = distributed.all_sum(torch.stack([*sums.values()])).div_(ranks)
    names = ["loss" if name == "loss" else f"loss/{name}" for name in sums]
    names += [f"gradient/{name}" for name, _ in student.named_children()] + ["speed/data_wait"]
    values = torch.cat([means, norms, distributed.all_max(waited)[None]])
    return dict(zip(names, values.tolist(), strict=True))
