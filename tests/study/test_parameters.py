"""Parameters that papermill injects and the notebook does not have."""

import pytest

from kdlib.study.parameters import check_history

DEFAULTS = 'study: str = "params/case.yaml"\nstrategy: str = ""\nfraction: float = 0.0'
INJECTED = '# Parameters\nstudy = "params/case.yaml"\nstrategy = "easy"\n'


def test_an_unknown_parameter_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no parameter 'strateg'; did you mean 'strategy'"):
        check_history(["", DEFAULTS, INJECTED + 'strateg = "hard"\n'])


def test_an_axis_that_the_parameters_cell_lacks_is_refused():
    with pytest.raises(ValueError, match="no parameter 'objective'; known: fraction, strategy"):
        check_history(["", DEFAULTS, "# Parameters\nobjective = 'kd'"])


def test_a_re_executed_notebook_is_accepted():
    """Its history holds the injected cell twice, cells of other kinds, and names that are read."""
    history = ["", DEFAULTS, INJECTED, "import os\nx = 1", "!ls", INJECTED, "%time y = 2"]
    check_history([*history, "# Parameters\nstrategy = str('easy')\n"])


def test_a_notebook_without_a_parameters_cell_takes_any_parameter():
    check_history(["", "# Parameters\nn_points = 3\n", "from kdlib import open_study"])
