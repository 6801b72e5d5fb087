"""The generated parts of README.md: numbers and tables come from the stored runs, never from typing."""

import json
import re

import pandas as pd

from condcomp_lib import paths, reproduce, studies, tables
from condcomp_lib.errors import CondcompError
from condcomp_lib.files import write_atomically
from condcomp_lib.studies import (
    block_results,
    blocks_accuracy,
    coactivation_results,
    conv_results,
    conversion,
    joint_first,
    joint_results,
    lazy_results,
    partitioning,
    partitioning_splits,
    policy_results,
    pretraining_cost,
    pretraining_results,
    split_results,
    start,
)


class StaleReadme(CondcompError):
    """README.md does not say what the stored runs say."""


def write() -> None:
    """Rewrite the generated parts of README.md in place."""
    path = paths.root() / "README.md"
    write_atomically(path, fill(path.read_text(encoding="utf-8"), blocks()).encode())


def check() -> None:
    """Raise StaleReadme when a generated part is out of date."""
    text = (paths.root() / "README.md").read_text(encoding="utf-8")
    if fill(text, blocks()) != text:
        raise StaleReadme("README.md is out of date with the stored runs; write it anew with: condcomp readme")


def fill(text: str, parts: dict[str, str]) -> str:
    """Put each part between its markers `<!-- begin NAME -->` and `<!-- end NAME -->`.

    >>> fill("<!-- begin n -->old<!-- end n -->", {"n": "new"})
    '<!-- begin n -->\\nnew\\n<!-- end n -->'
    """
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- begin {name} -->).*?(<!-- end {name} -->)", re.DOTALL)
        pieces = pattern.split(text)
        if len(pieces) != 4:
            raise CondcompError(f"README.md has {len(pieces) // 3} parts '<!-- begin {name} -->'; it needs exactly one")
        text = f"{pieces[0]}{pieces[1]}\n{content}\n{pieces[2]}{pieces[3]}"
    return text


def blocks() -> dict[str, str]:
    """The generated parts by name."""
    records = studies.records("start", "paper")
    rows = studies.overview()
    matched = [row for row in lazy_results.summary(studies.records("partitioning", "paper"))
               if row["decision"] == partitioning.MATCHED]  # fmt: skip
    splits = studies.records("partitioning-splits", "paper")
    learned = studies.records("policies", "paper", partial=True)
    timed = studies.records("blocks", "paper", partial=True)
    traded = studies.records("blocks-accuracy", "paper", partial=True)
    pretrained = studies.records("pretraining", "paper", partial=True)
    cost = studies.records("pretraining-cost", "paper", partial=True)
    together = studies.records("coactivation", "paper", partial=True)
    joint, first = (studies.records(name, "paper", partial=True) for name in ("joint", "joint-first"))
    filters, filters_timed = (studies.records(name, "paper", partial=True) for name in ("conv", "conv-time"))
    converted = studies.records("conversion", "paper", partial=True)
    answered = sum(row["ours"] != "not yet" for row in rows)
    times = json.loads((paths.root() / "data" / "timings.json").read_text(encoding="utf-8"))
    return {
        "targets": tables.markdown(tables.frame(start.summary(records))),
        "lazy": tables.markdown(tables.frame(matched, 2)),
        "splits": tables.markdown(tables.frame(split_results.across_kinds(splits, partitioning_splits.CHEAP), 2)),
        "policies": tables.markdown(tables.frame(policy_results.summary(learned, "best", "estimators"), 3)),
        "pretraining": tables.markdown(tables.frame(pretraining_results.matched_table(pretrained), 3)),
        "cost": pretraining_cost.finding(cost),
        "flow": tables.markdown(tables.frame(coactivation_results.flow_table(together), 3)),
        "blocks": tables.markdown(tables.frame(block_results.rows(block_results.promised(timed), timed), 1))
        + f"\n\nMeasured on one machine: {block_results.measured_on(timed[0]) if timed else 'not yet'}.",
        "trained": tables.markdown(tables.frame(blocks_accuracy.table(traded, blocks_accuracy.rivals(traded)), 3)),
        "joint": tables.markdown(tables.frame(joint_results.brief(joint))),
        "first": tables.markdown(tables.frame(joint_first.table(first, joint))),
        "conv": tables.markdown(tables.frame(conv_results.brief(filters, filters_timed))),
        "conversion": tables.markdown(tables.frame(conversion.table(converted))),
        "items": tables.markdown(pd.DataFrame(studies.items())),
        "answered": (
            f"**How far it is**: notebooks so far: {', '.join(reproduce.names())}; {answered} of {len(rows)} published "
            f"numbers have ours beside them. {studies.progress()}"
        ),
        "times": tables.markdown(pd.DataFrame(times["rows"])) + f"\n\nMeasured on {times['machine']}.",
    }
