"""The papers' numbers by id, from `data/published.csv`, and the overview that sets our own beside each of them."""

import csv
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condcomp_lib import paths
from condcomp_lib.errors import CondcompError, UsageError
from condcomp_lib.stats import Interval

DESCRIPTION = ("id", "paper", "where", "dataset", "architecture", "method", "setting")
COLUMNS = (*DESCRIPTION, "metric", "value", "spread", "note")

# Decimals of our numbers by metric; 2 for every *_percent, 3 for any other.
_DIGITS = {
    "forward_speedup": 2,
    "kernel_speedup": 2,
    "training_time_ratio": 2,
    "sd_of_partition_size": 2,
    "minibatches_per_hour": 0,
}


class PublishedError(CondcompError):
    """The file of published numbers, or what is set beside them, is not as it should be."""


@dataclass(frozen=True)
class Published:
    """One number of a paper. `decimals` are those printed there, so that 35 stays 35 and 0.110 stays 0.110."""

    id: str
    paper: str
    where: str
    dataset: str
    architecture: str
    method: str
    setting: str
    metric: str
    value: float | None
    spread: float | None
    note: str
    decimals: int = 0

    def format(self) -> str:
        """Such as '0.888 ± 0.008'; without a value 'lost' where the paper lacks it, else 'described' (see the note)."""
        if self.value is None:
            return "lost" if "missing" in self.note else "described"
        spread = "" if self.spread is None else f" ± {self.spread:.{self.decimals}f}"
        return f"{'about ' * (self.note == 'about')}{self.value:.{self.decimals}f}{spread}"


@dataclass(frozen=True)
class Answer:
    """What a study found for one id: `ours` in the unit of `metric`, which must be the published row's own.

    `ours` is None where the study speaks about the id without a number; `notebook` and `figure` say where to look.
    """

    id: str
    ours: Interval | float | None
    metric: str
    note: str = ""
    notebook: str = ""
    figure: str = ""


def load(path: Path | None = None) -> dict[str, Published]:
    """All published numbers by id, in the file's order.

    Raises PublishedError with line and column for a missing column, an id given twice or a number that is none.
    """
    path = path or paths.published_csv()
    rows: dict[str, Published] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
            if missing:
                wanted = ",".join(COLUMNS)
                raise PublishedError(
                    f"{path.name} line 1: column {missing[0]} is missing; the header must hold {wanted}"
                )
            for fields in reader:
                row = _row(fields, f"{path.name} line {reader.line_num}")
                if row.id in rows:
                    raise PublishedError(f"{path.name} line {reader.line_num}, column id: {row.id} is there twice")
                rows[row.id] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PublishedError(f"cannot read {path}: {error}; it must be a CSV file in UTF-8") from error
    return rows


def get(id: str, path: Path | None = None) -> Published:
    """The published number of one id, UsageError with the nearest ids where there is none.

    >>> get("Pt1.05").format()
    '0.888 ± 0.008'
    """
    rows = load(path)
    _check_known(id, rows)
    return rows[id]


def overview(
    answers: Iterable[Answer], reasons: Mapping[str, str] | None = None, path: Path | None = None
) -> list[dict[str, str]]:
    """One row per published id, in the file's order: theirs, ours, and where to look.

    `ours` is the answer's number, else the reason stated for the id in `reasons`, else "not yet". Raises PublishedError
    where an id has two answers, an answer in another unit, or both a number and a reason for having none.
    """
    rows, reasons = load(path), reasons or {}
    found: dict[str, Answer] = {}
    for answer in answers:
        if answer.id in found:
            places = f"{found[answer.id].notebook or 'no notebook'}, {answer.notebook or 'no notebook'}"
            raise PublishedError(f"{answer.id} has two answers ({places}): give one per id")
        _check_answer(answer, rows, reasons)
        found[answer.id] = answer
    for id in reasons:
        _check_known(id, rows)
    return [_line(row, found.get(id), reasons.get(id) or "not yet") for id, row in rows.items()]


def _line(row: Published, answer: Answer | None, otherwise: str) -> dict[str, str]:
    notes = [row.note * (row.note != "about"), f"ours: {answer.note}" if answer and answer.note else ""]
    return {
        **{name: getattr(row, name) for name in DESCRIPTION},
        "metric": row.metric,
        "published": row.format(),
        "ours": otherwise if answer is None or answer.ours is None else _ours(answer.ours, row.metric),
        "note": "; ".join(filter(None, notes)),
        "notebook": answer.notebook if answer else "",
    }


def _ours(number: Interval | float, metric: str) -> str:
    digits = 2 if metric.endswith("_percent") else _DIGITS.get(metric, 3)
    return number.format(digits) if isinstance(number, Interval) else f"{number:.{digits}f}"


def _check_answer(answer: Answer, rows: Mapping[str, Published], reasons: Mapping[str, str]) -> None:
    _check_known(answer.id, rows)
    if answer.metric != rows[answer.id].metric:
        raise PublishedError(f"the answer to {answer.id} is in {answer.metric!r}: give it in {rows[answer.id].metric}")
    if answer.ours is None:
        return
    estimate = answer.ours.estimate if isinstance(answer.ours, Interval) else answer.ours
    if not math.isfinite(estimate):
        raise PublishedError(f"the answer to {answer.id} is {estimate}: give a finite number, or None and a reason")
    if answer.id in reasons:
        raise PublishedError(
            f"{answer.id} has an answer and the reason {reasons[answer.id]!r} for none: drop one of them"
        )


def _check_known(id: str, rows: Mapping[str, Published]) -> None:
    if id not in rows:
        near = ", ".join(difflib.get_close_matches(id, rows, n=3))
        hint = f"the nearest are {near}" if near else f"ids look like {next(iter(rows), 'Pt1.01')}"
        raise UsageError(f"unknown id {id!r}; {hint}")


def _row(fields: dict[Any, Any], place: str) -> Published:
    if None in fields or None in fields.values():
        raise PublishedError(f"{place}: {'too many' if None in fields else 'too few'} fields; give one for each column")
    texts = {column: fields[column].strip() for column in COLUMNS}
    value, spread = (_number(texts[column], f"{place}, column {column}") for column in ("value", "spread"))
    if not texts["id"]:
        raise PublishedError(f"{place}, column id: it is empty; give an id such as Pt1.01")
    if value is None and (spread is not None or not texts["note"]):
        raise PublishedError(
            f"{place}, column value: it is empty; give a number, or only a note that says why there is none"
        )
    decimals = max(len(texts[column].partition(".")[2]) for column in ("value", "spread"))
    return Published(**{**texts, "value": value, "spread": spread, "decimals": decimals})


def _number(text: str, place: str) -> float | None:
    if not text:
        return None
    whole, _, decimals = text.removeprefix("-").partition(".")
    if not (whole + decimals).isdecimal():
        raise PublishedError(f"{place}: {text!r} is no number; give a decimal such as 0.888, or leave it empty")
    return float(text)
