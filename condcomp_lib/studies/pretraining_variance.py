"""How much the class-flow penalty varies from minibatch to minibatch (*partitions*, section 6), by form and size."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.fitting import Balanced
from condcomp_lib.flow import FORMS, Flow, scores_with_flow
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import coactivation, targets
from condcomp_lib.studies.coactivation_results import FLOW, PLAIN
from condcomp_lib.studies.policy_results import no_answers
from condcomp_lib.training import obtain_target

RECIPE = 1
BATCHES = {"quick": (20, 64), "paper": (20, 32, 64, 128, 256, 512)}
MINIBATCHES = 100  # of each size
NETWORKS = (PLAIN, FLOW)
WIDEST = {"quick": "2x64", "paper": "2x500"}
SEEDS = {"quick": 1, "paper": 3}


def specs(profile: str) -> list[RunSpec]:
    """One run per network and target seed; the networks are those of study `coactivation`."""
    found = []
    for kind, seed in itertools.product(coactivation.kinds(profile), range(SEEDS[profile])):
        if kind["architecture"] == WIDEST[profile] and kind["network"] in NETWORKS:
            settings = {**kind, "target_seed": seed, "batches": BATCHES[profile], "minibatches": MINIBATCHES}
            settings["target"] = targets.target_of(settings).name
            found.append(RunSpec("pretraining-variance", RECIPE, settings))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Mean and coefficient of variation of each form over class-balanced minibatches of each size; also after the root
    that makes a form of the size of a flow, for a tenth power multiplies what varies a little by ten."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    target.requires_grad_(False)
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    rows = []
    for batch in settings["batches"]:
        minibatches = Balanced(y, data.classes, batch)
        draws = torch.Generator().manual_seed(settings["target_seed"])
        chosen = list(minibatches(batch * settings["minibatches"], draws))
        for form, normalised in itertools.product(FORMS, (False, True)):
            flow = Flow(form, normalised)
            values = np.array([scores_with_flow(target, x[some], y[some], flow)[1].item() for some in chosen])
            flows = values ** (1 / {"product": data.classes, "pairwise": 2, "root": 1}[form])
            found = {"form": form, "normalised": normalised, "batch": batch, "mean": float(values.mean())}
            found["variation"] = float(values.std() / values.mean())
            rows.append(found | {"variation_of_flow": float(flows.std() / flows.mean())})
    cited = {"target": trained.cite()}
    return Outcome({"varies": rows}, None, {"note": data.note, "checksum": data.checksum}, cited)


def variation(record: Record, form: str, normalised: bool, field: str = "variation") -> dict[int, float]:
    """The coefficient of variation of a form by size of minibatch, or of its root ("variation_of_flow")."""
    rows = record.result["varies"]
    return {r["batch"]: r[field] for r in rows if (r["form"], r["normalised"]) == (form, normalised)}


def lines(records: Sequence[Record], network: str, field: str = "variation") -> dict[str, tuple[list[int], np.ndarray]]:
    """For each form the sizes of minibatch and the coefficients of variation (runs x sizes) in one kind of network;
    `field` as for `variation`."""
    group = [record for record in records if record.spec.settings["network"] == network]
    found = {}
    for form, normalised in itertools.product(FORMS, (False, True)):
        runs = [variation(record, form, normalised, field) for record in group]
        name = f"{form}{', normalised' if normalised else ''}"
        found[name] = list(runs[0]), np.array([list(run.values()) for run in runs])
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """The paper's remarks on the penalty's variance."""
    found = []
    for network in dict.fromkeys(record.spec.settings["network"] for record in records):
        group = [record for record in records if record.spec.settings["network"] == network]
        if len(group) < 2:
            continue  # one network says nothing about another
        small, large = min(group[0].spec.settings["batches"]), max(group[0].spec.settings["batches"])
        name, end = f"{group[0].spec.settings['architecture']}, {network}", network.replace(", ", "-")
        sizes = [variation(r, "product", False)[small] - variation(r, "product", False)[large] for r in group]
        statement = f"{name}: the product varies more over minibatches of {small} than of {large}"
        found.append(
            judge(f"flow.variance.batch.{end}", "partitions, 4.2", statement, stats.interval(sizes), above=0.0)
        )
        at = 32 if 32 in group[0].spec.settings["batches"] else small
        for other, normalised, said, source in (
            ("product", True, "dividing flows by their layer's mean lowers the product's variation", "partitions, 6"),
            (
                "pairwise",
                False,
                "pairs vary less than the product, both taken to the size of a flow",
                "partitions, 4.2",
            ),
        ):
            field = "variation" if other == "product" else "variation_of_flow"
            change = [variation(r, other, normalised, field)[at] - variation(r, "product", False, field)[at]
                      for r in group]  # fmt: skip
            id = f"flow.variance.{other}{'.normalised' if normalised else ''}.{end}"
            statement = f"{name}, minibatches of {at}: {said}"
            found.append(judge(id, source, statement, stats.interval(change), below=0.0))
    return found


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The coefficient of variation of each form by size of minibatch, over target seeds."""
    rows = []
    for network in dict.fromkeys(record.spec.settings["network"] for record in records):
        for form, (sizes, values) in lines(records, network).items():
            cells = {f"{size} examples": stats.interval(values[:, i]) for i, size in enumerate(sizes)}
            flows = lines(records, network, "variation_of_flow")[form][1]
            rooted = {f"its root, {sizes[0]} examples": stats.interval(flows[:, 0])}
            rows.append({"network": network, "form": form, **cells, **rooted})
    return rows


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 03 that are made from this study."""
    return dict.fromkeys(("pretraining_variance", "pretraining_variance_table"), records)


STUDY = studies.Study(
    name="pretraining-variance",
    title="Variance of the class-flow penalty",
    notebook="03_pretraining",
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=(),
)
