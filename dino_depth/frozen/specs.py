"""The names of frozen encoders: ``[random:][FAMILY:]NAME[?option=value&option=value]``."""

from dataclasses import dataclass

from dino_depth.config import suggestion
from dino_depth.errors import ConfigError

__all__ = ["Spec", "parse_spec", "read_options"]


@dataclass(frozen=True)
class Spec:
    """A parsed name.

    Attributes:
        text: as it was given.
        family: one of the families, "" for an export of this project.
        name: what the family knows it by; may be empty.
        random: whether weights are drawn instead of read.
        options: as they were given.
    """

    text: str
    family: str
    name: str
    random: bool
    options: dict[str, str]


def parse_spec(text: str, families: tuple[str, ...]) -> Spec:
    """Takes a name apart.

    Raises:
        ConfigError: an option has no value or is given twice, or a name is missing.
    """
    rest, _, tail = text.partition("?")
    options = {}
    for part in filter(None, tail.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not value or key in options:
            raise ConfigError(f"encoder {text}: options read ?key=value&key=value, each key once; got {part!r}")
        options[key] = value
    random = rest.startswith("random:")
    rest = rest.removeprefix("random:")
    family, colon, name = rest.partition(":")
    if family not in families:
        family, name = "", rest
    elif colon and not name:
        raise ConfigError(f"encoder {text}: nothing after {family}:")
    if not family and not name:
        raise ConfigError(f"encoder {text!r}: name an exported folder, a Hub repository, or one of {families}")
    return Spec(text, family, name, random, options)


def read_options(spec: Spec, known: dict[str, tuple]) -> dict:
    """The value of every option in ``known``: {option: allowed strings, or one number, the default first}.

    Raises:
        ConfigError: an option is unknown or has an impossible value.
    """
    for key in spec.options:
        if key not in known:
            have = f"; it has {', '.join(known)}" if known else "; it has none"
            raise ConfigError(f"encoder {spec.text}: unknown option {key!r}{suggestion(key, known)}{have}")
    values = {}
    for key, allowed in known.items():
        given = spec.options.get(key)
        if given is None:
            values[key] = allowed[0]
        elif isinstance(allowed[0], str):
            if given not in allowed:
                raise ConfigError(f"encoder {spec.text}: {key} must be one of {', '.join(allowed)}, got {given!r}")
            values[key] = given
        else:
            values[key] = _number(spec, key, given, type(allowed[0]))
    return values


def _number(spec: Spec, key: str, given: str, kind: type) -> int | float:
    try:
        value = kind(given)
    except ValueError:
        value = None
    # The smallest seed is 0, of everything else that is counted or measured it is more.
    if value is None or not (0 <= value < float("inf")) or (value == 0 and key != "seed"):
        word = "a whole number" if kind is int else "a number"
        raise ConfigError(f"encoder {spec.text}: {key} must be {word} above 0, got {given!r}")
    return value
