"""Figures of probes and of the shape of features, over the steps of training or at the last one.

A function takes tables and an axis (or a figure where several panels belong together), draws, and
returns it.
"""

import itertools
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.plots import layout, theme
from kdlib.plots.curves import apart, draw_cells, finish_lines
from kdlib.repro.files import nearest
from kdlib.study.evaluation import AXES, OWN

REFERENCES = ("teacher", "untrained")
LAYERS = ((theme.BLACK, "o"), (theme.SKY, "s"), (theme.PURPLE, "^"), (theme.VERMILLION, "D"))

# Diagnostics of features: column, title, the level of theory (None: it depends on the network) and
# what it is the level of.
DIAGNOSTICS = (
    ("effective_rank", "effective rank", None, "isotropic"),
    ("mean_cosine", "mean cosine, centred", 0.0, "isotropic"),
    ("unit_variance", "variance of a unit feature", None, "at most 1 / D"),
    ("alignment", "alignment within classes", 2.0, "isotropic"),
    ("uniformity", "uniformity", None, "evenly spread"),
    ("cka_teacher", "linear CKA with the teacher", 1.0, "the teacher itself"),
)


def probed(
    probes: pd.DataFrame, probe: str = "linear", on: str = OWN, layer: str = "features"
) -> pd.DataFrame:
    """Rows of one probe of one layer on one data set; of the teacher, those of its last layer.

    Raises: ValueError for missing columns or a probe that is not there.
    """
    theme.demand(probes, (*AXES, "seed", "step", "on", "layer", "probe", "accuracy"), "probes")
    rows = probes
    for column, wanted in (("on", on), ("layer", layer), ("probe", probe)):
        of_teacher = (column == "layer") & (rows["strategy"] == "teacher")
        kept = rows[(rows[column] == wanted) | of_teacher]
        if kept[kept["strategy"] != "teacher"].empty:
            raise ValueError(
                f"no rows of {column} {wanted!r}; {nearest(wanted, set(rows[column]))}"
            )
        rows = kept
    return rows


def probe_curves(
    ax: Axes,
    probes: pd.DataFrame,
    probe: str = "linear",
    on: str = OWN,
    layer: str = "features",
    by: str = "strategy",
) -> Axes:
    """Probe accuracy over optimiser steps, with the untrained student and the teacher as levels.

    Args:
        ax: The axis.
        probes: The axes of the study, `seed`, `step`, `probe`, `accuracy` in [0, 1]; rows whose
            `strategy` is `untrained` or `teacher` become horizontal lines at their mean.
        probe: Which rows: `linear`, `knn` or `few_shot_<n>`.
        on: On which data set; `own` means the study's images.
        layer: Of which layer. The teacher's level is that of its last one.
        by: The axis of the study that decides the colour.

    Returns: `ax`.
    Raises: ValueError for missing columns, a probe that is not there, or a cell whose seeds were
        not all probed at the same steps.
    """
    rows = probed(probes, probe, on, layer)
    is_reference = rows["strategy"].isin(REFERENCES)
    trained = rows[~is_reference]
    ends = draw_cells(ax, trained, "accuracy", by)
    for name, dash in zip(REFERENCES, ((0, (4, 2)), (0, (1, 2))), strict=True):
        reference = rows[rows["strategy"] == name]
        # One teacher is the reference of all students, the untrained network that of its student.
        networks = reference["student" if name == "untrained" else "strategy"]
        for student, group in reference.groupby(networks):
            level = 100 * group["accuracy"].mean()
            ax.axhline(level, color=theme.BLACK, ls=dash, lw=0.9, zorder=1)
            several = networks.nunique() > 1
            label = f"{name}, {theme.in_words(student)}" if several else name
            ends.append((level, label, theme.BLACK, None))
    ax.set(xlabel="optimiser steps", ylabel="test accuracy (%)")
    title = [f"{theme.in_words(probe)} probe", theme.held_axes(trained, by)]
    title += [layer] * (layer != "features")
    title += [f"on {theme.in_words(on)}"] * (on != OWN)
    lines = ", ".join(filter(None, title)), theme.name_of_spread(trained)
    ax.set_title("\n".join(lines), fontsize=theme.TEXT_PT)
    finish_lines(ax, ends)
    return ax


def probe_places(fig: Figure, probes: pd.DataFrame, probe: str = "linear") -> Figure:
    """Probe accuracy of every layer on every data set at the last step, a panel for each data set,
    between the untrained student and the teacher.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        probes: As of `probe_curves`.
        probe: Which rows: `linear`, `knn` or `few_shot_<n>`.

    Returns: `fig`, one axis per data set; a small dot is one seed, a large marker the mean.
    Raises: ValueError for missing columns, or a table without such a probe.
    """
    theme.demand(probes, (*AXES, "seed", "step", "on", "layer", "probe", "accuracy"), "probes")
    rows = probes[probes["probe"] == probe]
    theme.demand(rows, (), f"probes, {probe}")
    panels = {
        "own data" if place == OWN else f"on {theme.in_words(place)}": rows[rows["on"] == place]
        for place in dict.fromkeys(rows["on"])
    }
    xlabel = f"test accuracy of a {theme.in_words(probe)} probe (%)"
    return _last_probes(fig, rows, panels, xlabel)


def probe_levels(fig: Figure, probes: pd.DataFrame, on: str = OWN) -> Figure:
    """Linear and k-NN probes of the last layer at the last step, a panel for each, between the
    untrained student and the teacher: for cells that were probed at few steps.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        probes: As of `probe_curves`.
        on: On which data set; `own` means the study's images.

    Returns: `fig`; a small dot is one seed, a large marker the mean.
    """
    panels = {f"{theme.in_words(p)} probe": probed(probes, p, on) for p in ("linear", "knn")}
    if on != OWN:
        panels = {f"{title} on {theme.in_words(on)}": rows for title, rows in panels.items()}
    return _last_probes(fig, pd.concat(panels.values()), panels, "test accuracy (%)")


