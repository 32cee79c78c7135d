"""SQL over all runs of all studies, by DuckDB, where the files lie.

A query also sees refused runs, and does not compare budgets: take the numbers of a paper from the
tables of notebook 06.
"""

import glob
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

    home, views = workspace(), {}
    for name in NAMES:
        paths = home.glob(f"figures/*/tables/{name}.parquet")
        views[name] = [{"filename": str(path), "study": path.parts[-3]} for path in sorted(paths)]
    views["metrics"] = []
    for path in sorted(home.glob("runs/*/distill/**/metrics.parquet")):
        if path.with_name("evidence.json").is_file():
            # DuckDB would read an `=` anywhere in the path as an axis
            study, _, *axes = path.parent.relative_to(home / "runs").parts
            place = {"filename": str(path), "study": study} | dict(a.split("=", 1) for a in axes)
            place |= {"fraction": float(place["fraction"]), "seed": int(place["seed"])}
            views["metrics"].append(place)
    # a query downloads nothing, and reads no variable of this function as a table
    settings = ("autoinstall_known_extensions", "autoload_known_extensions")
    settings = dict.fromkeys((*settings, "python_enable_replacements"), False)
    with duckdb.connect(config=settings) as connection:
        for name, places in views.items():
            if places:
                content = connection.read_parquet(
                    [glob.escape(place["filename"]) for place in places],
                    union_by_name=True, filename=True, hive_partitioning=False,
                )  # fmt: skip
                whole = connection.from_df(pd.DataFrame(places)).join(content, "filename")
                whole.project("* EXCLUDE filename").create_view(name)
        return connection.execute(text, parameters).df()
