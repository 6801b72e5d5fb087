"""Claims and verdicts: what holds, what is refuted, and what makes a check fail."""

import math

import pytest

from condcomp_lib.claims import ChangedVerdict, check_verdicts, judge, record, recorded
from condcomp_lib.errors import CondcompError
from condcomp_lib.stats import Interval


def claim(low, high, **bound):
    return judge(
        "toy", "ours", "a statement", Interval((low + high) / 2, low, high, 5, 0.95), **(bound or {"above": 0.5})
    )


@pytest.fixture
def verdicts(tmp_path):
    def write(verdict):
        path = tmp_path / "verdicts.csv"
        path.write_text(f"claim,verdict\ntoy,{verdict}\n")
        return path

    return write


@pytest.mark.parametrize(
    ("low", "high", "bound", "verdict"),
    [
        (0.6, 0.7, {"above": 0.5}, "holds"),
        (0.4, 0.6, {"above": 0.5}, "undecided"),
        (0.3, 0.4, {"above": 0.5}, "refuted"),
        (0.3, 0.4, {"below": 0.5}, "holds"),
        (0.4, 0.6, {"below": 0.5}, "undecided"),
        (0.6, 0.7, {"below": 0.5}, "refuted"),
        (math.nan, math.nan, {"above": 0.5}, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, bound, verdict):
    assert claim(low, high, **bound).verdict == verdict


def test_a_claim_needs_exactly_one_level():
    for bound in ({"above": 0.1, "below": 0.9}, {"above": None}):
        with pytest.raises(CondcompError, match="needs one of above= and below="):
            claim(0.1, 0.2, **bound)


def test_a_recorded_refutation_passes_and_a_changed_verdict_fails(verdicts):
    refuted = claim(0.1, 0.2)
    assert check_verdicts([refuted], "paper", verdicts("refuted")) == [refuted]
    with pytest.raises(ChangedVerdict, match=r"toy: was holds, is now refuted \(0.150"):
        check_verdicts([refuted], "paper", verdicts("holds"))
    with pytest.raises(ChangedVerdict, match="was undecided, is now refuted"):
        check_verdicts([refuted], "paper", verdicts("undecided"))


def test_a_new_claim_must_be_recorded(verdicts, tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("claim,verdict\n")
    with pytest.raises(ChangedVerdict, match="no verdict recorded"):
        check_verdicts([claim(0.6, 0.7)], "paper", path)
    with pytest.raises(ChangedVerdict, match="no verdict recorded"):
        check_verdicts([claim(0.6, 0.7)], "quick", path)


def test_small_runs_may_leave_a_claim_undecided_but_not_reverse_it(verdicts):
    path = verdicts("holds")
    check_verdicts([claim(0.6, 0.7)], "quick", path)
    check_verdicts([claim(0.4, 0.6)], "quick", path)
    with pytest.raises(ChangedVerdict, match="was holds, is now refuted"):
        check_verdicts([claim(0.1, 0.2)], "quick", path)
    with pytest.raises(ChangedVerdict, match="was refuted, is now holds"):
        check_verdicts([claim(0.6, 0.7)], "quick", verdicts("refuted"))


def test_recording_keeps_the_other_verdicts_and_says_what_changed(verdicts):
    path = verdicts("holds")
    path.write_text(path.read_text() + "another,undecided\n")
    assert record([claim(0.1, 0.2)], path) == {"toy": "refuted"}
    assert recorded(path) == {"toy": "refuted", "another": "undecided"}
    assert record([claim(0.1, 0.2)], path) == {}


def test_a_file_of_verdicts_that_is_none_is_one_clear_line(tmp_path):
    path = tmp_path / "verdicts.csv"
    with pytest.raises(CondcompError, match="columns claim,verdict"):
        recorded(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CondcompError, match="columns claim,verdict"):
        recorded(path)


def test_an_unknown_verdict_in_the_file_is_named(verdicts):
    with pytest.raises(CondcompError, match="the verdict 'maybe'; known: holds, refuted, undecided"):
        recorded(verdicts("maybe"))
