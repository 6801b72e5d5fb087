"""The studies of pretraining and coactivation: run tables, one computed run of each, what is made of records."""

import numpy as np
import pytest
import torch

from condcomp_lib import published, studies
from condcomp_lib.flow import FORMS, Flow, scores_with_flow
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import (
    coactivation,
    coactivation_results,
    pretraining,
    pretraining_cost,
    pretraining_results,
    pretraining_search,
    pretraining_variance,
)
from condcomp_lib.targets import MLP

FAMILY = ("pretraining", "pretraining-search", "pretraining-cost", "pretraining-variance")


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "artefacts")


def test_the_family_is_run_by_one_command():
    assert studies.family("pretraining") == list(FAMILY)


def test_the_search_draws_its_settings_from_the_declared_space_once():
    tried = pretraining_search.sampled("paper")
    assert len(tried) == len(set(tried)) == pretraining_search.SAMPLED
    assert set(tried) <= set(pretraining_search.space())
    assert len(set(pretraining_search.space())) == 27


def test_the_setting_that_is_trained_anew_is_the_one_that_the_search_picks():
    records = studies.records("pretraining-search", "paper", partial=True)
    assert pretraining_search.CHOSEN["paper"] == pretraining_search.chosen(records)
    assert pretraining_search.SEED not in pretraining_search.FRESH["paper"]


def test_every_cell_of_the_paper_has_three_targets_and_two_policies_of_each():
    seeds = {}
    for spec in pretraining.specs("paper"):
        settings = spec.settings
        cell = (settings["pretraining"], settings["method"])
        seeds.setdefault(cell, set()).add((settings["target_seed"], settings["policy_seed"]))
    both = {(target, policy) for target in range(3) for policy in range(2)}
    assert all(seeds[cell] == both for cell in pretraining_results.CELLS)


def test_every_published_cell_is_asked_for_once_the_lost_ones_too():
    ids = [id for pair in pretraining_results.CELLS.values() for id in pair]
    wanted = [id for id in published.load() if id.startswith(("Pt1", "Pt2"))]
    assert sorted([*ids, *pretraining_results.TARGETS.values()]) == wanted


@pytest.mark.parametrize("form", FORMS)
def test_the_naive_step_computes_what_the_factorised_one_does(form):
    model = MLP(12, (7, 6), 3, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(9, 12), torch.arange(9) % 3
    ours, theirs = scores_with_flow(model, x, y, Flow(form)), pretraining_cost.naive_scores(model, x, y, Flow(form))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].item() == pytest.approx(theirs[1].item(), rel=1e-4)


def test_peak_memory_counts_what_a_step_allocates():
    row = {**pretraining_cost.BAR, "widths": "64-50-10"}

    class Allocating:
        def clear(self):
            self.kept = None

        def __call__(self):
            self.kept = torch.ones(250_000)
            torch.ones(500_000)

    assert 3e6 <= pretraining_cost.peak_bytes(Allocating()) < 3.1e6
    plain = pretraining_cost.steps(row)["plain"]
    gradients = 4 * sum(weight.numel() for weight in plain.model.parameters())
    assert gradients <= pretraining_cost.peak_bytes(plain) < 3 * gradients + 1e5


def test_tensors_that_do_not_fit_are_not_tried():
    assert set(pretraining_cost.steps(pretraining_cost.BAR)) == {"plain", "factorised", "naive"}
    large = {**pretraining_cost.BAR, "widths": "3072-1000-1000-10"}
    assert set(pretraining_cost.steps(large)) == {"plain", "factorised"}


def test_a_cost_row_has_all_that_its_bars_need():
    row = {**pretraining_cost.BAR, "widths": "16-8-8-10"}
    found = pretraining_cost.measure(row, 3)
    for name in ("plain", "factorised", "naive"):
        assert found[f"{name}_ms"] > 0
        assert found[f"{name}_mb"] > 0
    assert len(found["factorised_over_plain"]) == len(found["naive_over_factorised"]) == 3


