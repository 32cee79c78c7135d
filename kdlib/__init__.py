"""kdlib: knowledge distillation with training dynamics; which data should a student learn from?

Shape letters used in every docstring: E recorded epochs, N examples, C classes, B batch, D
features, S seeds, V teacher views, K steps. Intervals are half-open. Losses and entropies are in
nats.

Modules are imported one way only, from `files` and `seeds` up to the steps of a study and `report`;
`tests/test_structure.py` holds every arrow.
"""

__version__ = "0.1.0"
