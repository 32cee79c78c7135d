"""One file per notebook: make what the step makes, or open it."""