def test_a_lazy_run_holds_its_activity_and_has_the_published_way_beside_it(store):
    spec = next(s for s in pretraining.specs("quick") if s.settings["pretraining"] == "flow")
    spec = _smaller(spec, {"epochs": 2})
    result = pretraining.compute(spec, store).result
    assert result["activity"] == pytest.approx(0.25, abs=0.05)
    assert 0 < result["published"]["valid_accuracy"] <= 1
    assert set(result["published"]) >= {"activity", "accuracy_ratio"}


def test_a_network_of_the_coactivation_study_keeps_its_matrices_and_its_way(store):
    kind = next(s for s in coactivation.specs("quick") if s.settings["network"] == coactivation_results.FLOW)
    training = {"epochs": 2, "snapshots": [1], "batch": 64}
    outcome = coactivation.compute(_smaller(kind, training), store)
    assert {"mean", "hierarchical", "spectral", "partition", "layers", "epoch1", "ingoing9"} <= set(outcome.arrays)
    assert outcome.arrays["mean"].dtype == np.uint8
    assert max(outcome.arrays["mean"].shape) <= 200
    assert outcome.result["on_the_way"][0]["epoch"] == 1
    assert 0 < outcome.result["explained"]["random"] < outcome.result["explained"]["coactivation"] < 1
    assert len(outcome.result["penalty_share"]) == 2


def test_the_variance_study_measures_every_form(store):
    spec = pretraining_variance.specs("quick")[0]
    settings = {**spec.settings, "minibatches": 3}
    settings["target_training"] = {**settings["target_training"], "epochs": 1, "snapshots": [1]}
    rows = pretraining_variance.compute(RunSpec(spec.study, spec.recipe, settings), store).result["varies"]
    assert len(rows) == 2 * len(FORMS) * len(settings["batches"])
    assert all(row["variation"] >= 0 and row["mean"] > 0 for row in rows)


def _smaller(spec, training):
    """The same run with a target that is trained briefly."""
    own = {**spec.settings["target_training"], **training}
    return RunSpec(spec.study, spec.recipe, {**spec.settings, "target_training": own})


# What is made of records: made-up ones with known differences.


def stored(tmp_path, spec, result, arrays=None):
    return RunStore(tmp_path / "made-up").put(spec, Outcome(result, arrays), 1.0)


@pytest.fixture
def cells(tmp_path):
    """Every run of the tables: a ratio of 0.5, 0.1 more for each of DPG and random rates, and what runs with the same
    target and policy share."""
    found = []
    for spec in pretraining.specs("paper"):
        s = spec.settings
        better = 0.1 * (s["method"] == "dpg") + 0.1 * (s["pretraining"] == "dropout-uniform")
        ratio = 0.5 + better + 0.03 * s["target_seed"] - 0.07 * s["policy_seed"]
        result = dict.fromkeys(("blind_ratio", "activity", "compute"), 0.25) | {
            "accuracy_ratio": ratio,
            "accuracy": ratio,
        }
        full = 0.9 + 0.01 * (s["pretraining"] == "dropout-uniform") + 0.02 * s["target_seed"]
        result |= {"target_accuracy": full, "target_valid_accuracy": full, "valid_accuracy": ratio * full}
        if s["method"] != pretraining.BEST:
            sampled = {"valid_accuracy": 0.5 * full, "accuracy_ratio": 0.5, "activity": 0.4, "valid_activity": 0.4}
            result["published"] = sampled
        result |= {"control_ratio": 0.99} if s["control"] else {}
        found.append(stored(tmp_path, spec, result))
    return found


def test_claims_of_the_tables_pair_targets_and_policies(cells):
    judged = {claim.id: claim for claim in pretraining_results.claims(cells)}
    again = {claim.id: claim for claim in pretraining_results.claims(cells[::-1])}
    assert judged == again
    for id, gain in (
        ("pretraining.matched.dropout-uniform.reinforce", 0.1),
        ("pretraining.matched.dropout-0.5.dpg", 0.1),
        ("pretraining.target.none", 0.01),
        ("pretraining.best.dropout-uniform", 0.1),
    ):
        assert judged[id].verdict == "holds"
        assert (judged[id].interval.low, judged[id].interval.high) == pytest.approx((gain, gain))
    same = judged["pretraining.sampled.dropout-uniform.reinforce"]
    assert same.verdict == "undecided"
    assert "40% active" in same.statement


