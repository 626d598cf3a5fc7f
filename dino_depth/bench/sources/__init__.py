"""Where the bench's maps come from; the file name is the registry.

A module has ``FORM``, what ``--data`` must name, for messages, and

- ``recognises(folder) -> bool``: whether a folder has this form;
- ``read(folder, options) -> Source``: its views; raises DataError.

Modules without ``recognises`` need no folder and are asked for by their name.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from data_prep.tree import refuse_links_out, walk
from dino_depth.bench.data import Source
from dino_depth.config import suggestion
from dino_depth.errors import ConfigError, DataError

__all__ = ["Options", "evenly", "files", "open_source"]


@dataclass(frozen=True)
class Options:
    """What readers need to know.

    Attributes:
        frames: most views of a scene, spread evenly.
        objects: objects of each kind that are rendered.
        views: views of each rendered object.
        seed: of what is rendered.
        inspect: whether parts with defects are wanted.
    """

    frames: int
    objects: int
    views: int
    seed: int
    inspect: bool = True


def _modules() -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def open_source(text: str, options: Options) -> Source:
    """The source of one ``--data``: a name, a folder, or ``name:folder``.

    Raises:
        ConfigError: there is no such source or folder.
        DataError: the folder has no known form, a link out of it, or cannot be read; a scene has a single view.
    """
    modules = _modules()
    name, colon, folder = text.partition(":")
    if not colon or name not in modules:
        name, folder = (text, "") if text in modules else ("", text)
    module = modules.get(name)
    if module is not None and not hasattr(module, "recognises"):
        if folder:
            raise ConfigError(f"--data {text}: {name} takes no folder")
        return module.read(Path(), options)
    if not folder or not Path(folder).is_dir():
        near = suggestion(text, list(modules))
        raise ConfigError(f"--data {text}: no such folder, and none of {', '.join(modules)}{near}")
    refuse_links_out(folder)
    if module is None:
        fitting = [name for name, module in modules.items() if hasattr(module, "recognises")]
        found = [name for name in fitting if modules[name].recognises(Path(folder))]
        if not found:
            forms = "; ".join(f"{name}: {modules[name].FORM}" for name in fitting)
            raise DataError(f"--data {folder}: of no known form ({forms})")
        module = modules[found[0]]
    source = module.read(Path(folder), options)
    scenes: dict[str, int] = {}
    for view in source.views:
        scenes[view.scene] = scenes.get(view.scene, 0) + 1
    if max(scenes.values()) < 2:
        scene = next(iter(scenes))
        raise DataError(f"--data {text}: {scene} has one view only: recall across views needs two of a scene")
    return source


def files(folder: Path, ending: str) -> list[Path]:
    """The visible files below a folder whose names end so, sorted."""
    return sorted(folder / name for name in walk(folder) if name.endswith(ending))


def evenly(items: list, most: int) -> list:
    """At most so many items, spread evenly from the first to the last."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / max(most - 1, 1))] for place in range(most)]
