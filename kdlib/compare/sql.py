"""SQL over all runs of all studies, by DuckDB, where the files lie.

Leaves to others: what may be compared. A query sees runs that no table accepts, and says nothing of
budgets; numbers for a paper come from `compiling`.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.repro.files import workspace

COMMITTED = ("results", "curves", "probes", "costs")


def query(text: str, parameters: list[Any] | None = None) -> pd.DataFrame:
    """The answer to one SQL query.

    Its views are `metrics`, one row per evaluation of each finished student run that is here
    (`runs/<study>/distill/<axis=value>/.../metrics.parquet`), and `results`, `curves`, `probes` and
    `costs` of all studies with committed tables (`figures/<study>/tables/`). Every view has a
    column `study`; `metrics` has the axes of its folder, `fraction` and `seed` as numbers.

    Args:
        text: SQL; values belong into `parameters`, where they need no quotes: `study = ?`.
        parameters: One value for each `?`.

    Raises: ModuleNotFoundError without DuckDB; duckdb.Error for a query it cannot answer, such as
        one of a view of which there is no file.
    """
    import duckdb  # here alone: a laboratory without it lacks nothing else

    # nothing is fetched while a query runs
    settings = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    with duckdb.connect(config=settings) as connection:
        for name, found in _files().items():
            if found:
                connection.register(f"{name}_files", pd.DataFrame(found))
                paths = ", ".join(_quoted(row["filename"]) for row in found)
                connection.execute(
                    f"CREATE VIEW {name} AS SELECT place.* EXCLUDE (filename), "
                    "content.* EXCLUDE (filename) FROM read_parquet("
                    f"[{paths}], union_by_name=true, filename=true, hive_partitioning=false"
                    f") AS content JOIN {name}_files AS place USING (filename)"
                )
        return connection.execute(text, parameters).df()


def _files() -> dict[str, list[dict[str, Any]]]:
    """View -> its files, with what their places say; read here and not by DuckDB, which would take
    any `=` of the path for an axis."""
    found: dict[str, list[dict[str, Any]]] = {"metrics": []}
    runs = workspace() / "runs"
    for path in sorted(runs.glob("*/distill/**/metrics.parquet")):
        if (path.parent / "evidence.json").is_file():
            study, _, *axes = path.parent.relative_to(runs).parts
            values: dict[str, Any] = dict(axis.split("=", 1) for axis in axes)
            values |= {"fraction": float(values["fraction"]), "seed": int(values["seed"])}
            found["metrics"].append({"filename": str(path), "study": study} | values)
    for name in COMMITTED:
        paths = sorted((workspace() / "figures").glob(f"*/tables/{name}.parquet"))
        found[name] = [{"filename": str(p), "study": p.parents[1].name} for p in paths]
    return found


def _quoted(path: str | Path) -> str:
    """A path as an SQL string that DuckDB does not take for a pattern."""
    literal = "".join(f"[{sign}]" if sign in "*?[" else sign for sign in str(path))
    return "'" + literal.replace("'", "''") + "'"
