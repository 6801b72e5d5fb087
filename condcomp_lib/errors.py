"""The errors for bad input: one line that says what is wrong and what would be right."""


class CondcompError(Exception):
    """Base of this library's errors. The command line prints its message as one line and exits with `exit_code`."""

    exit_code = 1
    fatal = False  # True where going on with other runs of a sweep is pointless: no data, no room


class UsageError(CondcompError):
    """The caller named something that does not exist (a study, a notebook, a parameter); lists what does."""

    exit_code = 2


def unknown(kind: str, name: object, known: object) -> UsageError:
    """The error for a name that is not among the known ones.

    >>> str(unknown("study", "strat", ["start"]))
    "unknown study 'strat'; known: start"
    """
    listed = ", ".join(sorted(str(k) for k in known))  # type: ignore[attr-defined]
    return UsageError(f"unknown {kind} {str(name)!r}; known: {listed or 'none'}")
