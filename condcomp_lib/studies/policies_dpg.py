"""DPG beside REINFORCE as in *partitions*: one policy that reads X, 16 groups, three pretrainings (section 3)."""

import itertools
from collections.abc import Sequence

import torch

from condcomp_lib import studies
from condcomp_lib.claims import Claim
from condcomp_lib.policy_training import policy_plan, train_policy
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import partitioning, policy_results, targets
from condcomp_lib.studies.lazy_results import Kind
from condcomp_lib.studies.lazy_runs import control_of, deciding, measure
from condcomp_lib.studies.partitioning import PAPER, PLAIN, TAU
from condcomp_lib.training import obtain_target

RECIPE = 1
HALF: Kind = ("svhn", "3x800", "dropout-0.5", None, "activity")
KINDS: dict[str, tuple[Kind, ...]] = {
    "quick": (("digits", "2x64", "dropout-uniform", 0.3, "activity"),),
    "paper": (PLAIN, HALF, PAPER),
}
# Ways to learn and policy seeds, in the order of the runs. REINFORCE itself is the study `partitioning`: same settings,
# seeds, partitions and first weights, so that runs are paired.
LEARNED = (("dpg", 0), ("dpg-bits", 0), ("dpg", 1))


def specs(profile: str) -> list[RunSpec]:
    """One run per kind, estimator and seeds, each the twin of a run of the study `partitioning`."""
    found = []
    twins = [spec.settings for spec in partitioning.specs(profile) if spec.settings["activity_asked"] == TAU]
    kinds = {kind[:-1]: kind for kind in KINDS[profile]}
    for (estimator, policy_seed), twin in itertools.product(LEARNED, twins):
        fields = ("dataset", "architecture", "pretraining", "dropout_eps", "rescale")
        if tuple(twin[field] for field in fields) != kinds.get(tuple(twin[field] for field in fields[:-1])):
            continue
        if twin["policy_seed"] != policy_seed:
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


def claims(records: Sequence[Record]) -> list[Claim]:
    """See `policy_results.dpg_claims`."""
    return policy_results.dpg_claims(records, twins(records))


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 02 that are made from this study."""
    return dict.fromkeys(("policies_dpg", "policies_dpg_table"), records)


STUDY = studies.Study(
    name="policies-dpg",
    title="DPG and REINFORCE",
    notebook="02_policies",
    specs=specs,
    compute=compute,
    answers=policy_results.no_answers,
    claims=claims,
    promises=promises,
    audited=("accuracy", "accuracy_ratio", "activity"),
)
