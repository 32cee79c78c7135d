"""Parameters of a notebook run by papermill, which injects a cell that sets them.

papermill 2.7 only warns about a parameter that the notebook does not have, so that a typo in a
sweep would run with the default.
"""

import ast
from collections.abc import Collection, Iterable

from kdlib.repro.files import nearest

INJECTED = "# Parameters"  # how the injected cell begins


def assigned(source: str) -> set[str]:
    """Names that a cell sets; none of a cell that is not plain Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # `!ls`, say
        return set()
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def refuse_unknown(given: Iterable[str], known: Collection[str]) -> None:
    """Compare parameters with the names of the parameters cell.

    Raises: ValueError with the nearest name for one that is not there.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"this notebook has no parameter {name!r}; {nearest(name, known)}")


def check_history(history: Iterable[str]) -> None:
    """Check the injected cells among the cells that a notebook has run.

    Args:
        history: The source of each cell, `In` in a notebook. What the cells before the first
            injected one set are the notebook's parameters; without such cells nothing is checked.

    Raises: As `refuse_unknown`.
    """
    known: set[str] = set()
    for source in history:
        if not source.startswith(INJECTED):
            known |= assigned(source)
        elif known:
            refuse_unknown(sorted(assigned(source)), known)
