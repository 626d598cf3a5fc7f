"""What goes beside exported weights: model cards, provenance, the training configuration and the licence."""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from dino_depth import __version__
from dino_depth.config import PretrainConfig
from dino_depth.depth import Normalization
from dino_depth.errors import ReportedError
from dino_depth.licences import non_commercial
from dino_depth.pretrain.run_folder import git_revision, library_versions
from dino_depth.publish.parity import worst
from dino_depth.shards import DepthShards

__all__ = ["Subject", "TrainingData", "license_text", "training_data", "write_json", "write_papers"]

LITE0_TERMS = (
    "Google's EfficientNet-lite0 with ImageNet weights, Apache-2.0 by the licence file of the package that carries them"
)
# Keys of env.json that say how a run was made and nothing about the people and paths of the machine.
ENVIRONMENT = ("dino_depth", "git_revision", "python", "packages", "gpu", "world_size", "samples", "samples_sha256")


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on, one row for each shard folder and dataset.

    Attributes:
        rows: ``folder``, ``dataset``, ``maps``, ``licence``, ``synthetic`` and ``manifest_sha256`` each.
    """

    rows: list[dict]

    @property
    def non_commercial(self) -> bool:
        return any(non_commercial(row["licence"]) for row in self.rows)


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        config: of the run.
        step: optimisation steps behind the weights.
        image_size: side of the input the export is made for, pixels.
        license: Hub identifier of the weights' licence.
        data: None where the training shards are not there any more.
        parity: the report that the gate passed with.
        choice: why this checkpoint, as :func:`dino_depth.pretrain.in_loop.choose_checkpoint` says.
        repository: where on the Hub it goes, if anywhere.
    """

    config: PretrainConfig
    step: int
    image_size: int
    license: str
    data: TrainingData | None
    parity: dict
    choice: dict
    repository: str | None = None


def training_data(shards: DepthShards) -> TrainingData:
    """The datasets of the samples a run was trained on, with the licences that their manifests state."""
    counts = shards.count_datasets()
    rows = []
    for folder, manifest in zip(shards.folders, shards.manifests, strict=True):
        sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        for (origin, dataset), maps in sorted(counts.items(), key=lambda item: item[0][1]):
            if origin == folder:
                source = manifest["sources"][dataset]
                row = {"folder": folder.name, "dataset": dataset, "maps": maps, "licence": source["licence"]}
                row |= {"synthetic": source["synthetic"], "manifest_sha256": sha256}
                if model := source.get("pseudo_depth"):
                    # Depth that a network estimated is under the terms of the images and of the network.
                    row["licence"] += f"; depth by {model['model']}, {model['licence']}"
                rows.append(row)
    return TrainingData(rows)


def write_papers(folder: Path, subject: Subject, run: Path, checkpoint: Path):
    """Completes ``folder``, which holds ``transformers`` and ``timm``: cards, licence, configuration and origin.

    Args:
        run: the run folder.
        checkpoint: the file the weights are from.
    """
    main, second = folder / "transformers", folder / "timm"
    training_config = main / "training_config.yaml"
    text = yaml.safe_dump(_published_config(subject.config), sort_keys=False)
    training_config.write_text(text, encoding="utf-8")
    write_json(main / "provenance.json", _provenance(run, checkpoint, subject, training_config))
    write_json(main / "parity.json", subject.parity)
    (main / "LICENSE").write_text(license_text(subject.license), encoding="utf-8")
    shutil.copyfile(main / "parity.json", folder / "parity.json")
    for name in ("training_config.yaml", "provenance.json", "parity.json", "LICENSE"):
        shutil.copyfile(main / name, second / name)
    _write_card(main, "transformers", subject)
    _write_card(second, "timm", subject)


