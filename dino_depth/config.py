"""Typed configuration: dataclasses filled from YAML files and dotted command-line overrides.

A command's configuration is a dataclass. ``parse`` reads ``--config FILE`` (a path, or the name of a shipped file) and
``--group.key value``; a key that does not exist is an error that suggests the nearest one.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dino_depth.depth import Normalization
from dino_depth.errors import ConfigError
from dino_depth.settings import RepeatedKey, in_words, kind_of, load_yaml, takes_null, takes_table
from dino_depth.urls import is_url, refuse_secrets, refuse_url

__all__ = [
    "CropConfig", "DataConfig", "DistillConfig", "HealthConfig", "LossConfig", "ModelConfig", "OptimConfig",
    "PretrainConfig", "TrainConfig", "config_keys", "find_config", "load_config", "parse", "save_config", "suggestion",
]  # fmt: skip

KEY = re.compile(r'Parser key "([^"]+)"')  # of jsonargparse's messages
LONGEST_VALUE = 80
WRITTEN = ("out", "cache", "staging")  # what settings are called that name a folder to write to
ASKING = ("-h", "--help", "--print_config")

Options = list[tuple[str, str | None]]


@dataclass
class DataConfig:
    """Where the depth maps come from.

    Attributes:
        shards: shard folder made by ``prep``, local or at an fsspec URL, or a list of them.
        cache: folder for copies of remote shards; empty means ``$DINO_DEPTH_CACHE``, else ``~/.cache/dino-depth``.
        cache_gib: size that these copies never exceed, GiB.
        splits: splits to train on; empty means all of them (the paper's split A counts every split).
        workers: data-loading processes; 0 decodes in the training process.
        resident: keep every decoded map in memory (16 bits a pixel), once for all processes of a machine.
        on_device: keep every normalised map on the training device instead (16 bits a pixel), and make the crops there.
        mixing: relative weight of each dataset; empty means by size, so that an epoch sees every map exactly once.
        window: read the maps of so many shards in random order, then those of the next, drawn anew each epoch; for
            shards at URLs that exceed the cache. 0: all maps in random order.
        one_per_group: an epoch sees one map of each scene, in turn; off, as the paper's splits count every map.
        normalization: how depth becomes the network's input.
    """

    shards: str | list[str] = ""
    cache: str = ""
    cache_gib: float = 100.0
    splits: list[str] = field(default_factory=list)
    workers: int = 8
    resident: bool = False
    on_device: bool = False
    mixing: dict[str, float] = field(default_factory=dict)
    window: int = 0
    one_per_group: bool = False
    normalization: Normalization = field(default_factory=Normalization)


@dataclass
class CropConfig:
    """Spatial-only multi-crop; there are always two global crops.

    Attributes:
        global_size: side of a global crop, pixels.
        local_size: side of a local crop, pixels.
        sizes: further (global, local) sides. A step's crops then have one of these sizes or the two above, each as
            often; learned positions are stored at ``global_size``.
        local_crops: local crops per map.
        global_scale: share of the map's area that a global crop covers, smallest and largest.
        local_scale: the same for local crops.
        aspect: width over height of a crop before rotation, smallest and largest.
        rotation: largest rotation either way, degrees.
        horizontal_flip: probability.
        vertical_flip: probability.
        minimum_valid: a crop with a smaller share of valid pixels is drawn again.
    """

    global_size: int = 224
    local_size: int = 98
    sizes: list[tuple[int, int]] = field(default_factory=list)
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    rotation: float = 180.0
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    minimum_valid: float = 0.25


@dataclass
class ModelConfig:
    """The Vision Transformer; the defaults are ViT-S/14.

    Attributes:
        patch_size: side of a patch, pixels.
        dim: token dimension; with ``depth`` and ``heads`` 384, 12, 6 for ViT-S; 768, 12, 12 for B; 1024, 24, 16 for L.
        depth: transformer blocks.
        heads: attention heads.
        registers: tokens beside the class token that belong to no patch (Darcet et al. 2024).
        positions: ``learned``, a vector a patch as in DINO-v2, or ``rotary`` as in DINO-v3 and the ModMap release.
        drop_path: share of samples that skip a residual branch in training (uniform over depth).
        layer_scale: initial value of the residual branches' scale.
        initialization: of the linear layers: ``dinov2`` (truncated normal, 0.02) or ``xavier`` (short trainings).
        attention: backend of packed attention: ``grouped`` (exact everywhere), ``varlen`` or ``xformers`` (CUDA).
        checkpoint_activations: compute the inside of residual branches a second time in the backward pass instead of
            keeping it: a quarter more work for a seventh of the memory.
    """

    patch_size: int = 14
    dim: int = 384
    depth: int = 12
    heads: int = 6
    registers: int = 0
    positions: Literal["learned", "rotary"] = "learned"
    drop_path: float = 0.3
    layer_scale: float = 1e-5
    initialization: Literal["dinov2", "xavier"] = "dinov2"
    attention: Literal["grouped", "varlen", "xformers"] = "grouped"
    checkpoint_activations: bool = False


@dataclass
class LossConfig:
    """DINO on the class token, iBOT on masked patches, KoLeo on the class token, and on request two losses of patches.

    Attributes:
        prototypes: outputs of each of the two heads.
        hidden: width of the heads' hidden layers.
        bottleneck: dimension of the normalised features that meet the prototypes.
        dino_weight: weight of the DINO loss.
        ibot_weight: weight of the iBOT loss.
        koleo_weight: weight of the KoLeo regulariser.
        dense_weight: weight of the loss between patches of the two global crops that see the same place; 0 leaves it
            out, as the published recipe does. It shares the head of iBOT.
        surface_weight: weight of the loss by which every patch, hidden or not, tells the slopes and the curvature of
            its own input; 0 leaves it out likewise. Made for inputs that grow towards the camera, as ``plane`` does.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, after its warm-up.
        teacher_temperature_start: of the teacher's, at step 0.
        teacher_temperature_warmup: steps to get there.
        sinkhorn_iterations: of the teacher's centering; 0 leaves the teacher uncentred, which collapses.
        mask_share: share of the global crops that are masked.
        mask_ratio: masked share of such a crop's patches, smallest and largest.
    """

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    dense_weight: float = 0.0
    surface_weight: float = 0.0
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: int = 37500
    sinkhorn_iterations: int = 3
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss that reads the moving average's targets, or that stands beside them, has a weight."""
        return any((self.dino_weight, self.ibot_weight, self.koleo_weight, self.dense_weight))


@dataclass
class DistillConfig:
    """A second teacher, frozen; alone, if the weights of the losses above are 0.

    Attributes:
        teacher: name of a frozen encoder that sees depth, see docs/encoders.md; empty: none, the published recipe.
        class_weight: weight of the cosine distance between class tokens.
        patch_weight: weight of the cosine distance between patches.
        size: side of the teacher's input, pixels; 0: that of the global crops, to the nearest multiple of its patches.
    """

    teacher: str = ""
    class_weight: float = 1.0
    patch_weight: float = 1.0
    size: int = 0


@dataclass
class OptimConfig:
    """AdamW and its schedules.

    Attributes:
        lr: learning rate at a global batch of 1024; scaled by sqrt(batch / 1024).
        lr_end: learning rate at the last step.
        warmup: steps of linear warm-up.
        layer_decay: factor on the learning rate per block, from the last to the first.
        patch_embed_lr: further factor on the patch embedding's learning rate.
        freeze_last_layer: steps in which the prototypes do not move.
        weight_decay: at step 0.
        weight_decay_end: at the last step (cosine).
        betas: of AdamW.
        clip: largest gradient norm of each of backbone, DINO head, iBOT head.
        momentum: of the teacher at step 0; rises to ``momentum_end`` (cosine).
        momentum_end: at the last step.
    """

    lr: float = 4e-3
    lr_end: float = 1e-6
    warmup: int = 12500
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    freeze_last_layer: int = 1250
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0
    momentum: float = 0.992
    momentum_end: float = 1.0


@dataclass
class HealthConfig:
    """The collapse gate, on the teacher's targets (see ``dino_depth/pretrain/health.py``).

    Attributes:
        every: steps between measurements; the gate looks at the mean of the last ``window`` of them.
        window: measurements the gate averages over.
        grace: share of the run's steps, and at least ``window`` measurements, before the gate is armed.
        mean_entropy: smallest entropy of the mean target over log K: below it, few prototypes take everything.
        target_entropy: largest entropy of a single target over log K: above it, targets carry no information.
        used: smallest share of the reachable prototypes that are some target's favourite.
    """

    every: int = 10
    window: int = 10
    grace: float = 0.25
    mean_entropy: float = 0.5
    target_entropy: float = 0.95
    used: float = 0.05


@dataclass
class TrainConfig:
    """Length, batch, precision and bookkeeping.

    Attributes:
        steps: optimisation steps.
        batch: maps per step over all processes.
        accumulate: backward passes per step; ``batch`` must divide by it times the number of processes.
        precision: of matrix products: ``bf16`` (autocast; float32 on CPUs without bfloat16 units) or ``fp32``.
        compile: fuse what lies between matrix products with torch.compile, which takes a minute or two at the start.
        seed: of everything random.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        log_every: steps between lines of ``metrics.jsonl``.
        evaluate_every: steps between probes of held-out maps, beside the training and on the CPU; 0 leaves them out.
        evaluate_shards: shards of these maps, where training sees every split of its own.
        evaluate_splits: splits that are scored; empty means every one that is not trained on.
        best_by: figure of the probe that names the best step.
        threads: torch threads in this process; 0 keeps torch's choice.
        timeout: seconds that a rank waits for another before the run ends and names it.
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
    """

    steps: int = 125000
    batch: int = 128
    accumulate: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 1250
    keep: int = 3
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_shards: str | list[str] = ""
    evaluate_splits: list[str] = field(default_factory=list)
    best_by: Literal["normal", "normal_z", "curvature", "knn_class", "knn_patch"] = "normal"
    threads: int = 0
    timeout: float = 600.0
    device: Literal["auto", "cuda", "cpu"] = "auto"


@dataclass
class PretrainConfig:
    """Pretrain the depth encoder: shards in, run folder out.

    Attributes:
        out: run folder; must be empty or new unless ``resume``.
        resume: continue the run in ``out`` from its last checkpoint.
        init_from: checkpoint, run, export or ``.pth`` of DINO-v3's training code whose weights start a *new* run;
            the heads of a run come along where they fit. Or a network of pictures, ``transformers:DIR_OR_ID`` or
            ``timm:NAME``, whose three input channels become one.
        data: where the depth maps come from.
        crops: spatial-only multi-crop.
        model: the Vision Transformer.
        loss: DINO, iBOT and KoLeo.
        distill: a frozen encoder as a second teacher.
        optim: AdamW and its schedules.
        health: the collapse gate.
        train: length, batch, precision and bookkeeping.
    """

    out: str = ""
    resume: bool = False
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def config_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration dataclass."""
    keys = []
    for entry in fields(cls):
        keys.append(prefix + entry.name)
        if is_dataclass(entry.type):
            keys += config_keys(entry.type, keys[-1] + ".")
    return keys


def suggestion(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def find_config(name: str) -> Path:
    """The configuration file at a path, or the shipped one of that name (``pretrain_demo``, ``configs/prep/a.yaml``).

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    here = Path(__file__).resolve().parent
    # Installed, the files lie inside the package; in a checkout, beside it.
    shipped = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    short = re.sub(r"^\.?/?(configs/)?", "", name).removesuffix(".yaml")
    if (shipped / f"{short}.yaml").is_file():
        return shipped / f"{short}.yaml"
    known = sorted(str(path.relative_to(shipped).with_suffix("")) for path in shipped.rglob("*.yaml"))
    raise ConfigError(f"--config {name}: no such file{suggestion(short, known)} (shipped: {', '.join(known)})")


def parse(cls: type, arguments: list[str], program: str, positional: tuple[str, ...] = ()) -> Any:
    """Fills the dataclass ``cls`` from command-line arguments.

    Args:
        program: shown in usage lines.
        positional: fields that may be given by position instead of as ``--name``; the last may end with "..." and is
            then a list.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a missing argument or an unreadable file; a URL that
            holds a password or the like, or any for a folder that is written to, but an ``out`` where the class says
            ``writes_to_urls``.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    usage = " ".join([program, *(name.upper() for name in positional), "[--key value ...]"])
    description = (cls.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=program, usage=usage, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file, or the name of a shipped one")
    parser.add_class_arguments(cls, None, fail_untyped=True)
    options = _spell_out(cls, arguments, positional)
    _check_options(cls, options, positional)
    try:
        values = parser.parse_args([option if value is None else f"{option}={value}" for option, value in options])
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), cls, parser, options)) from None
    values.pop("config", None)
    config = cls(**vars(parser.instantiate(values)))
    for key, text in _texts(asdict(config)):
        name = key.rpartition(".")[2]
        if name in WRITTEN and not (name == "out" and getattr(cls, "writes_to_urls", False)):
            refuse_url(text, key)
        # A licence is words, which a run folder and a card repeat; every other URL is a place.
        if is_url(text) and not key.endswith("licence"):
            refuse_secrets(text, key)
    return config


def _spell_out(cls: type, arguments: list[str], positional: tuple[str, ...]) -> Options:
    """Options and values: positions become options, names of shipped files paths, and a bare boolean option true."""
    switches = {"--" + entry.name for entry in fields(cls) if entry.type is bool}
    options: Options = []
    waiting, listed = list(positional), []
    several = waiting.pop().removesuffix("...") if waiting and waiting[-1].endswith("...") else ""
    words = pairwise([*arguments, "--"])
    for argument, following in words:
        option, equals, value = argument.partition("=")
        option = option.replace("-", "_").replace("__", "--", 1)
        if argument == "-h":
            options.append((argument, None))
        elif not argument.startswith("--"):
            if waiting:
                options.append(("--" + waiting.pop(0), argument))
            elif several:
                listed.append(argument)
            else:
                options.append((argument, None))
        elif equals:
            options.append((option, value))
        elif option in switches and following.lower() not in ("true", "false"):
            options.append((option, "true"))
        elif option in ASKING or following.startswith("--"):
            options.append((option, None))
        else:
            options.append((option, following))
            next(words, None)
    if listed:
        options.append(("--" + several, json.dumps(listed)))
    return [(option, str(find_config(value)) if option == "--config" and value else value) for option, value in options]


def _check_options(cls: type, options: Options, positional: tuple[str, ...]):
    """Refuses what jsonargparse would refuse in its own words, or take: unknown keys, groups that are none, null."""
    known = config_keys(cls)
    for option, value in options:
        key = option.removeprefix("--").removesuffix("+")
        if option not in ASKING and (not option.startswith("--") or (key != "config" and not kind_of(cls, key))):
            raise ConfigError(f"unknown argument {option!r}{suggestion(option, ['--' + key for key in known])}")
        if option not in ASKING and (value is None or (key == "config" and not value)):
            raise ConfigError(f"{option} needs a value")
    given = set()
    for place, key, value in _settings(cls, options):
        kind = kind_of(cls, key)
        if kind is None:
            raise ConfigError(f"{place}unknown key {key!r}{suggestion(key, known)}")
        if is_dataclass(kind) or (value is None and not takes_null(kind)):
            raise ConfigError(f"{place or '--'}{key} must be {in_words(kind)}, got {_shown(value)}")
        given.add(key)
    required = [entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING]
    for name in required:
        if name not in given and not any(option in ASKING for option, _ in options):
            is_position = name in [word.removesuffix("...") for word in positional]
            raise ConfigError(f"missing argument {name.upper()}" if is_position else f"--{name} is missing")


def _settings(cls: type, options: Options) -> Iterator[tuple[str, str, Any]]:
    """The place, the dotted key and the value of every setting, those of files and groups one by one."""
    for option, value in options:
        key = option.removeprefix("--").removesuffix("+")
        if option in ASKING or value is None:
            continue
        if key == "config":
            yield from _nested(cls, _read(Path(value)), f"{value}: ", Path(value).parent)
            continue
        loaded = _loaded(option, value) if takes_table(kind_of(cls, key)) else value
        is_group = is_dataclass(kind_of(cls, key)) and isinstance(loaded, dict)
        yield from _nested(cls, {key: loaded if is_group else value}, "", Path())


def _nested(cls: type, settings: dict, place: str, folder: Path) -> Iterator[tuple[str, str, Any]]:
    flat = _flatten(settings, config_keys(cls))
    # A file may spell a setting in two ways, ``train: {steps: 3}`` and ``train.steps: 3``.
    if repeated := [key for key, times in Counter(key for key, _ in flat).items() if times > 1]:
        raise ConfigError(f"{place or '--'}{repeated[0]} is given twice")
    for key, value in flat:
        # The name of a file may stand for a group.
        if is_dataclass(kind_of(cls, key)) and isinstance(value, str) and (folder / value).is_file():
            file = folder / value
            yield from _nested(cls, {key: _read(file)}, f"{file}: ", file.parent)
        else:
            yield place, key, value


def _read(path: Path) -> dict:
    try:
        loaded = load_yaml(path.read_text(encoding="utf-8"))
    except RepeatedKey as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold keys and values, got {type(loaded).__name__}")
    return loaded


def _loaded(option: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except RepeatedKey as error:
        raise ConfigError(f"{option}: {error}") from None
    except yaml.YAMLError:
        return text


def _flatten(mapping: dict, known: list[str], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    found = []
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        # A known key without keys below it is a setting: a dictionary there is its value.
        setting = path in known and not any(other.startswith(path + ".") for other in known)
        nested = isinstance(value, dict) and value and not setting
        found += _flatten(value, known, path + ".") if nested else [(path, value)]
    return found


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part, key)


def _shown(value: Any) -> str:
    text = value or "''" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def _explain(message: str, cls: type, parser: ArgumentParser, options: Options) -> str:
    """One line for a parser error: which option or file gives a setting a value of another type."""
    line = " ".join(message.split())
    if not (found := KEY.findall(line)):
        return line
    key = found[-1]
    for option, value in options:
        if value is None or option in ASKING:
            continue
        try:
            parser.parse_args([f"{option}={value}"])
        except ArgumentError as error:
            if key in KEY.findall(" ".join(str(error).split())):
                for place, name, given in _settings(cls, [(option, value)]):
                    if name == key or name.startswith(f"{key}."):
                        return f"{place or '--'}{name} must be {in_words(kind_of(cls, name))}, got {_shown(given)}"
    return f"--{key} must be {in_words(kind_of(cls, key))}"


def save_config(config: Any, path: Path):
    """Writes a configuration dataclass as YAML, tuples as lists, that ``--config`` reads back."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False), encoding="utf-8")


def load_config(cls: type, path: Path) -> Any:
    """The configuration dataclass that :func:`save_config` wrote.

    Raises:
        ConfigError: the file is missing or does not fit ``cls``.
    """
    values = parse(cls, ["--config", str(path)], "dino-depth")
    if isinstance(values, PretrainConfig):
        stored = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if "formula" not in stored.get("data", {}).get("normalization", {"formula": 2}):
            values.data.normalization.formula = 1  # a run from before there was a second one
    return values
