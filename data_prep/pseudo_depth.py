"""Depth Anything V2: image to relative depth.

The network, read through transformers, estimates disparity; ``disparity.py`` turns it into relative depth.
Traps: the pictures transformers draws are 8-bit and not used here; the metric variants put out metres, larger is
farther, and are refused; the two image processors of transformers (torchvision and PIL) resize differently, and PIL's
is used whatever is installed.
"""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.disparity import FlatDepth, PseudoDepthConfig, check_conversion, convert
from data_prep.manifest import digest_file
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = ["FlatDepth", "Model", "PseudoDepthConfig", "convert", "estimate", "processes", "resolve"]

ARCHITECTURE = "DepthAnythingForDepthEstimation"
CONFIG, PROCESSOR, WEIGHTS, CARD = "config.json", "preprocessor_config.json", "model.safetensors", "README.md"
# The head of the branch "main" since June 2024, as its page on the Hub shows it.
COMMITS = {"depth-anything/Depth-Anything-V2-Small-hf": "5426e4f0f36572d16453bbda7a8389317b1bef99"}
LICENCES = {
    "depth-anything/Depth-Anything-V2-Small-hf": "Apache-2.0",
    "depth-anything/Depth-Anything-V2-Base-hf": "CC-BY-NC-4.0",
    "depth-anything/Depth-Anything-V2-Large-hf": "CC-BY-NC-4.0",
}
UNSTATED = "unstated, see the model's card"
HUB_TIMEOUT = 5  # seconds


@dataclass(frozen=True)
class Model:
    """A model that was found, checked and loaded once.

    Attributes:
        folder: where its files lie.
        identity: the Hub id, or the name (not the path) of a local folder.
        revision: the Hub's commit, or ``sha256:`` and the digest of a local folder's weights.
        licence: of the weights.
        device: ``cpu`` or ``cuda``.
        versions: libraries whose version may change the depth.
    """

    folder: Path
    identity: str
    revision: str
    licence: str
    device: str
    versions: dict[str, str] = field(hash=False)


def resolve(config: PseudoDepthConfig, device: str = "") -> Model:
    """Finds the model, downloads it where needed, and loads it once on the CPU to be sure of it.

    Args:
        device: what it will run on, ``cuda`` or ``cpu``, where that is on other machines; empty: decided here.

    Raises:
        ConfigError: a value is out of range, there is no such device, folder or Hub id, or it is no relative model.
        DataError: the files of the model are corrupt or do not fit each other.
    """
    check_conversion(config)
    import torch
    import transformers

    if not device and config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("pseudo_depth.device cuda: torch sees no CUDA device; run dino-depth doctor")
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if config.revision:
            raise ConfigError(f"pseudo_depth.revision {config.revision}: pseudo_depth.model {folder} is a folder")
        _check_folder(folder)
        identity, revision = folder.resolve().name, f"sha256:{digest_file(folder / WEIGHTS)}"
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.model):
        identity = config.model
        folder = _snapshot(identity, config.revision or COMMITS.get(identity, "main"))
        _check_folder(folder)
        revision = folder.name
    else:
        raise ConfigError(f"pseudo_depth.model {config.model}: neither a folder nor a Hub id (owner/name)")
    _load(folder)
    licence = LICENCES.get(identity) or _stated_licence(folder / CARD)
    device = device or ("cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Model(folder, identity, revision, licence, device, versions)


def _snapshot(name: str, revision: str) -> Path:
    """The folder of a Hub repository's commit, whose name is the commit; from the network only where it must be."""
    from huggingface_hub import HfApi, snapshot_download

    files = [CONFIG, PROCESSOR, WEIGHTS]

    def cached() -> Path | None:
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
        except (OSError, ValueError):
            return None
        return folder if all((folder / file).is_file() for file in files) else None

    if re.fullmatch("[0-9a-f]{40}", revision) and (folder := cached()):
        return folder
    try:
        # A question that fails at once: the download itself would try for half a minute.
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*files, CARD]))
    except Exception as error:  # noqa: BLE001 - besides its own errors the Hub client lets its HTTP library's through
        if folder := cached():
            return folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise ConfigError(
        f"pseudo_depth.model {name} at {revision} is neither on this machine nor to be had from the Hub ({reason}): "
        f"where there is a network run: hf download {name} --revision {revision} --local-dir FOLDER; "
        f"then give --pseudo_depth.model FOLDER"
    ) from None


