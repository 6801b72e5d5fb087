"""Figures and tables on disk: byte-identical, with provenance, and checked against the store."""

import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from condcomp_lib import manifest, plots, published, tables
from condcomp_lib.runs import Outcome, RunSpec, RunStore, digest
from condcomp_lib.stats import Interval


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDCOMP_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures" / "quick"


@pytest.fixture
def records(tmp_path):
    store = RunStore(tmp_path / "store")
    data = {"note": "official", "checksum": "abc"}
    for seed in range(3):
        spec = RunSpec("toy", 1, {"dataset": "mnist", "target_seed": seed})
        store.put(spec, Outcome({"accuracy": 0.9 + seed / 100}, None, data), seconds=1.0)
    return list(store.records())


def draw(records):
    fig, ax = plt.subplots()
    ratios = np.array([[0.5, record.result["accuracy"], 1.0] for record in records])
    plots.skipping({"best": ((0.1, 0.5, 1.0), ratios)}, ax)
    ax.legend()
    return fig


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def save_all(records):
    plots.save_figure(draw(records), "toy_figure", records, "quick")
    tables.save_table(pd.DataFrame({"a": [1]}), "toy_table", records, "quick")
    plt.close("all")


def check(records, since=0.0):
    return manifest.check(dict.fromkeys(("toy_figure", "toy_table"), records), "quick", since=since)


def test_the_same_results_give_the_same_bytes(folder, records):
    save_all(records)
    before = contents(folder)
    assert {"toy_figure.png", "toy_figure.svg", "toy_figure.json", "toy_table.csv", "toy_table.json"} == set(before)
    save_all(records)
    assert contents(folder) == before


def test_the_sidecar_names_runs_data_and_files(folder, records):
    save_all(records)
    sidecar = json.loads((folder / "toy_figure.json").read_text())
    assert sidecar["runs"] == sorted(record.name for record in records)
    assert sidecar["data"] == ["mnist: official"]
    assert set(sidecar["files"]) == {"toy_figure.png", "toy_figure.svg"}
    assert sidecar["inputs"] == digest(records)


def test_all_is_well_when_all_is_there(folder, records):
    save_all(records)
    assert check(records) == []


def test_whatever_is_wrong_is_named(folder, records, tmp_path):
    assert check(records) == [
        "toy_figure: promised, but toy_figure.json is missing from figures/quick",
        "toy_table: promised, but toy_table.json is missing from figures/quick",
    ]
    save_all(records)
    assert check(records[:2]) == [
        "toy_figure: made from other results than the store holds now",
        "toy_table: made from other results than the store holds now",
    ]
    (folder / "toy_table.csv").write_text("a\n2\n")
    assert check(records) == ["toy_table: toy_table.csv is not the file its sidecar describes"]
    (folder / "toy_table.csv").unlink()
    assert check(records) == ["toy_table: toy_table.csv is missing from figures/quick"]
    (folder / "toy_table.json").write_text("{")
    assert check(records) == ["toy_table: toy_table.json is not a provenance sidecar"]
    (folder / "toy_table.json").write_text('{"name": "toy_table"}')
    assert check(records) == ["toy_table: toy_table.json is not a provenance sidecar"]


def test_what_an_execution_did_not_write_is_no_success_of_it(folder, records):
    save_all(records)
    os.utime(folder / "toy_table.json", (1000, 1000))
    assert check(records, since=2000.0) == ["toy_table: promised, but not written by this execution"]


def test_plots_draw_on_the_given_axes_and_return_them():
    fig, axes = plt.subplots(1, 4)
    assert plots.skipping({"best": ((0.5, 1.0), np.array([[0.9, 1.0]]))}, axes[0]) is axes[0]
    assert plots.activity_by_layer({"net": np.array([[0.3, 0.2], [0.4, 0.1]])}, axes[1]) is axes[1]
    assert plots.firing([np.array([0.0, 1.0, 2.0]), np.zeros(2)], axes[2]) is axes[2]
    assert plots.digit(np.zeros((8, 8)), "zero", axes[3]) is axes[3]
    fig.canvas.draw()
    plt.close(fig)


def test_the_compact_overview_keeps_every_row_and_says_what_differs():
    overview = pd.DataFrame(published.overview([]))
    rows = tables.compact(overview)
    assert list(rows.id) == list(overview.id)
    assert not rows[["item", "what", "metric"]].duplicated(keep=False)[rows.item == "partitions, Table 1"].any()
    assert list(rows.columns) == ["id", "item", "what", "metric", "published", "ours", "note"]


def test_frames_format_intervals_and_markdown_keeps_columns_apart():
    frame = tables.frame([{"net": "a|b", "ratio": Interval(0.98, 0.97, 0.99, 5, 0.95), "seeds": 5, "share": 0.25}], 2)
    assert tables.markdown(frame) == (
        "| net | ratio | seeds | share |\n| --- | --- | --- | --- |\n| a/b | 0.98 [0.97, 0.99] | 5 | 0.25 |"
    )
