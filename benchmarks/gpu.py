"""Everything about kdlib that only a GPU can tell, in one command and ten minutes.

    python benchmarks/gpu.py --out FOLDER [--minutes 9] [--parts facts,right,fast,study] [--dry]
        [-- ARGUMENTS OF gpu_study.py]

Four parts, in order of worth, each a process with a time limit of its own: `facts` (card, driver,
rates), `right` (the tests marked `gpu`), `fast` (steps beside the barest loop, and where they
wait), `study` (a small study on the card). What a part leaves of its time goes to the next ones.
Every row is on the disk in `FOLDER/rows.jsonl` as soon as it is measured. A part that fails, is
killed or runs out of time leaves a row that says so, and the next one begins. At the end, and at
Ctrl-C or SIGTERM, `FOLDER/summary.md` is made from the rows. `--dry` runs the same on the CPU in
miniature.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_rows import Rows, read_rows

HERE = Path(__file__).parent
DRY_STUDENTS = "13"  # of the miniature: two whole seeds, and one student of the third
SHARES = {"facts": 5, "right": 20, "fast": 40, "study": 35}  # of the time, in order of worth
GRACE_S = 5.0  # from SIGTERM to SIGKILL
MARGIN_S = 5.0  # by which a part is asked to end before it is stopped
FEW = 6  # rows of a step of the study that the summary shows one by one
LOG_BYTES = 2**18  # of a part's output, its last ones
MOST_FILES, MOST_BYTES = 8, 16 * 2**20  # of FOLDER


@dataclass(frozen=True)
class Part:
    """One part: its name, its script, and the command for a limit in seconds."""

    name: str
    script: Path
    command: Callable[[float], list[str]]


def parts_of(names: Iterable[str], out: Path, dry: bool, study: Iterable[str] = ()) -> list[Part]:
    """The parts by name, in order of worth.

    Args:
        out: The study writes into its folder `study`.
        study: Further arguments of `gpu_study.py`.
    """

    def part(name: str) -> Part:
        script = HERE / ("gpu_speed.py" if name == "fast" else f"gpu_{name}.py")

        def command(limit_s: float) -> list[str]:
            seconds = ["--seconds", f"{max(1.0, limit_s - MARGIN_S):.0f}"]
            return [
                sys.executable, str(script), "--out", str(out / name if name == "study" else out),
                *(seconds if name in ("fast", "study") else []), *(["--dry"] if dry else []),
                *(study if name == "study" else ()),
            ]  # fmt: skip

        return Part(name, script, command)

    return [part(name) for name in SHARES if name in names]


def limit_of(name: str, waiting: Iterable[str], left_s: float) -> float:
    """Seconds of a part: its share of what is left, beside those that wait behind it."""
    shares = {other: SHARES.get(other, 1) for other in (name, *waiting)}
    return left_s * shares[name] / sum(shares.values())


def stop(process: subprocess.Popen) -> None:
    """End a part and all it started: SIGTERM, then SIGKILL."""
    for sign, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_part(part: Part, limit_s: float, out: Path) -> None:
    """Run a part to its end or its limit; its row `part` says how it ended."""
    rows = Rows(out, part.name)
    if not part.script.is_file():
        rows.write("part", state="missing", why=f"{part.script.name} is not there")
        return
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }
    begin, state, code = time.monotonic(), "interrupted", None
    # a part that is killed cannot remove its temporary files
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as scratch:
        environment["TMPDIR"] = scratch
        process = subprocess.Popen(
            part.command(limit_s), stdout=log, stderr=subprocess.STDOUT, env=environment,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            state = "done" if code == 0 else "failed" if code > 0 else "killed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            stop(process)  # a process it left behind would disturb the next part
            said = _tail(log)
            with open(out / "log.txt", "ab") as file:
                file.write(f"== {part.name}: {state}\n".encode() + said + b"\n")
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            rows.write(
                "part", state=state, exit_code=code, limit_s=round(limit_s, 1),
                seconds=round(time.monotonic() - begin, 1),
                why=None if state == "done" else "".join(last)[:300],
            )  # fmt: skip


def _tail(log: Any) -> bytes:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LOG_BYTES))
    return log.read()


def run_parts(parts: list[Part], seconds: float, out: Path) -> None:
    """Run parts one after another, and summarise what they wrote, whatever ends them."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    try:
        for number, part in enumerate(parts):
            waiting = [other.name for other in parts[number + 1 :]]
            limit_s = limit_of(part.name, waiting, end - time.monotonic() - GRACE_S)
            if limit_s < 1:
                Rows(out, part.name).write("part", state="no time left")
                continue
            run_part(part, limit_s, out)
    finally:
        (out / "summary.md").write_text(summary(read_rows(out), oversize(out)))


