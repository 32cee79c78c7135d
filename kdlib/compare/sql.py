"""SQL over all runs of all studies, by DuckDB, where the files lie.

A query also sees refused runs, and does not compare budgets: take the numbers of a paper from the
tables of notebook 06.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.compare.committed import NAMES
from kdlib.repro.files import workspace


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
    import duckdb  # optional: only queries need it

    # a query downloads nothing
    settings = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    with duckdb.connect(config=settings) as connection:
        for name, rows in _files().items():
            if rows:
                connection.register(f"{name}_files", pd.DataFrame(rows))
                paths = ", ".join(_quoted(row["filename"]) for row in rows)
                connection.execute(
                    f"CREATE VIEW {name} AS SELECT place.* EXCLUDE (filename), "
                    "content.* EXCLUDE (filename) FROM read_parquet("
                    f"[{paths}], union_by_name=true, filename=true, hive_partitioning=false"
                    f") AS content JOIN {name}_files AS place USING (filename)"
                )
        return connection.execute(text, parameters).df()


def _files() -> dict[str, list[dict[str, Any]]]:
    """View -> its files and the axes in their paths. The hive partitioning of DuckDB would read an
    `=` anywhere in the path as an axis."""
    views: dict[str, list[dict[str, Any]]] = {"metrics": []}
    runs = workspace() / "runs"
    for path in sorted(runs.glob("*/distill/**/metrics.parquet")):
        if (path.parent / "evidence.json").is_file():
            study, _, *axes = path.parent.relative_to(runs).parts
            values: dict[str, Any] = dict(axis.split("=", 1) for axis in axes)
            values |= {"fraction": float(values["fraction"]), "seed": int(values["seed"])}
            views["metrics"].append({"filename": str(path), "study": study} | values)
    for name in NAMES:
        paths = sorted((workspace() / "figures").glob(f"*/tables/{name}.parquet"))
        views[name] = [{"filename": str(p), "study": p.parents[1].name} for p in paths]
    return views


def _quoted(path: str | Path) -> str:
    """A path as an SQL string that DuckDB does not take for a pattern."""
    literal = "".join(f"[{sign}]" if sign in "*?[" else sign for sign in str(path))
    return "'" + literal.replace("'", "''") + "'"
