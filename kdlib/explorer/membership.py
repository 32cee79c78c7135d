"""In which of several saved selections the examples are, and the colours that say so."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

COLUMN = "saved selections"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito
SEVERAL, OTHERS = "in several", "in none"
BESIDES = {False: ("#000000", "#C4C4C4"), True: ("#FFFFFF", "#8A8A8A")}  # dark theme or not


def membership(index: pd.Index, shown: Mapping[str, np.ndarray]) -> pd.Categorical:
    """In which of some selections each example is: a name, in several, or in none; of these, those
    that there are."""
    n_in, code = np.zeros(len(index), int), np.zeros(len(index), int)
    for i, ids in enumerate(shown.values()):
        inside = index.isin(ids)
        n_in += inside
        code[inside] = i
    code[n_in > 1], code[n_in == 0] = len(shown), len(shown) + 1
    return pd.Categorical.from_codes(code, [*shown, SEVERAL, OTHERS]).remove_unused_categories()
