"""Search over every example's masks: how good a choice of groups there is, beside the oracle's and a learned one."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.oracle import MaskSearch, Oracle
from condcomp_lib.policies import Budget
from condcomp_lib.policy_training import train_policy
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import policies, policy_results
from condcomp_lib.studies.lazy_results import Kind, kind_id, kind_of, label

RECIPE = 1
KINDS: dict[str, tuple[Kind, ...]] = {
    "quick": (("digits", "2x64", "dropout-uniform", 0.3, "none"),),
    "paper": (policies.BEST,),
}
TARGETS = {"quick": 1, "paper": 3}
EXAMPLES, GROUPS = {"quick": 40, "paper": 500}, {"quick": 8, "paper": 16}
ROUNDS = 10  # exchanges of each example at most
WAYS = ("learned", "oracle", "greedy", "local search")


def specs(profile: str) -> list[RunSpec]:
    """One run per kind and target."""
    base = next(s.settings for s in policies.specs(profile) if s.settings["method"] == policies.WARM)
    found = []
    for seed, kind in itertools.product(range(TARGETS[profile]), KINDS[profile]):
        fields = ("dataset", "architecture", "pretraining", "dropout_eps", "rescale")
        seeds = dict.fromkeys(("target_seed", "partition_seed", "policy_seed"), seed)
        own = {"groups": GROUPS[profile], "test_examples": EXAMPLES[profile], "rounds": ROUNDS, "part": "search"}
        left = ("sample_draws", "sampled_examples", "decision", "decision_draws")
        settings = {**{k: v for k, v in base.items() if k not in left}, **seeds, **own,
                    **dict(zip(fields, kind, strict=True))}  # fmt: skip
        settings["target"] = policies.targets.target_of(settings).name
        found.append(RunSpec("policies-search", RECIPE, settings))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Accuracy and divergence from the target under masks of the same size that were chosen in four ways."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    lazy, trained = policies.untrained(settings, data, artefacts)
    train_policy(lazy, data, settings, torch.Generator().manual_seed(settings["policy_seed"]))
    x, y = (torch.from_numpy(part[: settings["test_examples"]]) for part in (data.test.x, data.test.y))
    oracle = Oracle(lazy.mlp, lazy.partition, lazy.policy.pool)
    budget = Budget.of(settings["rates"], lazy.partition, lazy.policy)
    search = MaskSearch(lazy, budget.counts)
    knowing = LazyNetwork(lazy.target, lazy.partition, oracle, budget, lazy.rescale)
    with torch.inference_mode():
        masks = {"learned": decided_by(lazy, budget).evaluate(x).mask, "oracle": knowing.evaluate(x).mask}
    masks["greedy"] = search.greedy(x)
    masks["local search"] = search.improve(x, masks["greedy"], settings["rounds"])
    full = (lazy.target(x).argmax(1) == y).double().mean().item()
    result: dict[str, Any] = {"target_accuracy": full}
    for way, mask in masks.items():
        accuracy = (search.scores(x, mask).argmax(1) == y).double().mean().item()
        result[way] = {
            "accuracy": accuracy,
            "ratio": accuracy / full,
            "divergence": search.distances(x, mask[:, None]).mean().item(),
            "activity": lazy.partition.activity(mask).mean().item(),
        }
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, {"target": trained.cite()})


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Ratio and divergence of each way to choose masks, by kind."""
    found = []
    for kind in dict.fromkeys(map(kind_of, records)):
        group = [record.result for record in records if kind_of(record) == kind]
        for way in WAYS:
            found.append(
                {
                    "target": label(kind),
                    "masks": way,
                    "ratio": stats.interval([result[way]["ratio"] for result in group]),
                    "divergence": stats.interval([result[way]["divergence"] for result in group]),
                    "activity": stats.interval([result[way]["activity"] for result in group]),
                }
            )
    return found


def finding(records: Sequence[Record]) -> str:
    """What searched masks keep beside the oracle's and a learned policy's, as a Markdown list."""
    rows, lines = table(records), []
    for kind in dict.fromkeys(row["target"] for row in rows):
        kept = {row["masks"]: row["ratio"].format(2) for row in rows if row["target"] == kind}
        said = ", ".join(f"{way} {kept[way]}" for way in WAYS)
        lines.append(f"- **Masks for single examples**, {kind}: {said}.")
    return "\n".join(lines)


def claims(records: Sequence[Record]) -> list[Claim]:
    """Single examples have better masks than the oracle's ranking and than a learned policy's."""
    found = []
    for kind in dict.fromkeys(map(kind_of, records)):
        group = [record.result for record in records if kind_of(record) == kind]
        if len(group) < 2:
            continue  # one target says nothing about another
        names = {"oracle": "the oracle's", "learned": "a learned policy's"}
        for other in names:
            gain = np.array([result["local search"]["ratio"] - result[other]["ratio"] for result in group])
            statement = f"{label(kind)}, {GROUPS['paper']} groups a layer: searched masks keep more than {names[other]}"
            id = f"search.{kind_id(kind)}.{other}"
            found.append(judge(id, "ours", statement, stats.interval(gain.tolist()), above=0.0))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 02 that are made from this study."""
    return dict.fromkeys(("policies_search_table",), records)


STUDY = studies.Study(
    name="policies-search",
    title="Search over masks",
    notebook="02_policies",
    specs=specs,
    compute=compute,
    answers=policy_results.no_answers,
    claims=claims,
    promises=promises,
    audited=("target_accuracy",),
)