def write_json(path: Path, value: dict):
    """Writes strict JSON: no NaN, no infinity."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _published_config(config: PretrainConfig) -> dict:
    """A run's configuration as plain values; of paths, which describe a machine, only the last part."""

    def last(path: str) -> str:
        return Path(path).name if path else path

    def names(shards: str | list[str]) -> str | list[str]:
        return last(shards) if isinstance(shards, str) else [last(folder) for folder in shards]

    data = dataclasses.replace(config.data, shards=names(config.data.shards), cache=last(config.data.cache))
    train = dataclasses.replace(config.train, evaluate_shards=names(config.train.evaluate_shards))
    origin = last(config.init_from) if config.init_from else None
    second = config.distill.teacher
    distill = dataclasses.replace(config.distill, teacher=last(second) if Path(second).exists() else second)
    parts = {"data": data, "distill": distill, "train": train}
    config = dataclasses.replace(config, out=last(config.out), init_from=origin, **parts)
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _provenance(run: Path, checkpoint: Path, subject: Subject, training_config: Path) -> dict:
    """What the weights were made from, and by which code; ``unknown`` where the run does not say."""
    try:
        environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
        recorded = {key: environment[key] for key in ENVIRONMENT if key in environment}
    except (OSError, ValueError, TypeError):
        recorded = "unknown"
    return {
        "step": subject.step,
        "checkpoint": checkpoint.name,
        "checkpoint_choice": subject.choice,
        "checkpoint_sha256": _sha256(checkpoint),
        "training_config_sha256": _sha256(training_config),
        "training_data": subject.data.rows if subject.data else "unknown",
        "training_environment": recorded,
        "export": {"dino_depth": __version__, "git_revision": git_revision(), "packages": library_versions()},
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def license_text(license: str) -> str:
    """The LICENSE file for weights under the licence of that Hub identifier.

    Raises:
        ReportedError: Apache-2.0 is asked for and this installation lacks its own licence file.
    """
    if license != "apache-2.0":
        return f"These weights are released under the licence with the Hugging Face Hub identifier {license!r}.\n"
    try:
        installed = importlib.metadata.distribution("dino-depth")
        text = installed.read_text("licenses/LICENSE") or installed.read_text("LICENSE")
    except importlib.metadata.PackageNotFoundError:
        text = None
    checkout = Path(__file__).resolve().parents[2]
    if not text and (checkout / "setup.cfg").is_file() and (checkout / "LICENSE").is_file():
        text = (checkout / "LICENSE").read_text(encoding="utf-8")
    if not text:
        raise ReportedError(
            "this installation of dino-depth lacks its LICENSE file, which an export carries; reinstall it"
        )
    return text


def _write_card(folder: Path, library: str, subject: Subject):
    """Writes ``README.md`` for the Hub: metadata, how to load, what to feed, what it was trained on, limits."""
    metadata = {
        "license": subject.license,
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["depth", "anomaly-detection", "dinov2", "dino-depth", "self-supervised"],
    }
    # Rendered stand-ins of a dataset are not that dataset.
    real = {row["dataset"] for row in (subject.data.rows if subject.data else []) if not row["synthetic"]}
    if real:
        metadata["datasets"] = sorted(real)
    front = yaml.safe_dump(metadata, sort_keys=False)
    sections = [
        _title(subject), _loading(library, subject), _input(subject), _training(subject), _checked(subject),
        _limits(subject),
    ]  # fmt: skip
    (folder / "README.md").write_text(f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n", encoding="utf-8")


def _title(subject: Subject) -> str:
    model = subject.config.model
    registers = f", {model.registers} registers" if model.registers else ""
    return f"""# DINO-Depth, ViT/{model.patch_size}, {model.dim} dimensions

A depth encoder: a Vision Transformer with **one input channel** ({model.depth} blocks, {model.heads} heads, patches of
{model.patch_size} pixels, {model.positions} positions{registers}), pretrained on depth maps without
labels{_recipe(subject)}. It returns one class feature and one feature per patch. The weights are the EMA teacher after
{subject.step} steps{_chosen(subject)}.{_class_feature(subject)}"""


def _recipe(subject: Subject) -> str:
    return " by the DINOv2 recipe" if subject.config.loss.dino_weight else ", see Training"


def _class_feature(subject: Subject) -> str:
    """A warning where no loss read the class token."""
    loss, distill = subject.config.loss, subject.config.distill
    if any((loss.dino_weight, loss.koleo_weight, distill.teacher and distill.class_weight)):
        return ""
    return """

**No loss read the class token**: use the mean of the patch features for a whole map."""


def _chosen(subject: Subject) -> str:
    choice, length = subject.choice, subject.config.train.steps
    if choice["criterion"] != "best":
        return ""
    found = f"{choice['value']:.3f}, 95 % from {choice['low']:.3f} to {choice['high']:.3f}"
    return f""" of {length}: of {choice["evaluated"]} steps probed on held-out maps the best by
{choice["metric"]} ({found}; the best of several is flattered by the choice)"""


def _loading(library: str, subject: Subject) -> str:
    model = subject.config.model
    tokens = f"(1, {1 + model.registers} + patches, {model.dim}), class token first"
    if model.registers:
        tokens += ", then registers"
    if library == "timm":
        source = f"hf-hub:{subject.repository}-timm" if subject.repository else "local-dir:PATH/timm"
        return f"""## Load

```python
import timm

model = timm.create_model("{source}", pretrained=True).eval()
tokens = model.forward_features(image[None])  # {tokens}
```

`image` is (1, {subject.image_size}, {subject.image_size}) float32 as described below. `forward_features` ends with the
final norm; `forward_intermediates(norm=False)` does not."""
    source = subject.repository or "PATH/transformers"
    return f"""## Load

```python
import dino_depth
from dino_depth.depth import DepthMap

encoder = dino_depth.load_encoder("{source}")
image = encoder.prepare(DepthMap.from_values(depth_in_metres))  # (1, {subject.image_size}, {subject.image_size})
class_feature, patch_features = encoder(image[None])
```

The same features from transformers:

```python
import dino_depth
from transformers import AutoImageProcessor, AutoModel

inputs = AutoImageProcessor.from_pretrained("{source}")(depth_in_metres)  # or a 16-bit PNG in millimetres
tokens = AutoModel.from_pretrained("{source}")(**inputs).last_hidden_state  # {tokens}
```"""


def _input(subject: Subject) -> str:
    normalization = subject.config.data.normalization
    values = ", ".join(f"`{key}` = {value!r}" for key, value in dataclasses.asdict(normalization).items())
    return f"""## Input

Depth in **metres** (or relative depth, marked so), larger is farther. **A missing pixel is 0 in the input**, never
filled in. The input is (batch, 1, {subject.image_size}, {subject.image_size}) float32; sides must be multiples of
{subject.config.model.patch_size}.

1. Normalise each map by `dino_depth.depth.normalize` with {values}. In the words of its documentation:

```text
{inspect.getdoc(Normalization)}
```

2. Pad to a square with missing pixels and resize so that missing and valid pixels do not mix
   (`dino_depth.resample.fit_square`; `Encoder.prepare` does both steps).

After `import dino_depth`, transformers' `AutoImageProcessor` and `pipeline("image-feature-extraction")` do both steps
to floats in metres and to 16-bit files in millimetres; without it they refuse this repository. timm's `mean`/`std` do
**not** normalise depth: give timm what `Encoder.prepare` returns. An image processor that converts to RGB, rescales by
255, subtracts ImageNet's mean or resizes bicubically gives wrong features.

{_other_sizes(subject)}"""


def _other_sizes(subject: Subject) -> str:
    model, side = subject.config.model, subject.image_size
    if model.positions == "rotary":
        return "Positions are rotary and fit every size; the parity below was measured at this one."
    agree = "the libraries still agree" if model.registers else "timm and dino_depth still agree, transformers differs"
    return f"""The position embedding is stored for {side}x{side} pixels. At other sizes it is resized again: {agree},
and the features drift from those of the training model. Export anew for another size."""


def _training(subject: Subject) -> str:
    config = subject.config
    crops = config.crops
    sizes = "".join(f", in other steps {large} and {small}" for large, small in crops.sizes)
    if config.loss.needs_teacher:
        local = f"and {crops.local_crops} of {crops.local_size} pixels{sizes}"
    else:
        local = "pixels" + "".join(f", in other steps {large}" for large, _ in crops.sizes)
    recipe = f"""## Training

{_losses(config)}; {subject.step} steps of {config.train.batch} maps; per map 2 crops of
{crops.global_size} {local}, spatial augmentation only.
`training_config.yaml` has every setting, `provenance.json` the checksums of data and weights and the versions of code
and libraries."""
    if subject.data is None:
        return recipe + "\n\nThe training shards were not there at export: **data and their licences are unknown.**"
    table = ["| dataset | maps | licence as recorded with the shards |", "|---|---|---|"]
    for row in subject.data.rows:
        name = _plain(row["dataset"])
        name = f"rendered parts in the layout of {name}" if row["synthetic"] else name
        table.append(f"| {name} | {row['maps']} | {_plain(row['licence'])} |")
    terms = f"The licence above (`{subject.license}`) is that of the weights; the data keep their own."
    if subject.data.non_commercial:
        terms += (
            " **Some of these data are licensed for non-commercial use only:** whether that binds weights trained on"
            " them is for you to judge before any commercial use."
        )
    return "\n".join([recipe, "", *table, "", terms])


def _losses(config: PretrainConfig) -> str:
    """What the student paid, and where a second teacher came from."""
    loss, distill = config.loss, config.distill
    weights = {
        "DINO on the class token": loss.dino_weight, "iBOT on masked patches": loss.ibot_weight,
        "KoLeo": loss.koleo_weight, "a dense loss between crops": loss.dense_weight,
        "the surface of every patch": loss.surface_weight,
    }  # fmt: skip
    named = [f"{name} ({weight:g})" for name, weight in weights.items() if weight]
    if distill.teacher:
        name = distill.teacher if not Path(distill.teacher).exists() else Path(distill.teacher).name
        terms = (
            LITE0_TERMS
            if re.match(r"lite0\b", name)
            else "its licence holds for them, too, and this card does not know it"
        )
        named.append(
            f"the cosine distance to features of the frozen encoder `{name}` on the same depth (class "
            f"{distill.class_weight:g}, patches {distill.patch_weight:g}): the weights derive from it; {terms}"
        )
    return ", ".join(named)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: what a manifest says must not become markup of a page on the Hub."""
    return re.sub(r"([\\`*_\[\]<>|!#&~$])", r"\\\1", " ".join(text.split()))


def _checked(subject: Subject) -> str:
    name, difference = worst(subject.parity)
    return f"""## Checked

On {subject.parity["samples"]} depth maps at {subject.image_size}x{subject.image_size}, float32, the largest absolute
difference of any feature between the training model and this export in any library is {difference:.1e} ({name}), with
features up to {subject.parity["largest_feature"]:.1f}: see `parity.json`."""


def _limits(subject: Subject) -> str:
    return """## Limits

Made for frozen features of single objects seen by a depth sensor. No colour, no scene semantics; no measure of how good
the features are on your data is implied by this card."""
