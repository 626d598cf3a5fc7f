"""What URLs hold beside a place, such as passwords and queries: refused in settings, left out of texts."""

import re

from dino_depth.errors import ConfigError

__all__ = ["is_url", "redacted", "refuse_secrets", "refuse_url"]

CONTAINERS = ("abfs", "abfss")
WEB = ("http", "https")
# A password may hold any sign that ends neither the text nor the place; the last @ before a slash ends it. A Path
# makes one slash of two.
URL = re.compile(
    r"""(?P<protocol>\w[\w+.-]*):(?P<slashes>//?)(?:(?P<user>[^\s/?#"'<>]*)@)?(?P<place>[^\s?#"'<>]*)(?P<rest>[?#][^\s"'<>]*)?"""
)
ENDS = re.compile(r"""[\s"'<>]""")


def is_url(text: str) -> bool:
    """Whether a text is a URL and no local path; ``file://`` is one."""
    return re.match(r"[\w+.:-]+://", text) is not None and not text.startswith(("file://", "local://"))


def refuse_url(text: str, key: str):
    """Refuses a URL where only a local folder is written to.

    As a path it would become a local folder, called after all that the URL holds. It is not shown: it may be secret.

    Raises:
        ConfigError: the text is a URL; names the setting ``key``.
    """
    if "://" in text:
        raise ConfigError(f"{key} is a URL, and must be a local folder: copy what is written there afterwards")


def refuse_secrets(url: str, key: str = ""):
    """Refuses what may be secret in a URL.

    Args:
        key: the setting, for the message.

    Raises:
        ConfigError: the URL holds a name, a password, a query or a fragment: what is kept there is mostly secret and
            would end up in logs, run folders and model cards, and the files beside the folder would not be found.
    """
    whole = ENDS.sub("", url)
    if (clean := redacted(whole)) != whole:
        place = f"{key}: {clean}" if key else clean
        raise ConfigError(
            f"{place}: no user name, password, query or fragment in a URL: credentials belong in ~/.netrc, the store's "
            "own file or environment"
        )


def redacted(text: str) -> str:
    """The text with what URLs in it carry beside their place, user names, passwords, queries and fragments, as ``***``.

    The container of ``abfs://CONTAINER@ACCOUNT...`` is no user's name and stays, as do the options of an encoder in a
    folder, ``transformers:/FOLDER?depth_as=log``.
    """
    return URL.sub(_redacted_url, text)


def _redacted_url(url: re.Match) -> str:
    protocol, user, place, rest = url["protocol"], url["user"], url["place"], url["rest"]
    if url["slashes"] == "/" and user is None and protocol.lower() not in WEB:
        return url[0]
    is_container = protocol.lower() in CONTAINERS and ":" not in (user or "")
    shown = "" if user is None else f"{user if is_container else '***'}@"
    return f"{protocol}:{url['slashes']}{shown}{place}{rest[0] + '***' if rest else ''}"
