"""Reproduce the conditional-computation papers: execute the notebooks, compute their runs, check what is stored.

Start with: condcomp reproduce --profile quick
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from condcomp_lib import __version__, paths
from condcomp_lib.bench_cli import bench_app
from condcomp_lib.errors import CondcompError, UsageError

# Modules that pull in torch or Jupyter are imported by the commands that need them, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Fetch data sets, or check the copies that lie here.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

Profile = Annotated[str, typer.Option(help="quick (digits, from scratch) or paper (the stored runs)")]
Jobs = Annotated[int | None, typer.Option(min=1, help="processes at a time; default: one per core")]


def main() -> None:
    """Entry point: errors of this library become one line on standard error and their exit code."""
    try:
        paths.check_environment()
        app()
    except CondcompError as error:
        typer.secho(f"condcomp: {error}", err=True, fg="red")
        sys.exit(error.exit_code)


@app.command()
def reproduce(
    profile: Profile = "quick",
    notebook: Annotated[list[str] | None, typer.Option(help="only this notebook (repeatable)")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="notebooks at a time")] = 1,
    parameter: Annotated[list[str] | None, typer.Option("--parameter", "-p", help="name=value, repeatable")] = None,
    reference: Annotated[bool, typer.Option(help="write the executed notebooks beside their texts")] = False,
) -> None:
    """Execute the notebooks headlessly, write their figures and tables, and check that all promised ones are there."""
    from condcomp_lib import reproduce as runner

    paths.check_profile(profile)
    wanted = runner.select(notebook)
    given = _parse(parameter or [])
    if reference and (profile != "paper" or given):
        raise UsageError("--reference goes with --profile paper and without --parameter")
    if "profile" in given:
        raise UsageError("the profile is chosen by --profile, not by --parameter")
    if given and not notebook:
        raise UsageError(f"--parameter goes with --notebook, one of: {', '.join(wanted)}")
    parameters = {} if reference else {**runner.profile_parameters(profile), **given}
    started = time.time()
    executions = runner.execute(wanted, profile, parameters, jobs=jobs)
    failed = [execution for execution in executions if execution.error]
    wrong = runner.check_promises([e.notebook for e in executions if not e.error], profile, since=started)
    if reference and not failed and not wrong:
        for execution in executions:
            typer.echo(f"reference: {runner.write_reference(execution).name}")
    _summarise(executions, profile, time.time() - started)
    for execution in failed:
        typer.secho(f"failed: {execution.error}", err=True, fg="red")
    for line in wrong:
        typer.secho(f"promise broken: {line}", err=True, fg="red")
    if failed or wrong:
        raise typer.Exit(1)


def _parse(given: list[str]) -> dict[str, Any]:
    import yaml

    parsed = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--parameter takes name=value, not {text!r}")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(
                f"--parameter {name}: {value!r} is no value; quote text as in name='\"a text\"'"
            ) from error
    return parsed


def _summarise(executions: list[Any], profile: str, seconds: float) -> None:
    from condcomp_lib import studies
    from condcomp_lib.claims import VERDICTS

    done = {e.notebook for e in executions if not e.error}
    typer.echo(f"\n{'notebook':<24}{'seconds':>9}  result")
    for execution in executions:
        typer.echo(f"{execution.notebook:<24}{execution.seconds:>9.1f}  {'FAILED' if execution.error else 'ok'}")
    for study in (studies.get(name) for name in studies.NAMES):
        if study.notebook in done:
            claims = study.claims(studies.records(study.name, profile, partial=True))
            counts = [f"{sum(c.verdict == v for c in claims)} {v}" for v in VERDICTS]
            typer.echo(f"claims of {study.name}: {', '.join(counts)}")
    folder = paths.figures(profile)
    typer.echo(f"figures and tables: {folder} ({len(list(folder.glob('*.json')))})")
    typer.echo(f"executed notebooks: {paths.build() / profile}")
    typer.echo(f"profile {profile}: {seconds:.0f} s")


def _check_store(profile: str) -> None:
    """The quick profile's store is temporary: a command of its own would compute for the bin."""
    if paths.check_profile(profile) == "quick" and not os.environ.get("CONDCOMP_QUICK_STORE"):
        raise UsageError(
            "the quick profile's runs are temporary; use: condcomp reproduce --profile quick "
            "(or set CONDCOMP_QUICK_STORE to keep them)"
        )


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="the study's name (with it run those named NAME-...), or 'all'")],
    profile: Profile = "paper",
    jobs: Jobs = None,
    backend: Annotated[str, typer.Option(help="loky (processes), sequential or dask (a cluster)")] = "loky",
    scheduler: Annotated[str | None, typer.Option(help="address of a Dask scheduler, tcp://...")] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of each process")] = 1,
) -> None:
    """Compute the runs of a study that the store lacks."""
    _check_store(profile)
    from condcomp_lib import studies

    for name in studies.family(study):
        records = studies.run(name, profile, jobs=jobs, backend=backend, threads=threads, scheduler=scheduler)
        typer.echo(f"{name}: {len(records)} runs in {paths.store(profile)}")


