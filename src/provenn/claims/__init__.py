"""Claims: each paper's headline statement as an experiment, and the harness that runs them."""

from provenn.claims.claim import (
    Bar,
    Claim,
    Comparison,
    Evidence,
    Figure,
    Metric,
    Point,
    Progress,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)

__all__ = [
    "Bar",
    "Claim",
    "Comparison",
    "Evidence",
    "Figure",
    "Metric",
    "Point",
    "Progress",
    "Study",
    "Tier",
    "Trial",
    "Tuning",
    "Verdict",
]
