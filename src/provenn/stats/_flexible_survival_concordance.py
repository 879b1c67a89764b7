"""Concordance of predicted and observed times under right censoring."""

from __future__ import annotations

import numpy as np

_BLOCK = 1 << 20
"""Pairs compared at once."""


def concordance(predicted: np.ndarray, T: np.ndarray, event: np.ndarray) -> float:
    """Return the share of comparable pairs whose predicted times are in the order of the observed ones.

    A pair is comparable if the earlier of its times is an event's; where times are equal, if just one is an event,
    which then counts as the earlier. Equal predictions count as half a pair.

    Args:
        predicted: Predicted times, or any score that is larger for those who live longer; may be infinite.
        T: Observed times.
        event: 1 for an event, 0 for a censored time.

    Returns:
        The concordance, in [0, 1]; NaN if no pair is comparable.

    Cost: O(events · n) time, O(n) memory.

    Source: Harrell et al., "Evaluating the yield of medical tests", JAMA 247 (1982).
    """
    happened = np.flatnonzero(event == 1)
    rows = max(1, _BLOCK // max(1, len(T)))
    pairs, agreeing = 0, 0.0
    for at in range(0, len(happened), rows):
        some = happened[at : at + rows, None]
        outlived = (T[some] < T) | ((T[some] == T) & (event == 0))
        pairs += int(outlived.sum())
        agreeing += (outlived & (predicted[some] < predicted)).sum()
        agreeing += (outlived & (predicted[some] == predicted)).sum() / 2
    return float(agreeing / pairs) if pairs else float("nan")
