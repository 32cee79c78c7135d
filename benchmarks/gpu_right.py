"""Whether kdlib is right on a GPU: the tests marked `gpu`, one row each as soon as it ends.

    python benchmarks/gpu_right.py --out FOLDER [--dry]

A part of `gpu.py`. Runs `python -m pytest -m gpu` on the files `test_gpu*.py` alone, since others
import what a GPU node may lack. A dry run collects them, and runs the first `HANDFUL` of their
tests that are not marked, and the first one that is, which skips itself without a GPU.
"""

import argparse
from pathlib import Path

import pytest
from gpu_rows import Rows, first_line

ROOT = Path(__file__).parents[1]
HANDFUL = 3


class Recorder:
    """A pytest plugin: a row per test or file that cannot be imported, and one of what was
    collected."""

    def __init__(self, rows: Rows, dry: bool) -> None:
        self.rows, self.dry = rows, dry
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        marked = [item for item in items if item.get_closest_marker("gpu")]
        others = [item for item in items if not item.get_closest_marker("gpu")]
        self.rows.write("collected", marked=len(marked), others=len(others))
        if self.dry:
            chosen = others[:HANDFUL] + marked[:1]
            config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
            items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.rows.write(
                "test", test=report.nodeid, outcome="error", seconds=0.0, why=_why(report)
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        taken = self._seconds.get(report.nodeid, 0.0) + report.duration
        self._seconds[report.nodeid] = taken
        if report.when == "call" or not report.passed:
            outcome = report.outcome
            if report.failed and report.when != "call":
                outcome = "error"  # of a fixture
            self.rows.write(
                "test",
                test=report.nodeid,
                outcome=outcome,
                seconds=round(taken, 3),
                why=None if report.passed else _why(report),
            )


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The first line of a failure, or the reason of a skip."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return first_line(crash.message)
    if isinstance(report.longrepr, tuple):  # (file, line, reason)
        return first_line(report.longrepr[2])
    lines = [x for x in str(report.longrepr).splitlines() if x.startswith("E ")]
    return first_line(lines[-1][1:] if lines else str(report.longrepr))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    rows = Rows(arguments.out, "right")
    found = sorted(arguments.tests.glob("test_gpu*.py"))
    if not found:
        rows.write("missing", what=f"there is no {arguments.tests.name}/test_gpu*.py")
        return
    code = pytest.main(
        [
            # instead of the options of pyproject.toml, which add every doctest of kdlib
            "-o", "addopts=-q -rs --strict-markers -p no:cacheprovider",
            "--continue-on-collection-errors",
            *([] if arguments.dry else ["-m", "gpu"]),
            *map(str, found),
        ],
        plugins=[Recorder(rows, arguments.dry)],
    )  # fmt: skip
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()
