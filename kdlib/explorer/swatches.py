"""Saved selections side by side: a button for each, which shows it on the map in a colour."""

from collections.abc import Callable, Sequence

import ipywidgets as w

from kdlib.explorer.membership import COLOURS


class Swatches:
    """A toggle for each saved selection.

    Attributes:
        box: The toggles.
        colours: Name -> colour of what is shown on the map, in the order in which it was chosen.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        """Args: changed, called after a toggle of a person has changed `colours`."""
        self.changed, self.colours, self._buttons = changed, {}, {}
        self.box = w.HBox()
        self.box.add_class("kdlib-swatches")

    def list(self, names: Sequence[str]) -> None:
        """Show a button for each saved selection."""
        for name in names:
            if name not in self._buttons:
                self._buttons[name] = self._button(name)
        label = w.Label("saved, on the map:")
        self.box.children = [label] * bool(names) + [self._buttons[name] for name in names]

    def clear(self) -> None:
        """Show none on the map."""
        self.colours = {}
        self._dress()

    def _button(self, name: str) -> w.ToggleButton:
        tip = f"Show the examples of {name} on the map in a colour"
        button = w.ToggleButton(description=name, tooltip=tip)
        button.observe(lambda change: self._toggled(name, change["new"]), "value")
        return button

    def _toggled(self, name: str, on: bool) -> None:
        if on == (name in self.colours):
            return
        if not on:
            del self.colours[name]
        else:
            free = [c for c in COLOURS if c not in self.colours.values()]
            if not free:  # the one that was chosen first gives its colour away
                first = next(iter(self.colours))
                free = [self.colours.pop(first)]
            self.colours[name] = free[0]
        self._dress()
        self.changed()

    def _dress(self) -> None:
        for name, button in self._buttons.items():
            colour = self.colours.get(name)
            button.value = colour is not None
            button.layout.border_left = f"8px solid {colour or 'transparent'}"