def test_tables_have_every_cell_with_the_papers_number_or_why_there_is_none(cells):
    first = {(row["pretraining"], row["method"]): row for row in pretraining_results.table_1(cells)}
    assert first["no dropout", "DPG"]["published"] == "lost"
    assert first["dropout, keep 0.5", "REINFORCE"]["published"] == "0.882 ± 0.006"
    assert first["class-flow penalty", "DPG"]["published"] == "not tried"
    assert all(row["runs"] == 6 for row in first.values())
    assert first["no dropout", "DPG"]["ours"].estimate == pytest.approx(0.5)
    second = pretraining_results.table_2(cells)
    assert len(second) == len(pretraining.ROWS["paper"])
    assert second[0]["target, published"] == "92.8 ± 1.4"
    matched = pretraining_results.matched_table(cells)
    assert len(matched) == 3 * len(second)
    assert sum(bool(row["control ratio"]) for row in matched) == len(matched)


def test_every_published_cell_is_answered(cells):
    answered = {answer.id: answer.ours for answer in pretraining_results.answers(cells)}
    assert set(answered) == {id for id in published.load() if id.startswith(("Pt1", "Pt2"))}
    assert answered["Pt1.02"].estimate == pytest.approx(0.5)


def test_the_search_reports_its_own_runs_and_the_choice_that_of_others(tmp_path):
    records = []
    for spec in pretraining_search.specs("paper"):
        s = spec.settings
        chosen = (s["architecture"], s["target_training"]["learning_rate"]) == pretraining_search.CHOSEN["paper"]
        found = 0.8 if chosen and s["target_seed"] == pretraining_search.SEED else 0.4
        records.append(stored(tmp_path, spec, {"valid_accuracy": found, "target_valid_accuracy": 1.0}))
    assert pretraining_search.chosen(records) == pretraining_search.CHOSEN["paper"]
    for row in pretraining_search.reports(records):
        assert row["settings tried"] == pretraining_search.SAMPLED
        assert row["best run"] == row["chosen setting, in the search"] == "0.800"
        assert row["chosen setting, fresh seeds"].estimate == pytest.approx(0.4)
        assert row["chosen setting, fresh seeds"].n == 3
    assert len(pretraining_search.table(records)) == pretraining_search.SAMPLED


def test_claims_of_coactivation_are_differences_from_the_same_seed(tmp_path):
    records = []
    for spec in coactivation.specs("paper"):
        s = spec.settings
        lower = 0.1 * (s["network"] in (coactivation_results.FLOW, "dropout, keep 0.5"))
        mean = 0.4 - lower + 0.03 * s["target_seed"]
        measures = dict.fromkeys(("gini", "above", "lift", "partners", "modularity", "firing"), 0.3) | {"mean": mean}
        result = {"accuracy": 0.8, "valid_accuracy": 0.8, "learning_curve": [0.6] * 12, "epochs": 12,
                  "measures": measures, "penalty_share": [0.2], "on_the_way": []}  # fmt: skip
        splits = [f"{name}{end}" for name in ("coactivation", "rates", "random") for end in ("", ", beyond")]
        records.append(stored(tmp_path, spec, result | {"explained": dict.fromkeys(splits, 0.5)}))
    judged = {claim.id: claim for claim in coactivation_results.claims(records)}
    assert judged["flow.mean.2x500.root"].interval.estimate == pytest.approx(-0.1)
    assert judged["flow.mean.2x500.root"].verdict == "holds"
    assert judged["flow.mean.2x500.product"].verdict == "undecided"
    assert judged["coactivation.mean.3x800.dropout-0.5"].verdict == "holds"
    assert judged["coactivation.partners.3x800.dropout-0.5"].verdict == "refuted"
    assert judged["flow.Ps55.05.first.2x500.root"].verdict == "refuted"  # 60% after the first epoch
    assert judged["flow.Ps55.05.best.2x500.root"].verdict == "holds"
    rows = {row["network"]: row for row in coactivation_results.flow_table(records)}
    assert rows["2x200, flow, root"]["mean: less plain"].estimate == pytest.approx(-0.1)
    assert len(coactivation_results.table(records)) == len(coactivation_results.split_table(records)) == 15