def oversize(out: Path) -> list[str]:
    """What of a folder is over its limits of files and of bytes."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file()]
    summarised = {*found, out / "summary.md"}
    large = [f"{p.relative_to(out)} is over 16 MiB" for p in found if p.stat().st_size > MOST_BYTES]
    many = [f"{len(summarised)} files; expected at most {MOST_FILES}"]
    return large + (many if len(summarised) > MOST_FILES else [])


# --- the summary ----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    return "-" if value is None else str(value).replace("|", "/")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table.

    Args:
        columns: Key of a row -> its heading.
    """
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[_shown(row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


CASE = {"network": "network", "side": "px", "batch": "batch", "precision": "precision"}
TABLES = {  # row -> (heading, columns)
    "speed": (
        "Speed",
        CASE
        | {"contestant": "", "images_per_s": "images/s", "ms": "ms/step", "ratio": "of bare loop"},
    ),
    "waits": (
        "Where the time goes, per step",
        CASE
        | {
            "contestant": "", "ms": "ms", "busy_share": "GPU busy", "kernels": "kernels",
            "syncs": "synchronising calls", "waits": "waits", "copies": "copies",
            "sync_places": "where",
        },
    ),
    "crowd": (
        "Students trained at once",
        CASE
        | {"students": "students", "images_per_s": "images/s of all", "gain": "of one alone"},
    ),
    "error": ("What failed", CASE | {"contestant": "", "why": "error"}),
}  # fmt: skip


def summary(rows: list[dict[str, Any]], warnings: list[str]) -> str:
    """A short Markdown account of all rows."""

    def of(part: str, *kinds: str) -> list[dict[str, Any]]:
        return [r for r in rows if r["part"] == part and (not kinds or r["row"] in kinds)]

    ends = [row for row in rows if row["row"] == "part"]
    counted = Counter(row["part"] for row in rows)
    ends = [row | {"rows": counted[row["part"]] - 1} for row in ends]
    found = ["# kdlib on a GPU\n"]
    found.append(
        table(
            ends,
            {
                "part": "part", "state": "state", "seconds": "s", "limit_s": "limit, s",
                "rows": "rows", "why": "last words",
            },
        )
    )  # fmt: skip
    found += [f"- {line}" for line in warnings]
    if cut := sum(row["row"] == "cut" for row in rows):
        found.append(f"- {cut} rows were cut by a kill\n")
    if facts := [row for row in of("facts") if row["row"] != "part"]:
        found.append("\n## Facts\n")
        found += [f"- {row['row']}: {_shown(_values(row))}" for row in facts]
    if tests := of("right", "test"):
        outcomes = Counter(row["outcome"] for row in tests)
        found.append("\n## Tests\n")
        found.append(", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()) + "\n")
        if broken := [row for row in tests if row["outcome"] in ("failed", "error")]:
            found.append(table(broken, {"test": "test", "seconds": "s", "why": "first line"}))
    found += [f"\n{row['what']}" for row in of("right", "missing")]
    found += [f"\nStudies train with {_shown(_values(row))}." for row in of("fast", "settings")]
    for kind, (heading, columns) in TABLES.items():
        if some := of("fast", kind):
            found.append(f"\n## {heading}\n")
            found.append(table(some, columns))
    if study := [row for row in of("study") if row["row"] != "part"]:
        found.append("\n## Study\n")
        steps = Counter(str(row.get("step", row["row"])) for row in study)
        found.append(", ".join(f"{n} {step}" for step, n in steps.items()) + "\n")
        few = [r for r in study if steps[str(r.get("step", r["row"]))] <= FEW or "error" in r]
        found += [f"- {_shown(_values(row))}" for row in few]
    return "\n".join(found) + "\n"


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("part", "row", "unix_s")}


def _terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--parts", default=",".join(SHARES))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("study", nargs="*", help="after --: arguments of gpu_study.py")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := set(names) - set(SHARES):
        parser.error(f"unknown parts {sorted(unknown)}; expected some of {', '.join(SHARES)}")
    if (arguments.out / "rows.jsonl").exists():
        parser.error(f"{arguments.out} holds rows already; give a new folder")
    signal.signal(signal.SIGTERM, _terminated)
    out = arguments.out.resolve()
    try:
        further = arguments.study or (["--students", DRY_STUDENTS] if arguments.dry else [])
        parts = parts_of(names, out, arguments.dry, further)
        run_parts(parts, arguments.minutes * 60, out)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if (out / "summary.md").exists():
            print((out / "summary.md").read_text())
    states = {r["part"]: r["state"] for r in read_rows(out) if r["row"] == "part"}
    raise SystemExit(0 if all(state == "done" for state in states.values()) else 1)


if __name__ == "__main__":
    main()
