"""Tables: rows of plain values to formatted frames, and `save_table` to write one with its provenance."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from condcomp_lib import manifest
from condcomp_lib.claims import Claim
from condcomp_lib.runs import Record
from condcomp_lib.stats import Interval


def frame(rows: Iterable[Mapping[str, Any]], digits: int = 3) -> pd.DataFrame:
    """Rows as a frame of text: intervals with their ends, numbers rounded to `digits` decimals.

    >>> frame([{"net": "500", "ratio": Interval(0.98, 0.97, 0.99, 5, 0.95)}], digits=2).iloc[0].ratio
    '0.98 [0.97, 0.99]'
    """

    def text(value: Any) -> str:
        if isinstance(value, Interval):
            return value.format(digits)
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    return pd.DataFrame([{key: text(value) for key, value in row.items()} for row in rows])


def claim_rows(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """The rows of a table of claims: what is claimed, what was found, the verdict."""
    return [
        {"claim": c.statement, "source": c.source, "found": c.interval, "holds if": c.rule, "verdict": c.verdict}
        for c in claims
    ]


def compact(overview: pd.DataFrame) -> pd.DataFrame:
    """The overview of published numbers (`studies.overview`) in few columns, for reading."""
    described = overview[["dataset", "architecture", "method", "setting"]].apply(
        lambda row: ", ".join(filter(None, row)), axis="columns"
    )
    columns = {
        "id": overview["id"],
        "item": overview["paper"] + ", " + overview["where"],
        "what": described,
        "metric": overview["metric"].str.replace("_", " "),
    }
    return pd.DataFrame(columns | {name: overview[name] for name in ("published", "ours", "note")})


def save_table(table: pd.DataFrame, name: str, records: Sequence[Record], profile: str) -> None:
    """Write `table` as CSV with its provenance sidecar."""
    manifest.save(name, {".csv": table.to_csv(index=False).encode()}, records, profile)


def markdown(table: pd.DataFrame) -> str:
    """`table` as a Markdown table (README)."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"

    if table.empty:
        return ""
    return "\n".join([line(table.columns), line("---" for _ in table.columns), *(line(r) for r in table.to_numpy())])
