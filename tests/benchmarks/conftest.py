"""Benchmarks put their figures into one table, which is printed at the end of `make benchmark`."""

import pytest

_ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def record_measurement(request):
    """Adds a row: what was measured, the figure, and its neighbour's in the same run."""

    def add(what, value, comparison=""):
        request.config.stash.setdefault(_ROWS, []).append((what, value, comparison))

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section("figures")
    for row in (("what", "figure", "beside it"), ("---", "---", "---"), *rows):
        terminalreporter.write_line(f"| {' | '.join(row)} |")
