"""Claims that test the harness: each module attribute is one, found by ``claims.fake_claims:NAME``."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from provenn.claims import (
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
from provenn.claims.claim import Event


def judge(evidence: Evidence) -> Verdict:
    margin = evidence.difference("main", "method", "baseline", "score")
    outcome = "reproduced" if margin.above_zero else "not reproduced"
    return Verdict(outcome, f"the method scores {margin} more", {"score": margin, "runs": 1.0})


def train(trial: Trial) -> Iterator[Event]:
    """A random walk that leans on everything a cell may lean on: its seed, the global generators, its settings."""
    leave_a_trace(trial)
    generator = torch.Generator().manual_seed(trial.seed)
    steps = int(trial.budget.get("steps", 5))
    pause = float(trial.budget.get("pause", 0.0))
    gain = float(trial.settings.get("gain", 1.0))
    level = 1.0 if trial.arm == "method" else 0.0
    for step in range(steps):
        time.sleep(pause / steps)
        own = torch.randn((), generator=generator).item()
        noise = own + random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        level += 0.01 * gain * noise
        yield Progress(step + 1, steps)
        yield Point("level", step, level)
    if trial.tuning:
        yield Metric("validation", -abs(gain - (2.0 if trial.arm == "method" else 3.0)))
    else:
        yield Metric("score", level)
        yield Metric("third", 1 / 3)


def leave_a_trace(trial: Trial) -> None:
    """Append a line for each cell that begins, where ``$FAKE_TRACE`` asks for it."""
    if "FAKE_TRACE" in os.environ:
        with Path(os.environ["FAKE_TRACE"]).open("a") as file:
            file.write(f"{os.getpid()} {trial.study} {trial.arm} {trial.seed} {trial.tuning} {dict(trial.settings)}\n")


def misbehave(trial: Trial) -> Iterator[Event]:
    """One arm is sound; each other arm fails in the way it is named for, at seed 1 alone."""
    leave_a_trace(trial)
    mended = Path(os.environ.get("FAKE_MENDED", "/nonexistent")).exists()
    if trial.seed == 1 and not mended:
        if trial.arm == "dies":
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if trial.arm == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if trial.arm == "exits":
            os._exit(7)
        if trial.arm == "hangs":
            yield Progress(1, 2)
            time.sleep(60)
        if trial.arm == "raises":
            raise RuntimeError("the reason of it")
        if trial.arm == "diverges":
            yield Metric("score", float("nan"))
            return
        if trial.arm == "overflows":
            yield Metric("score", float("inf"))
            return
        if trial.arm == "silent":
            return
        if trial.arm == "other":
            yield Metric("loss", 1.0)
            return
        if trial.arm == "wrong":
            yield 3.0  # type: ignore[misc]
    yield Metric("score", float(trial.seed) + (trial.arm == "method"))


def chatter(trial: Trial) -> Iterator[Event]:
    """Prints far more than a pipe holds."""
    print("x" * 1_000_000, flush=True)
    yield Metric("score", float(trial.seed) + (trial.arm == "method"))


def diverging(trial: Trial) -> Iterator[Event]:
    """Tuning diverges for the settings below 0."""
    gain = float(trial.settings["gain"])
    yield Metric("validation" if trial.tuning else "score", float("nan") if gain < 0 else gain)


def drawing(trial: Trial) -> Iterator[Event]:
    """Draws two charts, and leaves a curve beside them."""
    for step in range(3):
        yield Bar("schedule, in ms", f"stage {step % 2}", "forward" if step < 2 else "backward", step, step + 0.5)
        yield Point("level", step, trial.seed)
    if trial.arm == "method":
        yield Bar("other chart", "row <b>", "kind & kind", 0, 1 + trial.seed)
    yield Metric("score", float(trial.seed) + (trial.arm == "method"))


def empty(trial: Trial) -> Iterator[Event]:
    yield Metric("score", float(trial.seed))


def claim(slug: str, study: Study, run=train, judge=judge, **more) -> Claim:
    rows = tuple(Comparison("main", "score", study.arms[0], arm) for arm in study.arms[1:])
    return Claim(
        slug=slug,
        statement="A fake method scores more than a fake baseline.",
        figures=(Figure("method 1.0 against 0.0", "Table 1"),),
        rule="Reproduced: the interval of the difference in score is above 0.",
        studies={"main": study},
        comparisons=more.pop("comparisons", rows),
        run=run,
        judge=judge,
        **more,
    )


PAIR = ("method", "baseline")
TIERS = {"smoke": Tier(1, {"steps": 2}), "small": Tier(3, {"steps": 20})}
GAINS = tuple({"gain": gain} for gain in (1.0, 2.0, 3.0, 2))

QUICK = claim("fake-quick", Study(PAIR, TIERS))
TUNED = claim("fake-tuned", Study(PAIR, TIERS, Tuning(GAINS, "validation")), deviations=("All of it is fake.",))
DRAWS = claim("fake-draws", Study(PAIR, TIERS), run=drawing)
SLOW = claim(
    "fake-slow",
    Study(PAIR, {"small": Tier(16, {"steps": 10, "pause": 0.05})}, Tuning(GAINS, "validation")),
)
EMPTY = claim("fake-empty", Study(PAIR, {"small": Tier(100)}), run=empty)
BAD = {
    arm: claim(f"fake-{arm}", Study(("method", arm), {"small": Tier(3)}), run=misbehave)
    for arm in ("dies", "crashes", "exits", "hangs", "raises", "diverges", "overflows", "silent", "other", "wrong")
}
DIES, CRASHES, EXITS, HANGS, RAISES = (BAD[arm] for arm in ("dies", "crashes", "exits", "hangs", "raises"))
DIVERGES, OVERFLOWS, SILENT, OTHER, WRONG = (BAD[arm] for arm in ("diverges", "overflows", "silent", "other", "wrong"))
CHATTER = claim("fake-chatter", Study(PAIR, {"small": Tier(2)}), run=chatter)
SOME_DIVERGE = claim(
    "fake-some-diverge",
    Study(PAIR, {"small": Tier(2)}, Tuning(({"gain": -1.0}, {"gain": 1.0}), "validation")),
    run=diverging,
)
ALL_DIVERGE = claim(
    "fake-all-diverge",
    Study(PAIR, {"small": Tier(2)}, Tuning(({"gain": -1.0}, {"gain": -2.0}), "validation")),
    run=diverging,
)
TWO_STUDIES = Claim(
    slug="fake-two-studies",
    statement="Two studies.",
    figures=(),
    rule="None.",
    studies={"main": Study(PAIR, TIERS), "other": Study(PAIR, {"small": Tier(2)})},
    comparisons=(Comparison("main", "score", *PAIR), Comparison("other", "score", *PAIR, label="other score")),
    run=train,
    judge=judge,
)


def no_judge(evidence: Evidence) -> Verdict:
    evidence.values("main", "method", "accuracy")
    raise AssertionError


JUDGE_RAISES = claim("fake-judge-raises", Study(PAIR, TIERS), judge=no_judge)
NOT_A_CLAIM = 3


def holds(evidence: Evidence) -> Verdict:
    return Verdict("partly", "it holds", {"worst score": float(evidence.values("main", "method", "score").min())})


ALONE = claim("fake-alone", Study(("method",), TIERS), judge=holds)


def hungry(trial: Trial) -> Iterator[Event]:
    """Seed 0 of the method fills 200 MB."""
    if trial.seed == 0 and trial.arm == "method":
        yield Metric("filled", float(np.ones(200_000_000, dtype=np.uint8).sum()))
    yield Metric("score", float(trial.seed))


HUNGRY = claim("fake-hungry", Study(PAIR, {"small": Tier(2)}), run=hungry)


def parental(trial: Trial) -> Iterator[Event]:
    """Seed 1 starts a process of its own, and hangs."""
    if trial.seed == 1 and trial.arm == "method":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["FAKE_TRACE"]).write_text(str(child.pid))
        child.wait()
    yield Metric("score", float(trial.seed))


PARENTAL = claim("fake-parental", Study(PAIR, {"small": Tier(2)}), run=parental)


def backwards(trial: Trial) -> Iterator[Event]:
    """The baseline scores one more than the method."""
    yield Metric("score", float(trial.seed) + (trial.arm == "baseline"))


BACKWARDS = claim("fake-backwards", Study(PAIR, {"small": Tier(3)}), run=backwards)
