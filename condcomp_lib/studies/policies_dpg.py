"""DPG beside REINFORCE as in *partitions*: one policy that reads X, 16 groups, three pretrainings (section 3)."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from condcomp_lib import studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.policy_training import policy_plan, train_policy
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import partitioning, targets
from condcomp_lib.studies.lazy_results import Kind, gains, kind_id, kind_of, label, over_runs
from condcomp_lib.studies.lazy_runs import control_of, deciding, measure
from condcomp_lib.studies.partitioning import PAPER, PLAIN, TAU
from condcomp_lib.studies.policy_results import BASE, columns, no_answers, ratio, ratios
from condcomp_lib.training import obtain_target

RECIPE = 1
NAMES = {"reinforce": "REINFORCE", "dpg": "DPG", "dpg-bits": "DPG, bits"}
HALF: Kind = ("svhn", "3x800", "dropout-0.5", None, "activity")
KINDS: dict[str, tuple[Kind, ...]] = {
    "quick": (("digits", "2x64", "dropout-uniform", 0.3, "activity"),),
    "paper": (PLAIN, HALF, PAPER),
}
# REINFORCE itself is the study `partitioning`: same settings, seeds, partitions and first weights, so that runs are
# paired. One policy seed of each target.
LEARNED = ("dpg", "dpg-bits")


def specs(profile: str) -> list[RunSpec]:
    """One run per kind, estimator and seeds, each the twin of a run of the study `partitioning`."""
    found = []
    twins = [spec.settings for spec in partitioning.specs(profile) if spec.settings["activity_asked"] == TAU]
    fields = ("dataset", "architecture", "pretraining", "dropout_eps", "rescale")
    for estimator, twin in itertools.product(LEARNED, twins):
        if tuple(twin[field] for field in fields) not in KINDS[profile] or twin["policy_seed"] != 0:
            continue
        own = {key: value for key, value in twin.items() if key not in ("baseline", "control")}
        learned = policy_plan(estimator=estimator, lambda_s=twin["lambda_s"], **partitioning.POLICY[twin["dataset"]])
        found.append(RunSpec("policies-dpg", RECIPE, {**own, **learned}))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train the policy, hold it to 25% activity by a threshold, measure it, interpolate its control."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    lazy = partitioning.untrained(settings, target, data, partitioning.drawn(settings, target))
    curve = train_policy(lazy, data, settings, torch.Generator().manual_seed(settings["policy_seed"]))
    result = measure(deciding(lazy, settings, data), settings, data, trained)
    result |= {"accuracy_curve": curve.accuracy, "activity_curve": curve.activity, "epochs": len(curve.accuracy)}
    wanted, seed = result.pop("multiply_adds"), settings["target_seed"]
    control, controls = control_of(target, trained, wanted, data, artefacts, seed)
    cited = {"target": trained.cite(), **controls}
    return Outcome(result | control, None, {"note": data.note, "checksum": data.checksum}, cited)


def twins(records: Sequence[Record]) -> list[Record]:
    """The runs with REINFORCE that those of this study are paired with."""
    quick = any(record.spec.settings["dataset"] == "digits" for record in records)
    return studies.records("partitioning", "quick" if quick else "paper", partial=True) if records else []


def _pairs(records: Sequence[Record], paired: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """By kind the records of each estimator, REINFORCE's from its own study, where the same settings were used."""
    found: dict[str, dict[str, list[Record]]] = {}
    kinds = list(dict.fromkeys(map(kind_of, records)))
    same = [twin for twin in paired if twin.spec.settings["activity_asked"] == 0.25]
    for record in [*same, *records]:
        if kind_of(record) in kinds:
            name = NAMES[record.spec.settings["estimator"]]
            found.setdefault(label(kind_of(record)), {}).setdefault(name, []).append(record)
    return found


def series(records: Sequence[Record], paired: Sequence[Record]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """For each kind and estimator the ratios of its runs (see `policy_results.ratios`); `paired`: see `twins`."""
    return {
        kind: {name: ratios(group) for name, group in groups.items()}
        for kind, groups in _pairs(records, paired).items()
    }


def summary(records: Sequence[Record], paired: Sequence[Record]) -> list[dict[str, Any]]:
    """DPG and REINFORCE at 25% activity with their paired difference, by kind."""
    rows = []
    for kind, groups in _pairs(records, paired).items():
        for name, group in groups.items():
            rows.append(
                {
                    "target": kind,
                    "estimator": name,
                    "runs": len(group),
                    "less REINFORCE": "" if name == BASE else gains(group, groups[BASE], ratio) or "",
                    **columns(group),
                }
            )
    return rows


def claims(records: Sequence[Record]) -> list[Claim]:
    """DPG keeps more than REINFORCE, for each pretraining."""
    found = []
    ids = {label(kind): kind_id(kind) for kind in dict.fromkeys(map(kind_of, records))}
    for kind, groups in _pairs(records, twins(records)).items():
        for name in (name for name in groups if name != BASE):
            id = f"dpg.{ids[kind]}.{name.lower().replace(', ', '.')}"
            interval = gains(groups[name], groups[BASE], ratio)
            if interval is not None and interval.n > 1:
                statement = f"{kind}, 25% active: {name} keeps more than REINFORCE"
                found.append(judge(id, "ours", statement, interval, above=0.0))
    return found


def finding(records: Sequence[Record], paired: Sequence[Record]) -> str:
    """DPG less REINFORCE by kind, as a Markdown list with its numbers filled in."""
    lines = []
    for kind, groups in _pairs(records, paired).items():
        parts = [f"REINFORCE keeps {over_runs(groups[BASE], ratio).format(2)}"]
        for name in (name for name in groups if name != BASE):
            if (gain := gains(groups[name], groups[BASE], ratio)) is not None:
                parts.append(f"{name} differs from it by {gain.format(3)}")
        lines.append(f"- **{kind}**, 16 random groups: {'; '.join(parts)}.")
    return "\n".join(lines)


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 02 that are made from this study."""
    both = [*records, *twins(records)]
    return {"policies_dpg": both, "policies_dpg_table": both}


STUDY = studies.Study(
    name="policies-dpg",
    title="DPG and REINFORCE",
    notebook="02_policies",
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=("accuracy", "accuracy_ratio", "activity"),
)
