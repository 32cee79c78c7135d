"""SQL over all runs of all studies, by DuckDB, where the files lie.

A query also sees refused runs, and does not compare budgets: take the numbers of a paper from the
tables of notebook 06.
"""

import glob
from typing import Any

import pandas as pd

from kdlib.compare.committed import NAMES
from kdlib.repro import files
from kdlib.repro.files import workspace


def query(text: str, parameters: list[Any] | None = None) -> pd.DataFrame:
    """The answer to one SQL query.

    Its views are `metrics`, one row per evaluation of each finished student run that is here
    (`runs/<study>/distill/<axis=value>/.../metrics.parquet`), and `results`, `curves` and
    `probes` of all studies with committed tables (`figures/<study>/tables/`). Every view has a
    column `study`; `metrics` has the axes of its folder, `fraction` (or `shards`) and `seed` as
    numbers.

    Args:
        text: SQL; values belong into `parameters`, where they need no quotes: `study = ?`.
        parameters: One value for each `?`.

    Raises: ModuleNotFoundError without DuckDB; ValueError for a query it cannot answer, such as one
        of a view of which there is no file.
    """
    try:
        import duckdb  # optional: only queries need it
    except ImportError:
        raise ModuleNotFoundError(
            "SQL over runs needs DuckDB, which is not installed here: pip install duckdb"
        ) from None

    home, views = workspace(), {}
    for name in NAMES:
        paths = home.glob(f"figures/*/tables/{name}.parquet")
        views[name] = [{"filename": str(path), "study": path.parts[-3]} for path in sorted(paths)]
    views["metrics"] = []
    for path in sorted(home.glob("runs/*/distill/**/metrics.parquet")):
        if path.with_name("evidence.json").is_file():
            # DuckDB would read an `=` anywhere in the path as an axis
            study, _, *axes = path.parent.relative_to(home / "runs").parts
            place = {"filename": str(path), "study": study}
            try:
                place |= dict(a.split("=", 1) for a in axes)
                size, kind = ("shards", int) if "shards" in place else ("fraction", float)
                place |= {size: kind(place[size]), "seed": int(place["seed"])}
            except (ValueError, KeyError):
                raise ValueError(
                    f"{path.parent} is no folder of a student (student=.../strategy=.../"
                    "fraction=.../objective=.../seed=...); move it out of runs/"
                ) from None
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
        try:
            return connection.execute(text, parameters).df()
        except duckdb.Error as error:
            here = [f"{name} ({len(places)} files)" for name, places in views.items() if places]
            raise ValueError(
                f"DuckDB cannot answer this query: {files.one_line(error)}; the views here are "
                f"{', '.join(here) or 'none'}: expected SELECT ... FROM one of them, with a "
                "parameter for each `?`; a view comes with the runs or the committed tables of a "
                "study (python -m kdlib study)"
            ) from None
