"""The `condcomp bench` commands: print what `bench` measures, and write it as JSON."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from condcomp_lib.files import write_atomically

# `bench` pulls in torch, so the commands import it themselves: --help answers at once.

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the figures here")]


@bench_app.command("store")
def bench_store(
    count: Annotated[int, typer.Option("--runs", min=1, help="runs written and read")] = 200,
    json_file: JsonFile = None,
) -> None:
    """What the run store costs: milliseconds to write a run, to find it again, and to list one of many."""
    from condcomp_lib import bench

    figures = bench.store(count)
    for name, value in figures.items():
        typer.echo(f"{name:<10}{value:>10.3f}")
    _write_json(json_file, figures)


@bench_app.command("training")
def bench_training(
    repeats: Annotated[int, typer.Option(min=1, help="pairs of epochs, with and without the cache in turn")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Seconds for an epoch of policy training on SVHN, 3x800 frozen, with and without the first layer's cache."""
    from condcomp_lib import bench

    figures = bench.training(repeats)
    for name, value in figures.items():
        typer.echo(f"{name:<24}{value:>10.2f}" if isinstance(value, float) else f"{name:<24}{value:>10}")
    _write_json(json_file, figures)


@bench_app.command("estimators")
def bench_estimators(
    repeats: Annotated[int, typer.Option(min=1, help="times each is measured")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Seconds for an epoch of policy training by each estimator on SVHN, 3x800 frozen, and its ratio to REINFORCE's."""
    from condcomp_lib import bench

    figures = bench.estimators(repeats)
    papers, ratio = figures["one_gate_epoch_s"], figures["one_gate_dpg_over_reinforce"]
    typer.echo(f"one gate: REINFORCE {papers['reinforce']:.1f} s, DPG {papers['dpg']:.1f} s, {ratio['median']:.2f} "
               f"({ratio['least']:.2f} to {ratio['most']:.2f})")  # fmt: skip
    for name, seconds in figures["epoch_s"].items():
        ratio = figures["over_reinforce"][name]
        typer.echo(f"{name:<20}{seconds:>8.1f} s, {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})")
    _write_json(json_file, figures)


@bench_app.command("partitioners")
def bench_partitioners(
    repeats: Annotated[int, typer.Option(min=1, help="times each is measured")] = 5,
    json_file: JsonFile = None,
) -> None:
    """A proposal for 256 groups, a balanced coactivation split, and the longest trial, on SVHN with 3x800."""
    from condcomp_lib import bench

    figures = bench.partitioners(repeats)
    for name, value in figures["proposal_256_groups"].items():
        typer.echo(f"proposal, {name:<20}{value['median_ms']:>8.1f} ms, at most {value['most_ms']:.1f}")
    for name in ("coactivation_split_s", "longest_trial_s"):
        typer.echo(f"{name:<30}{figures[name]['median']:>8.1f} s, at most {figures[name]['most']:.1f}")
    _write_json(json_file, figures)


@bench_app.command("blocks")
def bench_blocks(
    grid: Annotated[str, typer.Option(help="bars (about three minutes) or full (widths, groups, batches)")] = "bars",
    repeats: Annotated[int, typer.Option(min=3, help="times each engine is measured, in turn")] = 21,
    json_file: JsonFile = None,
) -> None:
    """Compiled lazy networks beside the fastest dense engine, the equal-compute control, and the machine's limits."""
    from condcomp_lib import bench

    found: list[dict[str, Any]] = []
    for row in bench.blocks(grid, repeats):
        if not found:
            for engine, why in row["skipped"].items():
                typer.echo(f"skipped: {engine}: {why}")
            typer.echo(bench.blocks_line(None))
        typer.echo(bench.blocks_line(row))
        found.append(row)
    _write_json(json_file, {"rows": found})


@bench_app.command("flow")
def bench_flow(
    repeats: Annotated[
        int, typer.Option(min=3, help="times each is measured, in turn; the naive form three times")
    ] = 21,
    json_file: JsonFile = None,
) -> None:
    """Training steps without the class-flow penalty, with it factorised, and by tensors of four dimensions."""
    from condcomp_lib import bench

    found: list[dict[str, Any]] = []
    for row in bench.flow(repeats):
        typer.echo(f"{bench.flow_line(None)}\n{bench.flow_line(row)}" if not found else bench.flow_line(row))
        found.append(row)
    typer.echo(f"{found[0]['minibatches_per_hour']:,.0f} minibatches an hour in the first row")
    _write_json(json_file, {"rows": found})


@bench_app.command("coactivation")
def bench_coactivation(
    repeats: Annotated[int, typer.Option(min=1, help="times it is measured")] = 5, json_file: JsonFile = None
) -> None:
    """Seconds and memory for the coactivation of 2,400 neurons over 10,000 examples."""
    from condcomp_lib import bench

    figures = bench.coactivation(repeats)
    took = figures["seconds"]
    typer.echo(f"{took['median']:.2f} s, at most {took['most']:.2f}; {figures['megabytes']:.0f} MB")
    _write_json(json_file, figures)


@bench_app.command("commands")
def bench_commands(json_file: JsonFile = None) -> None:
    """The two commands as a newcomer types them: a fresh clone, a fresh environment, every test. Takes minutes."""
    from condcomp_lib import bench

    figures = bench.commands()
    for row in figures["rows"]:
        typer.echo(f"{row['command']:<18}{row['seconds']:>6} s")
    _write_json(json_file, figures)


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path:
        write_atomically(path, (json.dumps(figures, indent=1) + "\n").encode())
