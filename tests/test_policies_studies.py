"""The studies of policies: their run tables, one computed run of each, and what is made of records."""

import dataclasses

import numpy as np
import pytest

from condcomp_lib import studies
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import partitioning, policies, policies_bias, policies_dpg, policies_search, policy_results
from condcomp_lib.targets import hidden_widths

FAMILY = ("policies", "policies-dpg", "policies-bias", "policies-search")


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "artefacts")


def test_the_policies_family_is_run_by_one_command():
    assert studies.family("policies") == list(FAMILY)


@pytest.mark.parametrize("architecture", ["2x64", "3x800"])
@pytest.mark.parametrize("tau", [0.05, 0.1, 0.25, 0.5, 1.0])
def test_the_rates_of_layers_of_one_width_have_the_asked_mean(architecture, tau):
    rates = policies.rates_for(tau, hidden_widths(architecture))
    assert np.mean(rates) == pytest.approx(tau)
    assert all(0 < rate <= 1 for rate in rates)


def test_eight_estimators_and_the_best_have_three_target_and_two_policy_seeds():
    seeds = {}
    for spec in policies.specs("paper"):
        if spec.settings["part"] in ("best", "estimators"):
            own = (spec.settings["target_seed"], spec.settings["policy_seed"])
            seeds.setdefault(spec.settings["method"], set()).add(own)
    both = {(target, policy) for target in range(3) for policy in range(2)}
    twice = [method for method in policies.ESTIMATORS if seeds[method] == both]
    assert len(twice) >= 8
    assert seeds[policies.WARM] == seeds[policies.TUNED] == both


def test_dpg_runs_differ_from_their_twins_in_the_estimator_only():
    twins = [spec.settings for spec in partitioning.specs("paper")]
    for spec in policies_dpg.specs("paper"):
        plain = {key: value for key, value in spec.settings.items() if key != "estimator"}
        like = [
            twin
            for twin in twins
            if {**twin, "estimator": None} | {"baseline": "mean"}
            == {**plain, "estimator": None, "baseline": "mean", "control": twin["control"]}
        ]
        assert len(like) == 1


@pytest.mark.parametrize("method", ["REINFORCE", policies.FILLED, policies.DENSE])
def test_a_run_says_what_was_kept_at_which_cost_and_is_the_same_again(method, store):
    spec = next(spec for spec in policies.specs("quick") if spec.settings["method"] == method)
    quick = {**spec.settings, "max_epochs": 2, "warm_start": 1 if "warm_start" in spec.settings else 0}
    short = RunSpec(spec.study, spec.recipe, quick)
    result, again = (policies.compute(short, store).result for _ in range(2))
    assert result == again
    assert len(result["accuracy_curve"]) == 2 + quick["warm_start"]
    asked = spec.settings["tau"]
    assert result["activity"] == pytest.approx(asked, abs=0.05)
    assert result["accuracy_ratio"] == result["accuracy"] / result["target_accuracy"]
    assert ("control_ratio" in result) == (method != policies.DENSE)
    if method == policies.DENSE:
        assert result["activity_by_layer"] == [1.0, 1.0]
    if method == "REINFORCE":
        assert len(result["sampled_accuracies"]) >= 20


def test_a_bias_run_tells_a_biased_estimator_from_an_unbiased_one(store):
    p_values = {}
    for spec in policies_bias.specs("quick"):
        if spec.settings["scope"] == "network" and spec.settings["estimator"] in ("DisARM", "straight-through"):
            p_values[spec.settings["estimator"]] = policies_bias.compute(spec, store).result["p_value"]
    assert p_values["straight-through"] < 1e-6 < 1e-3 < p_values["DisARM"]


def test_searched_masks_come_nearer_to_the_target_than_the_oracles(store):
    (spec,) = policies_search.specs("quick")
    short = RunSpec(spec.study, spec.recipe, {**spec.settings, "max_epochs": 1, "warm_start": 1, "test_examples": 20})
    result = policies_search.compute(short, store).result
    assert result["local search"]["divergence"] <= result["greedy"]["divergence"] < result["oracle"]["divergence"]
    assert [result[way]["activity"] for way in policies_search.WAYS] == pytest.approx([0.25] * 4)


def records(tmp_path, **ratios):
    """Stored runs of methods with these accuracy ratios, one for each target."""
    store, found = RunStore(tmp_path / "runs"), []
    for method, values in ratios.items():
        for seed, value in enumerate(values):
            settings = {
                "method": method,
                "part": "estimators",
                "tau": 0.25,
                "groups": 16,
                "target_seed": seed,
                "policy_seed": 0,
            }
            result = {"accuracy_ratio": value, "blind_ratio": 0.1, "control_ratio": 0.9, "activity": 0.25}
            made = {**result, "compute": 0.26}
            found.append(store.obtain(RunSpec("toy", 1, settings), lambda _, made=made: Outcome(made)))
    return found


def test_tables_and_figures_take_the_runs_of_each_method(tmp_path):
    found = records(tmp_path, A=[0.5, 0.6, 0.7], B=[0.9, 0.8, 0.85])
    rows = policy_results.summary(found, "estimators")
    assert [(row["method"], row["runs"]) for row in rows] == [("A", 3), ("B", 3)]
    assert rows[0]["ratio"].estimate == pytest.approx(0.6)
    series = policy_results.series(found, "estimators")
    assert series["B"]["lazy"].tolist() == [0.9, 0.8, 0.85]
    costs, ratios = policy_results.front(found, ["B"], "compute")["B"]
    assert costs.tolist() == [[0.26] * 3]
    assert ratios.tolist() == [[0.9, 0.8, 0.85]]
    assert policy_results.summary(found, "best") == []


def test_one_target_makes_no_claim(tmp_path):
    assert policy_results.claims(records(tmp_path, A=[0.5])) == []
    alone = [dataclasses.replace(record) for record in records(tmp_path, REINFORCE=[0.5])]
    assert policy_results.claims(alone) == []
