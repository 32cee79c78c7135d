"""The package as a whole: which module imports which, and what no module may do."""

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdlib

PACKAGE = Path(kdlib.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# An import goes from a room to any room before it in this line, or stays in its own.
ROOMS = (
    {"repro"}, {"study"}, {"compare", "plots", "cache"}, {"dataset"}, {"models"},
    {"trainer", "cartography", "probes"}, {"steps"}, {"explorer"}, {"lab", "__main__"},
)  # fmt: skip
NOTEBOOK_SIDE = {
    "IPython", "anywidget", "ipywidgets", "jscatter", "jupyter", "nbformat", "papermill",
}  # fmt: skip
SLOW = {
    "torchvision",
    "timm",
    "matplotlib",
    "seaborn",
    "sklearn",
    "PIL",
    "numba",
    "duckdb",
}  # a kernel's start counts
DRAWING = {m for m in MODULES if m.startswith("plots.")} | {
    "steps.figures", "steps.comparison_figures", "steps.saved_figures",
}  # fmt: skip
# `explorer.app` imports the two when it shows an app; `Lab.explore` reaches it by the room's face.
APP = "explorer.app"
WIDGETS = {
    "explorer.controls": {"ipywidgets"}, "explorer.swatches": {"ipywidgets"},
    "explorer.map": {"jscatter"}, "explorer.hand": {"anywidget"},
    "explorer.histograms": {"anywidget"},
}  # fmt: skip
ENGINE = "papermill_engine"  # papermill loads it, by its entry point; no module imports it
EXECUTING = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}  # run code on loading
PRIVATE = {"default_rng", "Generator", "SeedSequence"}  # all of np.random that has no global state
TORCH = {"torch", "torch.random", "torch.cuda", "torch.cuda.random"}
GLOBAL_TORCH = {"manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "fork_rng"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names a tree imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "(relative)" if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(tree: ast.AST) -> set[str]:
    """Rooms of kdlib that a tree imports from, and what else of this repository it imports."""
    found = set()
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "kdlib":
            found.add(parts[1] if len(parts) > 1 else "")
        elif parts[0] in ("(relative)", "audit", "tests", "benchmarks"):
            found.add(name)  # no module here does so
    return found


def level(room: str) -> int:
    (found,) = [k for k, rooms in enumerate(ROOMS) if room in rooms]
    return found


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """Top-level packages imported when the module is, not when a function is called."""

    def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield child
                yield from outside_functions(child)

    for node in outside_functions(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name.split(".")[0] for name in imports(ast.Module([node], [])))


def forbidden(tree: ast.AST) -> list[str]:
    """What a tree does that no module may do."""
    faults = []
    for name in imports(tree):
        top = name.split(".")[0]
        if top in EXECUTING or top == "random" or name.startswith("numpy.random"):
            faults.append(f"import {name}")
        if name in ("torch.load", "builtins.eval", "builtins.exec", "yaml.load"):
            faults.append(f"import {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("weights_only") != "True":
                faults.append("torch.load")
        if isinstance(node, ast.Attribute):
            dotted, owner = ast.unparse(node), ast.unparse(node.value)
            if owner in ("np.random", "numpy.random") and node.attr not in PRIVATE:
                faults.append(dotted)
            if node.attr in GLOBAL_TORCH and owner in TORCH:
                faults.append(dotted)
            if owner == "yaml" and "Loader" in node.attr and node.attr != "SafeLoader":
                faults.append(dotted)
            if owner == "yaml" and node.attr.startswith(("unsafe_", "full_")):
                faults.append(dotted)
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append("bare except")
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if function in ("eval", "exec", "compile", "__import__"):
                faults.append(function)
            if function in ("yaml.load", "yaml.load_all") and options.get("Loader") not in (
                "yaml.SafeLoader",
                "_SafeLoader",
            ):
                faults.append(ast.unparse(node))
            if options.get("allow_pickle", "False") != "False" or (
                function in ("np.load", "numpy.load") and "allow_pickle" not in options
            ):
                faults.append(ast.unparse(node))
    return faults


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__", "papermill_engine"}))
def test_an_import_goes_to_a_room_further_down_or_stays_in_its_own(module):
    room = module.split(".")[0]
    for other in arrows(parsed(module)) - {room, ""}:
        assert level(other) < level(room), f"{module} imports from {other}"


def test_every_folder_is_a_room():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == set().union(*ROOMS) - {"lab", "__main__"}


@pytest.mark.parametrize("room", sorted(set().union(*ROOMS) - {"__main__", "lab", "steps"}))
def test_every_name_on_the_face_of_a_room_is_there(room):
    face = importlib.import_module(f"kdlib.{room}")
    assert [name for name in face.__all__ if not hasattr(face, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_only_engine_and_explorer_import_anything_of_the_notebook_s_side(module):
    found = {part for name in imports(parsed(module)) for part in name.split(".")}
    there = {ENGINE: {"papermill"}, APP: {"IPython"}, **WIDGETS}
    assert found & NOTEBOOK_SIDE == there.get(module, set())
    assert f"kdlib.{APP}" not in {name.rpartition(".")[0] for name in imports(parsed(module))}


@pytest.mark.parametrize("module", sorted(set(MODULES) - DRAWING - {APP, *WIDGETS}))
def test_slow_libraries_are_imported_where_they_are_used(module):
    assert not set(at_import_time(parsed(module))) & SLOW


@pytest.mark.parametrize("module", MODULES)
def test_no_module_unpickles_evaluates_or_touches_a_global_generator(module):
    tree = parsed(module)
    if module == "repro.seeds":  # its one place, which restores what it found
        [block] = [n for n in tree.body if getattr(n, "name", "") == "torch_seeded"]
        assert sorted(forbidden(block)) == ["torch.manual_seed", "torch.random.fork_rng"]
        tree.body.remove(block)
    assert forbidden(tree) == []


def test_the_safe_yaml_loader_of_params_is_a_safe_loader():
    import yaml

    from kdlib.study.yaml_text import _SafeLoader

    assert issubclass(_SafeLoader, yaml.SafeLoader)
    own = {"tag:yaml.org,2002:int": _SafeLoader.construct_core_int}
    assert _SafeLoader.yaml_constructors == yaml.SafeLoader.yaml_constructors | own
    assert set(own) < set(yaml.SafeLoader.yaml_constructors)  # no tag was added
    assert _SafeLoader.yaml_multi_constructors == yaml.SafeLoader.yaml_multi_constructors


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import random",
        "from numpy.random import rand",
        "np.random.seed(0)",
        "x = np.random.rand(3)",
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "yaml.load(text, yaml.FullLoader)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "try:\n    f()\nexcept:\n    pass",
        "def f():\n    def g():\n        return eval('1')",
    ],
)
def test_the_search_for_forbidden_code_finds(code):
    assert forbidden(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "network.eval()",
        "np.random.default_rng(0).random()",
        "torch.Generator().manual_seed(0)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "np.load(path, allow_pickle=False)",
        "json.load(file)",
    ],
)
def test_the_search_for_forbidden_code_passes(code):
    assert forbidden(ast.parse(code)) == []


def test_the_search_for_imports_sees_functions_and_relative_names():
    tree = ast.parse(
        "import kdlib\nfrom kdlib import repro\nfrom . import data\nimport audit.report\n"
        "def f():\n    from kdlib.cache.shards import Cache\n    import timm.models\n"
        "class C:\n    import torchvision\n"
    )
    assert arrows(tree) == {"", "repro", "(relative).data", "audit.report", "cache"}
    assert set(at_import_time(tree)) == {"torchvision", "kdlib", "(relative)", "audit"}


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
import importlib
for module in {modules!r}:
    importlib.import_module("kdlib." + module)
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {names!r}, loaded & {names!r}
print("imported", len({modules!r}))
"""


def test_the_core_imports_where_notebooks_and_matplotlib_are_not_installed():
    core = sorted(set(MODULES) - DRAWING - {ENGINE, APP, *WIDGETS, "__init__", "__main__"})
    core = [name.removesuffix(".__init__") for name in core]
    code = BLOCKED.format(names=NOTEBOOK_SIDE | {"matplotlib", "timm", "torchvision"}, modules=core)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"imported {len(core)}\n", done.stderr


def test_committed_figures_stay_small():
    root = PACKAGE.parent
    files = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "figures"], capture_output=True, text=True
    ).stdout.split("\0")
    n_bytes = sum((root / name).stat().st_size for name in files if (root / name).is_file())
    assert 0 < n_bytes < 13e6
