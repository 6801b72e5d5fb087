"""From records of learned policies to tables, figure data and claims (the study `policies`)."""

from collections.abc import Sequence

from condcomp_lib.claims import Claim
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record


def no_answers(records: Sequence[Record]) -> list[Answer]:  # noqa: ARG001
    """No published number has its counterpart here."""
    return []


def claims(records: Sequence[Record]) -> list[Claim]:  # noqa: ARG001
    """What the runs show."""
    return []


def dpg_claims(records: Sequence[Record]) -> list[Claim]:  # noqa: ARG001
    """What the runs show."""
    return []


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:  # noqa: ARG001
    """Figures and tables of notebook 02 that are made from this study."""
    return {}
