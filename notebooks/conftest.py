"""For `pytest --nbval-lax`: what two executions never share, and the checks must not compare."""

from nbval.plugin import IPyNbCell

SKIPPED = ("stderr", "image/svg+xml")


def pytest_collection_modifyitems(items: list) -> None:
    """Leave progress bars and vector pictures out of the comparison."""
    for item in items:
        if isinstance(item, IPyNbCell):
            item.parent.skip_compare = tuple({*item.parent.skip_compare, *SKIPPED})
