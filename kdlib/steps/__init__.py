"""The steps behind the notebooks: make what a step makes, or open it."""
