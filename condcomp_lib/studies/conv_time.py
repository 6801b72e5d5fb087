"""Time of conv nets whose filters are switched: compiled, policy included, beside the dense net by the fastest engine,
one example at a time and 64."""

from collections.abc import Sequence

from condcomp_lib import studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import conv, conv_results, joint, joint_time
from condcomp_lib.studies.blocks import on_this_machine
from condcomp_lib.studies.conv_results import OURS, PAPER, SHARE
from condcomp_lib.studies.joint_results import NOTEBOOK
from condcomp_lib.studies.policy_results import no_answers

RECIPE = 2
REPEATS = {"quick": 3, "paper": 21}
BATCHES = {"one": 1, "many": 64}


def specs(profile: str) -> list[RunSpec]:
    """A pass of every conditional net of the slides' rows, every seed."""
    return [
        RunSpec("conv-time", RECIPE, {**spec.settings, "repeats": REPEATS[profile]})
        for spec in conv.specs(profile)
        if spec.settings["method"] in (PAPER, OURS)
    ]


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Measure one network."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    lazy, result, mask, cited = joint.trained(conv.network_spec(settings), data, artefacts)
    for name, size in BATCHES.items():
        result[name] = joint_time.passes(lazy, data, mask, "per-example", size, settings["repeats"])
    used = {"note": data.note, "checksum": data.checksum}
    return Outcome({**result, **on_this_machine()}, None, used, cited)


def claims(records: Sequence[Record]) -> list[Claim]:
    """By today's means a conditional net takes at most 0.67 of the dense net's time, at either batch."""
    found = []
    for key, group in conv_results.networks(records).items():
        if key[3] != OURS or key[0] == "digits":
            continue
        for batch, size in BATCHES.items():
            slowest = max((conv_results.share_of(record, batch) for record in group), key=lambda s: s.estimate)
            statement = f"{conv_results.name_of(key)}: at most {SHARE} of the fastest dense engine's time, "
            statement += f"{size} at a time (the slower seed)"
            id = f"{conv_results.claim_id(key)}.time{size}"
            found.append(judge(id, conv_results.id_of(key) or "slides", statement, slowest, below=SHARE))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """The table and the figure of notebook 06 that need times."""
    return dict.fromkeys(("conv_table", "conv_times"), records)


STUDY = studies.Study(
    name="conv-time",
    title="Time of convolutional policies",
    notebook=NOTEBOOK,
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=(),
)
