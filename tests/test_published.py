import csv
from dataclasses import FrozenInstanceError

import pytest

from condcomp_lib import paths
from condcomp_lib.errors import UsageError
from condcomp_lib.published import COLUMNS, Answer, PublishedError, get, load, overview
from condcomp_lib.stats import Interval

HEADER = ",".join(COLUMNS)
KEYS = [
    "id",
    "paper",
    "where",
    "dataset",
    "architecture",
    "method",
    "setting",
    "metric",
    "published",
    "ours",
    "note",
    "notebook",
]


@pytest.fixture
def write(tmp_path):
    def file(*lines, header=HEADER):
        path = tmp_path / "numbers.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return path

    return file


def line(id="A1", metric="accuracy_ratio", value="0.5", spread="", note="", **more):
    fields = dict.fromkeys(COLUMNS, "x") | {"id": id, "metric": metric, "value": value, "spread": spread, "note": note}
    return ",".join((fields | more).values())


def shown(path, *answers, reasons=None):
    return {row["id"]: row for row in overview(answers, reasons, path)}


# The real file


def test_every_number_of_the_file_is_read_as_it_stands():
    with paths.published_csv().open(encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = load()
    assert len(expected) > 70
    assert list(rows) == [fields["id"] for fields in expected]
    for fields in expected:
        row = rows[fields["id"]]
        assert [getattr(row, name) for name in COLUMNS[:8]] == [fields[name] for name in COLUMNS[:8]]
        assert row.note == fields["note"]
        assert [row.value, row.spread] == [float(fields[k]) if fields[k] else None for k in ("value", "spread")]
        if fields["value"]:  # printed with the paper's own decimals
            assert row.format().removeprefix("about ") == " ± ".join(filter(None, (fields["value"], fields["spread"])))


def test_get_finds_one_row_that_cannot_be_changed():
    row = get("Pt1.05")
    assert (row.value, row.spread, row.metric) == (0.888, 0.008, "accuracy_ratio")
    with pytest.raises(FrozenInstanceError):
        row.value = 1.0


def test_get_names_the_nearest_ids():
    with pytest.raises(UsageError, match=r"^unknown id 'Pt1.5'; the nearest are Pt1.05") as caught:
        get("Pt1.5")
    assert len(str(caught.value)) < 80
    with pytest.raises(UsageError, match=r"unknown id 'accuracy'; ids look like Pt1.01"):
        get("accuracy")


def test_the_overview_of_no_answers_has_every_id_once_and_not_yet():
    table = overview([])
    assert [row["id"] for row in table] == list(load())
    assert {row["ours"] for row in table} == {"not yet"}
    assert all(list(row) == KEYS for row in table)


def test_numbers_that_the_papers_lack_are_lost_or_described():
    by_id = {row["id"]: row["published"] for row in overview([])}
    assert by_id["Pt1.02"] == by_id["Pt2.02"] == "lost"
    assert by_id["Ds4.04"] == by_id["Fs41.01"] == "described"
    assert by_id["Pt1.05"] == "0.888 ± 0.008"
    assert by_id["Fs42.01"] == "about 2.3"


# Answers


@pytest.mark.parametrize(
    ("metric", "ours", "expected"),
    [
        ("accuracy_ratio", Interval(0.87123, 0.8661, 0.87512, 10, 0.95), "0.871 [0.866, 0.875]"),
        ("accuracy_ratio", Interval(0.87123, float("nan"), float("nan"), 1, 0.95), "0.871 (one run)"),
        ("validation_accuracy_percent", 92.7512, "92.75"),
        ("test_error", 0.51149, "0.511"),
        ("kernel_speedup", 3.14159, "3.14"),
        ("minibatches_per_hour", 835.4, "835"),
        ("policy_entropy", 1.23456, "1.235"),
    ],
)
def test_our_numbers_are_rounded_by_metric(write, metric, ours, expected):
    assert shown(write(line(metric=metric)), Answer("A1", ours, metric))["A1"]["ours"] == expected


def test_an_answer_fills_its_own_row_only(write):
    path = write(line("A1", note="best"), line("A2"))
    table = shown(path, Answer("A1", 0.4, "accuracy_ratio", note="3 seeds", notebook="03-greedy", figure="ratio"))
    assert table["A1"]["note"] == "best; ours: 3 seeds"
    assert table["A1"]["notebook"] == "03-greedy"
    assert (table["A2"]["ours"], table["A2"]["note"], table["A2"]["notebook"]) == ("not yet", "", "")


def test_a_reason_stands_where_there_is_no_number(write):
    path = write(line("A1"), line("A2"), line("A3"))
    silent = [Answer(id, None, "accuracy_ratio", note="only described") for id in ("A1", "A2")]
    table = shown(path, *silent, reasons={"A1": "needs 4 GB hosts", "A3": "no data"})
    assert [row["ours"] for row in table.values()] == ["needs 4 GB hosts", "not yet", "no data"]
    assert table["A2"]["note"] == "ours: only described"


@pytest.mark.parametrize(
    ("answers", "reasons", "error", "message"),
    [
        ([("A1", 1, "03"), ("A1", None, "04")], {}, PublishedError, r"A1 has two answers \(03, 04\): give one per id"),
        ([("A9", 1, "")], {}, UsageError, "unknown id 'A9'; ids look like A1"),
        ([], {"A9": "lost"}, UsageError, "unknown id 'A9'"),
        ([("A1", 1, "")], {"A1": "no time"}, PublishedError, "A1 has an answer and the reason 'no time' for none"),
        ([("A1", float("nan"), "")], {}, PublishedError, "the answer to A1 is nan: give a finite number"),
        ([("A1", Interval(float("inf"), 0, 1, 3, 0.95), "")], {}, PublishedError, "the answer to A1 is inf"),
    ],
)
def test_answers_that_cannot_stand(write, answers, reasons, error, message):
    path = write(line("A1"))
    made = [Answer(id, ours, "accuracy_ratio", notebook=notebook) for id, ours, notebook in answers]
    with pytest.raises(error, match=message):
        overview(made, reasons, path)


def test_an_answer_in_another_unit_is_refused(write):
    with pytest.raises(PublishedError, match="the answer to A1 is in 'test_error': give it in test_error_percent"):
        overview([Answer("A1", 0.02, "test_error")], path=write(line(metric="test_error_percent")))


# Bad files


def test_a_missing_column_is_named(write):
    path = write(header=HEADER.replace(",spread", ""))
    with pytest.raises(PublishedError, match=r"numbers.csv line 1: column spread is missing; the header must hold id,"):
        load(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line("A1"), "line 3, column id: A1 is there twice"),
        (line(""), "line 3, column id: it is empty"),
        (line("A2", value="0.8x"), "line 3, column value: '0.8x' is no number; give a decimal such as 0.888"),
        (line("A2", value="nan"), "line 3, column value: 'nan' is no number"),
        (line("A2", spread="±1"), "line 3, column spread: '±1' is no number"),
        (line("A2", value=""), "line 3, column value: it is empty; give a number, or only a note"),
        (line("A2", value="", spread="0.1", note="odd"), "line 3, column value: it is empty"),
        (line("A2") + ",more", "line 3: too many fields"),
        ("A2,x,x", "line 3: too few fields"),
    ],
)
def test_a_bad_row_is_named_by_line_and_column(write, bad, message):
    with pytest.raises(PublishedError, match=f"^numbers.csv {message}"):
        load(write(line("A1"), bad))


def test_a_file_that_cannot_be_read_is_named(tmp_path, write):
    with pytest.raises(PublishedError, match=r"cannot read .*nowhere.csv"):
        load(tmp_path / "nowhere.csv")
    with pytest.raises(PublishedError, match=r"cannot read .*numbers.csv"):
        load(write('A1,"open'))
    latin = tmp_path / "latin.csv"
    latin.write_bytes(f"{HEADER}\nµ".encode("latin-1"))
    with pytest.raises(PublishedError, match="must be a CSV file in UTF-8"):
        load(latin)


def test_an_empty_file_lacks_its_first_column(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(PublishedError, match="column id is missing"):
        load(tmp_path / "empty.csv")
