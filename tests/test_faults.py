"""`benchmarks/faults.py`: the campaign itself works, a few faults of each kind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_a_few_faults_of_each_kind_are_noticed_and_mended():
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    kinds = {row[0].partition(":")[0]: row for row in rows}
    assert {"kill -9", "flip", "truncate", "hostile files", "mutated study files"} <= set(kinds)
    assert any(kind.startswith("full disk") for kind in kinds)
    for row in rows:
        assert int(row[1].strip("*")) > 0
        assert [row[5].strip("*"), row[6].strip("*")] == ["0", "0"], row


def test_a_fault_that_nobody_notices_is_told(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import faults
    from trials import Outcome

    row, path = faults.Row("flip: x", n=3), Path("/folder/file")
    read = Outcome("value", value="as written")
    faults._judge(row, Outcome("value", value="something else"), read, path, "bit 0 of byte 1")
    faults._judge(row, Outcome("error", error="KeyError", message="'x'"), read, path, "")
    known = Outcome("error", error="ValueError", message="/folder/file is cut", ours=True)
    faults._judge(row, known, read, path, "")
    assert (row.detected, row.harmless, row.silent, row.sound) == (1, 0, 1, False)
