"""From scores of good parts to a decision whose false alarms are bounded: split conformal prediction.

The model never saw the calibration parts, so their n scores and that of a new good part are exchangeable. If a part is
called anomalous where its score exceeds the k-th largest of the n, the share of good parts that are is distributed as
Beta(k, n + 1 - k), or less where scores are equal (Vovk 2012, proposition 2b). The largest k whose share is at most
``rate`` with probability ``confidence`` is taken: the lowest threshold that can be promised.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from dino_depth.errors import ConfigError, DataError

__all__ = ["Decision", "DecisionConfig", "decide", "needed", "split_conformal"]

WITHOUT = "without guarantee"


@dataclass
class DecisionConfig:
    """How many false alarms a decision may have.

    Attributes:
        rate: of good parts that are called anomalous, at most.
        confidence: with which it holds, over the choice of the good parts that calibrated it.
    """

    rate: float = 0.05
    confidence: float = 0.9

    def __post_init__(self):
        for key in ("rate", "confidence"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(f"decision.{key}: must lie within (0, 1), got {getattr(self, key)}")


@dataclass(frozen=True)
class Decision:
    """Where scores become anomalous, and what that is worth.

    Attributes:
        config: what was asked for.
        kind: ``conformal`` keeps what was asked for; ``weaker`` keeps a rate of ``bound``, all that so few good parts
            allow; ``heuristic`` comes from the views of the training part and keeps nothing; ``none`` has no threshold.
        threshold: parts of a larger score are anomalous; None where there is none.
        bound: rate of false alarms that holds with ``config.confidence``; None without a guarantee.
        map_threshold: the same of the maps, which show where: another where a head has a score of its own for a part.
        scores: of the good parts that calibrated it, and the highest of their maps, by what the parts hold.
        heuristic: score of the training part's views compared with each other; None where the head has no such.
    """

    config: DecisionConfig
    kind: Literal["conformal", "weaker", "heuristic", "none"]
    threshold: float | None
    bound: float | None
    map_threshold: float | None = None
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    heuristic: float | None = None

    def told(self) -> str:
        """The guarantee in words."""
        sure = f"at {100 * self.config.confidence:g} % confidence, n = {len(self.scores)}"
        more = f"{100 * self.config.rate:g} % takes {needed(self.config)} good parts that the model was not fitted on"
        if self.kind == "conformal":
            return f"false alarms <= {100 * self.config.rate:g} % {sure}"
        if self.kind == "weaker":
            return f"false alarms <= {100 * self.bound:.3g} % {sure}; {more}"
        if self.kind == "heuristic":
            return f"{WITHOUT}: from the views of the training part compared with each other; {more}"
        return f"no threshold, as no good part was held out; {more}"

    def of(self, score: float) -> bool | None:
        """Whether a part of this score is anomalous; None without a threshold."""
        return None if self.threshold is None else bool(score > self.threshold)

    def state(self) -> dict[str, Any]:
        """What JSON can hold, for ``from_state``."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Decision":
        """The decision that gave ``state``; raises DataError where it is none."""
        try:
            scores = {name: tuple(pair) for name, pair in state["scores"].items()}
            return cls(**{**state, "config": DecisionConfig(**state["config"]), "scores": scores})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a decision: {error}") from error


def decide(
    scores: Mapping[str, tuple[float, float]], config: DecisionConfig, heuristic: float | None = None
) -> Decision:
    """The decision that good parts allow; arguments as in ``Decision``.

    Raises:
        DataError: a score is not finite.
    """
    for name, pair in scores.items():
        if not np.isfinite(pair).all():
            raise DataError(f"{name}: its score is {pair[0]}")
    if not scores:
        kind = "none" if heuristic is None else "heuristic"
        return Decision(config, kind, heuristic, None, heuristic, {}, heuristic)
    values = np.sort(np.array(list(scores.values()), np.float64), axis=0)  # (parts, 2), each column for itself
    exceeding = split_conformal(len(values), config)
    kind, bound = "conformal", config.rate
    if not exceeding:
        kind, bound = "weaker", float(stats.beta.ppf(config.confidence, 1, len(values)))
    threshold, highest = values[-max(exceeding, 1)].tolist()
    return Decision(config, kind, threshold, bound, highest, dict(scores), heuristic)


def split_conformal(count: int, config: DecisionConfig) -> int:
    """The largest k of ``count`` whose k-th largest score keeps what is asked for; 0 where none does."""
    places = np.arange(1, count + 1)
    kept = stats.beta.cdf(config.rate, places, count + 1 - places) >= config.confidence
    return int(np.count_nonzero(kept))  # the probability falls with k


def needed(config: DecisionConfig) -> int:
    """The fewest good parts that allow what is asked for."""
    return int(np.ceil(np.log1p(-config.confidence) / np.log1p(-config.rate) - 1e-12))
