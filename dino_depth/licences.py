"""What a stated licence of data or weights allows."""

import re

__all__ = ["non_commercial"]


def non_commercial(licence: str) -> bool:
    """Whether a licence, in words or as an identifier, says that it is for non-commercial use only."""
    return re.search(r"\bNC\b|non-?commercial", licence, re.IGNORECASE) is not None
