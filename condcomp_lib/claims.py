"""Claims: what a paper or this companion asserts, judged by an interval; and the record of how each was judged.

A claim that fails stays in, marked refuted. What must not happen unnoticed is that a verdict *changes*: the recorded
verdicts lie in `data/verdicts.csv`, and notebooks compare with them.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from condcomp_lib import paths
from condcomp_lib.errors import CondcompError
from condcomp_lib.files import write_atomically
from condcomp_lib.stats import Interval

VERDICTS = ("holds", "refuted", "undecided")


class ChangedVerdict(CondcompError):
    """A claim's verdict differs from the recorded one, or a claim has no recorded verdict."""


@dataclass(frozen=True)
class Claim:
    """One assertion with its evidence.

    `source` is an id of `published.csv`, a paper's section, or "ours"; `rule` the test in words.
    """

    id: str
    source: str
    statement: str
    interval: Interval
    rule: str
    verdict: str


def judge(id: str, source: str, statement: str, interval: Interval, *, above: float | None = None,
          below: float | None = None) -> Claim:  # fmt: skip
    """The claim that the interval lies wholly above (or below) a level.

    "holds" when it does, "refuted" when it lies wholly on the other side, "undecided" when it contains the level or
    comes from a single run (its ends are NaN).

    >>> judge("toy", "ours", "more than half", Interval(0.7, 0.6, 0.8, 5, 0.95), above=0.5).verdict
    'holds'
    """
    if (above is None) == (below is None):
        raise CondcompError(f"claim {id!r} needs one of above= and below=, not both or neither")
    level = above if above is not None else below
    assert level is not None
    higher, lower = interval.low > level, interval.high < level
    holds, fails = (higher, lower) if above is not None else (lower, higher)
    verdict = "holds" if holds else "refuted" if fails else "undecided"
    return Claim(id, source, statement, interval, f"{'above' if above is not None else 'below'} {level:g}", verdict)


def recorded(path: Path | None = None) -> dict[str, str]:
    """The recorded verdicts by claim id."""
    path = path or paths.verdicts_csv()
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            verdicts = {row["claim"]: row["verdict"] for row in csv.DictReader(stream)}
    except (OSError, KeyError) as error:
        raise CondcompError(f"cannot read {path}: it must be a CSV file with the columns claim,verdict") from error
    for claim, verdict in verdicts.items():
        if verdict not in VERDICTS:
            raise CondcompError(f"{path} gives {claim!r} the verdict {verdict!r}; known: {', '.join(VERDICTS)}")
    return verdicts


def check_verdicts(claims: Iterable[Claim], profile: str, path: Path | None = None) -> list[Claim]:
    """Return the claims when every verdict is the recorded one, whichever that is; raise ChangedVerdict otherwise.

    In the quick profile numbers come from small runs made on this machine, so a verdict may be undecided there; what
    fails is a reversal, from "holds" to "refuted" or back. Quick runs are other networks, hence claims of their own.
    """
    claims, known = list(claims), recorded(path)
    wrong = []
    for claim in claims:
        expected = known.get(claim.id)
        if expected is None:
            wrong.append(f"{claim.id}: {claim.verdict} ({claim.interval}), no verdict recorded in data/verdicts.csv")
        elif expected != claim.verdict and not (profile == "quick" and "undecided" in (expected, claim.verdict)):
            wrong.append(f"{claim.id}: was {expected}, is now {claim.verdict} ({claim.interval})")
    if wrong:
        raise ChangedVerdict("changed verdicts: " + "; ".join(wrong))
    return claims


def record(claims: Iterable[Claim], path: Path | None = None) -> dict[str, str]:
    """Record the claims' verdicts, those of other claims staying as they are; returns what changed."""
    path = path or paths.verdicts_csv()
    known = recorded(path)
    changed = {claim.id: claim.verdict for claim in claims if known.get(claim.id) != claim.verdict}
    lines = [f"{id},{verdict}\n" for id, verdict in sorted({**known, **changed}.items())]
    write_atomically(path, ("claim,verdict\n" + "".join(lines)).encode())
    return changed