def _last_probes(
    fig: Figure, rows: pd.DataFrame, panels: Mapping[str, pd.DataFrame], xlabel: str
) -> Figure:
    """A row for each network of `rows` at its last step, a panel for each part of the rows."""
    trained = rows[~rows["strategy"].isin(REFERENCES)]
    trained = trained[trained["step"] == trained.groupby(list(AXES))["step"].transform("max")]
    others = theme.varying_axes(trained, "strategy")
    networks = {}  # what it is called -> its rows
    for (student,), of in rows[rows["strategy"] == "untrained"].groupby(["student"], sort=False):
        several = rows["student"].nunique() > 1
        networks[f"untrained, {theme.in_words(student)}" if several else "untrained"] = of
    cells = trained.groupby(["strategy", *others], sort=False)
    for key, of in sorted(cells, key=lambda cell: theme.sorting_key(cell[0])):
        networks[", ".join(map(theme.value_in_words, key))] = of
    networks["teacher"] = rows[rows["strategy"] == "teacher"]
    layers = list(dict.fromkeys(rows["layer"]))
    axs = layout.panel_grid(fig, len(panels), 0.21 * len(networks) + 0.4, xlabel=xlabel)
    shift = 0.5 / len(layers)
    for ax, (title, of_panel) in zip(axs, panels.items(), strict=True):
        for y, of in enumerate(networks.values()):
            in_panel = of[of.index.isin(of_panel.index)]
            for i, layer in enumerate(layers):
                here = in_panel[in_panel["layer"] == layer]
                values = 100 * here.drop_duplicates(["seed", "accuracy"])["accuracy"]
                colour, marker = LAYERS[i % len(LAYERS)]
                at = y + shift * (i - (len(layers) - 1) / 2)
                ax.plot(values, [at] * len(values), "o", ms=2, color=colour, alpha=0.5, mew=0)
                if len(values):
                    ax.plot(values.mean(), at, marker, ms=4.5, color=colour, mec="white", mew=0.6)
        layout.name_rows(ax, list(networks), 0.6)
        ax.set_title(title)
    marks = [
        layout.mark(
            "mean" if len(layers) == 1 else "last layer" if layer == "features" else layer,
            color=colour, marker=marker, ms=4.5, mew=0,
        )
        for layer, (colour, marker) in zip(layers, itertools.cycle(LAYERS), strict=False)
    ]  # fmt: skip
    few = layout.mark(
        f"one seed of {trained['seed'].nunique()}", color=theme.GREY, marker="o", ms=2, mew=0
    )
    held = layout.mark(theme.held_axes(trained, "strategy"))
    layout.legend_in_rows(fig, [held, *marks, few] if held.get_label() else [*marks, few])
    return fig


def diagnostics(fig: Figure, probes: pd.DataFrame, on: str = OWN) -> Figure:
    """Diagnostics of the features over optimiser steps, a panel for each in which the cells can be
    told `apart`. Dotted lines are values that theory gives features without structure, or the
    largest possible ones.

    Args:
        fig: An empty figure.
        probes: The axes of the study, `seed`, `step`, `on`, `layer`, `probe`, and the diagnostics;
            rows of the last layer are drawn. On other images than the study's nothing is
            compared with the teacher.
        on: On which data set; `own` means the study's images.

    Returns: `fig`; without an axis where no panel is left.
    Raises: ValueError for missing columns or a table without such rows.
    """
    columns = [name for name, *_ in DIAGNOSTICS]
    needed = (*AXES, "seed", "step", "on", "layer", "probe", *columns)
    theme.demand(probes, (*needed, "n_features", "rank_ratio", "uniformity_even"), "probes")
    last_layer = (probes["on"] == on) & (probes["layer"] == "features")
    rows = probes[last_layer & ~probes["strategy"].isin(REFERENCES)]
    theme.demand(rows, (), "probes")
    rows = rows[rows["probe"] == rows["probe"].iloc[0]]  # they are the same in every probe's row
    levels = {
        "effective_rank": rows["effective_rank"] / rows["rank_ratio"],
        "unit_variance": 1 / rows["n_features"],
        "uniformity": rows["uniformity_even"],
    }
    levels |= {name: pd.Series([level]) for name, _, level, _ in DIAGNOSTICS if level is not None}
    telling = [panel for panel in DIAGNOSTICS if apart(rows, panel[0], list(levels[panel[0]]))]
    if not telling:
        return fig
    axs = layout.panel_grid(fig, len(telling), 1.9, sharey=False, xlabel="optimiser steps")
    for ax, (name, label, _, bound) in zip(axs, telling, strict=True):
        draw_cells(ax, rows, name, "strategy", scale=1)
        for height in sorted(set(levels[name].round(9))):
            ax.axhline(height, color=theme.BLACK, ls=(0, (1, 2)), lw=0.9, zorder=1)
        ax.set_xlim(0, max(1, rows["step"].max()))
        ax.set_title(f"{label}\n(dotted: {bound})", fontsize=theme.TEXT_PT)
    handles, _ = axs[0].get_legend_handles_labels()
    title = f"{theme.held_axes(rows, 'strategy')}; {theme.name_of_spread(rows)}"
    title = title if on == OWN else f"on {theme.in_words(on)}, {title}"
    # handles are long enough to tell dashes apart
    n_rows = layout.legend_in_rows(fig, handles, title=title, handlelength=3.5)
    fig.set_figheight(fig.get_figheight() + 0.2 * n_rows)
    return fig