def _check_folder(folder: Path):
    """Refuses what is not a relative Depth Anything model with safe weights, by the files' names and config.json."""
    for file in (CONFIG, PROCESSOR, WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == WEIGHTS and any(folder.glob("*.bin"))
            why = "; pickled weights (*.bin) are not read" if pickled else ""
            raise ConfigError(f"pseudo_depth.model {folder}: no {file} in it{why}")
    stated = _json(folder / CONFIG)
    if stated.get("architectures") != [ARCHITECTURE]:
        raise ConfigError(f"{folder / CONFIG}: architectures is {stated.get('architectures')}, not [{ARCHITECTURE!r}]")
    kind = stated.get("depth_estimation_type", "relative")
    if kind != "relative":
        raise ConfigError(
            f"{folder / CONFIG}: depth_estimation_type is {kind!r}; only 'relative' models put out disparity"
        )
    processor = str(_json(folder / PROCESSOR).get("image_processor_type"))
    if not processor.startswith("DPTImageProcessor"):
        raise ConfigError(f"{folder / PROCESSOR}: image_processor_type is {processor}, not DPTImageProcessor")


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold keys and values, got {type(content).__name__}")
    return content


def _stated_licence(card: Path) -> str:
    """What a model's card says in its front matter; "unstated" where there is no card or it says nothing."""
    from huggingface_hub import metadata_load

    try:
        return str((metadata_load(card) or {})["license"])
    except (OSError, KeyError, ValueError, yaml.YAMLError):
        return UNSTATED


def processes(model: Model) -> int:
    """How many processes should estimate at once: one per GPU; 0, one per core, on the CPU."""
    import torch

    return torch.cuda.device_count() if model.device == "cuda" else 0


@lru_cache(maxsize=1)
def _loaded(model: Model) -> tuple[Any, Any]:
    from dino_depth.device import pick_device

    processor, network = _load(model.folder)
    if model.device == "cpu":
        pick_device("cpu")  # makes this process ready for it
        return processor, network
    # Workers of a pool are numbered in a row, so as many as there are GPUs take one each.
    number = re.search(r"\d+$", current_process().name)
    return processor, network.to(f"cuda:{int(number[0]) % processes(model) if number else 0}")


def _load(folder: Path) -> tuple[Any, Any]:
    """The image processor and the network in float32, in evaluation mode."""
    import torch
    import transformers

    # Progress bars and reports on what was loaded; whatever is missing or does not fit is raised below.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Until transformers had a torchvision and a PIL variant of it, the plain name was PIL's.
    processor_class = getattr(transformers, "DPTImageProcessorPil", None) or transformers.DPTImageProcessor
    try:
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        network, report = transformers.DepthAnythingForDepthEstimation.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - broken files surface as anything from KeyError to SafetensorError
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"pseudo_depth.model {folder}: cannot be loaded: {reason}") from None
    faults = {key: sorted(map(str, names))[:3] for key, names in report.items() if names}
    if faults:
        raise DataError(f"{folder / WEIGHTS} does not fit {CONFIG}: {faults}")
    _keep_float32(network.head)
    return processor, network.eval()


def _keep_float32(head: Any):
    """Exempts the head from autocast: eight bits of mantissa would turn shallow relief into stairs."""
    import torch

    forward = head.forward

    def exempt(hidden_states, *sides):
        states = [state.float() for state in hidden_states]
        with torch.autocast(states[0].device.type, enabled=False):
            return forward(states, *sides)

    head.forward = exempt


def estimate(
    model: Model, config: PseudoDepthConfig, images: list[np.ndarray], names: list[str]
) -> list[tuple[DepthMap, dict] | DataError]:
    """The depth of images, or why there is none, in their order.

    Images that have one size after the processor's resizing share a batch, in their order, so the same list always
    makes the same batches; against another list values may differ in the last bits.

    Args:
        images: (height, width, 3) uint8 RGB each.
        names: one for each image, from which its holes are drawn.

    Returns:
        for each image a relative map of the image's size with its record (:func:`convert`), or a DataError
        (:class:`FlatDepth` where there is no relief).

    Raises:
        ReportedError: the GPU's memory does not hold a batch.
    """
    import torch

    if model.device == "cpu":
        torch.set_num_threads(config.threads)
    processor, network = _loaded(model)
    batch = config.batch or (1 if model.device == "cpu" else 16)
    origin = {
        "model": model.identity, "revision": model.revision, "processor": "pil", "device": model.device,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.precision],
    }  # fmt: skip
    results: dict[int, tuple[DepthMap, dict] | DataError] = {}
    waiting: dict[tuple[int, ...], dict[int, np.ndarray]] = {}

    def run(group: dict[int, np.ndarray]):
        sizes = [images[index].shape[:2] for index in group]
        disparities = _disparities(processor, network, np.stack(list(group.values())), sizes, config)
        for index, disparity in zip(group, disparities, strict=True):
            try:
                depth_map, record = convert(disparity, config, names[index])
            except DataError as error:
                results[index] = error
            else:
                results[index] = depth_map, origin | record

    for index, image in enumerate(images):
        try:
            pixels = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
        except ValueError:
            width, height = image.shape[1::-1]
            results[index] = DataError(f"image of {width}x{height} is too narrow: resized for the model a side is 0")
            continue
        group = waiting.setdefault(pixels.shape, {})
        group[index] = pixels
        if len(group) == batch:
            run(waiting.pop(pixels.shape))
    for group in waiting.values():
        run(group)
    return [results[index] for index in range(len(images))]


def _disparities(
    processor: Any, network: Any, pixels: np.ndarray, sizes: list[tuple[int, int]], config: PseudoDepthConfig
) -> list[np.ndarray]:
    """Float32 disparity of each size (height, width) from processed ``pixels`` (batch, 3, rows, columns)."""
    import torch

    device = network.device
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    try:
        with torch.inference_mode(), exact:
            with bfloat16:
                output = network(pixel_values=torch.from_numpy(pixels).to(device))
            resized = processor.post_process_depth_estimation(output, target_sizes=sizes)
            return [each["predicted_depth"].cpu().numpy() for each in resized]
    except torch.OutOfMemoryError:
        raise ReportedError(f"out of GPU memory with {len(pixels)} images: lower pseudo_depth.batch") from None