@app.command()
def runs(
    study: Annotated[str | None, typer.Argument(help="only this study")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="every column, comma separated")] = False,
    profile: Profile = "paper",
) -> None:
    """List the stored runs, and how many of the run tables are missing."""
    _check_store(profile)
    from condcomp_lib import studies
    from condcomp_lib.runs import RunStore, table

    names = [studies.get(study).name] if study else studies.NAMES
    store = RunStore(paths.store(profile))
    records = [record for name in names for record in store.records(name)]
    tabled = {spec.name for name in names for spec in studies.get(name).specs(profile)}
    found = table(records)
    found["current"] = [record.name in tabled for record in records]  # False: of an older recipe or run table
    found = found.sort_values(["study", "dataset", "architecture", "target_seed"], kind="stable")
    if csv:
        typer.echo(found.to_csv(index=False), nl=False)
        return
    columns = ["study", "recipe", "dataset", "architecture", "pretraining", "decision", "target_seed", "policy_seed",
               "accuracy", "activity", "seconds", "current"]  # fmt: skip
    shown = found[columns].to_string(index=False, na_rep="", float_format="{:.3f}".format)
    typer.echo(shown if len(found) else f"no runs in {store.folder}")
    for name in names:
        lacking, total = len(studies.missing(name, profile)), len(studies.get(name).specs(profile))
        typer.echo(f"{name}: {total - lacking} of {total} runs stored" + (f", {lacking} missing" if lacking else ""))


@app.command()
def audit(
    sample: Annotated[int, typer.Option(min=1, help="how many stored runs of each study")] = 2,
    study: Annotated[str | None, typer.Argument(help="only this study")] = None,
    seed: Annotated[int, typer.Option(help="which runs are drawn")] = 0,
) -> None:
    """Compute a random sample of the stored runs from scratch and compare within a stated tolerance."""
    from condcomp_lib import studies
    from condcomp_lib.runs import RunStore

    disagreeing = 0
    stored = [name for name in studies.NAMES if studies.records(name, "paper", partial=True)]
    for name in [studies.get(study).name] if study else stored or studies.NAMES:
        with tempfile.TemporaryDirectory(prefix="condcomp-audit-") as folder:
            rows = studies.audit(name, "paper", sample=sample, artefacts=RunStore(folder), seed=seed)
        for row in rows:
            typer.echo(
                f"{name} {row.name} {row.field}: stored {row.stored:.4f}, recomputed {row.recomputed:.4f}, "
                f"allowed difference {row.allowed:.4f}: {'agrees' if row.agrees else 'DISAGREES'}"
                f"{'' if row.same_data else ' (from another copy of the data)'}"
            )
        disagreeing += sum(not row.agrees for row in rows)
        typer.echo(f"{name}: {len({row.name for row in rows})} runs recomputed")
    if disagreeing:
        raise CondcompError(f"{disagreeing} recomputed numbers differ from the stored ones by more than allowed")


@app.command()
def verdicts(
    profile: Profile = "paper",
    record: Annotated[bool, typer.Option("--record", help="accept these verdicts as the recorded ones")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="judge what is stored although runs are missing")] = False,
) -> None:
    """Judge every claim from the profile's runs; recording a changed verdict is a decision, hence a command."""
    from condcomp_lib import claims, studies

    known = ((name, studies.records(name, profile, partial=partial)) for name in studies.NAMES)
    judged = [claim for name, records in known for claim in studies.get(name).claims(records)]
    if partial:
        typer.echo(studies.progress())
    for claim in judged:
        typer.echo(f"{claim.verdict:<10} {claim.id}: {claim.statement}: {claim.interval}, holds if {claim.rule}")
    if record:
        changed = claims.record(judged)
        typer.echo(f"{len(changed)} verdicts recorded anew: {', '.join(changed) or 'none'}")
    else:
        claims.check_verdicts(judged, profile)


@app.command()
def explore(
    port: Annotated[int, typer.Option(help="the next free one is taken where it is in use")] = 8866,
    browser: Annotated[bool, typer.Option(help="open the system's browser")] = True,
) -> None:
    """Open the sparsity explorer alone, in the browser."""
    from condcomp_lib import pages

    pages.explore(port, browser)


@app.command()
def site(
    output: Annotated[Path | None, typer.Option(help="folder; default: build/site")] = None,
) -> None:
    """Write the executed notebooks as plain HTML pages, with an index; they need no network."""
    from condcomp_lib import pages

    typer.echo(f"{len(pages.write_site(output))} pages: {output or paths.build() / 'site'}")


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="digits, mnist, svhn or cifar10")],
    protocol: Annotated[str, typer.Option(help="standard; svhn also official, official+extra")] = "standard",
) -> None:
    """Make sure that a data set's files are here, downloading what is missing."""
    from condcomp_lib import datasets

    for path in datasets.fetch(name, protocol):
        typer.echo(path)


@data_app.command()
def check(name: Annotated[str, typer.Argument(help="digits, mnist, svhn or cifar10")]) -> None:
    """Say where a data set's files lie and whether their checksums hold."""
    from condcomp_lib import datasets

    for line in datasets.check(name):
        typer.echo(line)


@app.command()
def readme(check: Annotated[bool, typer.Option("--check", help="only say whether it is up to date")] = False) -> None:
    """Write the generated parts of README.md from the stored runs."""
    from condcomp_lib import readme as generated

    if check:
        generated.check()
    else:
        generated.write()


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
