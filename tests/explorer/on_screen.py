"""What the tests of the explorer do and read on the screen."""

import html
import re
import sys

import numpy as np
import pandas as pd

from kdlib.explorer import app as app_module

BAD_NAME = "<img src=x onerror=alert(1)>"


def status(app):
    return html.unescape(re.sub("<[^>]*>", "", app.controls.status.value))


def lasso(plot, ids):
    """What a lasso in the browser does: row positions, in no order."""
    plot.widget.selection = plot.positions(np.asarray(ids))[::-1]


def synthetic(n, seed=0):
    """A datamap of 10 classes, one region of which is rare."""
    rng = np.random.default_rng(seed)
    region = pd.Categorical(rng.choice(["easy", "ambiguous", "hard"], n, p=[0.7, 0.29, 0.01]))
    return pd.DataFrame(
        {
            "label": rng.integers(0, 10, n),
            "confidence": rng.random(n),
            "variability": rng.random(n) / 2,
            "correctness": rng.random(n),
            "region_variability": region,
            "region_corner": region,
        },
        index=pd.Index(np.arange(n) * 3, name="example_id"),
    )


def finished(app):
    app.training.thread.join(30)
    assert not app.training.thread.is_alive()


def train(app, monkeypatch, *code):
    commands = [[sys.executable, "-c", line] for line in code]
    monkeypatch.setattr(app_module, "training_commands", lambda study, name: commands)
    lasso(app.plots[0], app.state.table.index[:110])
    app.controls.name.value = "mine"
    app.controls.train.click()


def below_the_button(app):
    return html.unescape(re.sub("<[^>]*>", "", app.controls.log.value))
