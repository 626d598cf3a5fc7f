"""What is printed: names from data may hold signs that colour, move or reorder what a terminal shows."""

import logging
import sys

__all__ = ["TerminalWarnings", "plain", "say"]


def plain(line: str) -> str:
    r"""The line with control characters, line breaks and marks of direction among them, as ``\x1b``."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def say(text: str, error: bool = False):
    """Prints a line, on standard error where ``error`` says so."""
    print(plain(text), file=sys.stderr if error else sys.stdout, flush=True)


class TerminalWarnings(logging.Handler):
    """Says warnings on standard error as well, whatever that is by then; the command itself says what ends a run."""

    def emit(self, record: logging.LogRecord):
        if record.levelno == logging.WARNING:
            say(record.getMessage(), error=True)
