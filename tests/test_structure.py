"""The package as a whole: which module imports which, and what no module may do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kdlib

MODULES = {path.stem: path for path in sorted(Path(kdlib.__file__).parent.glob("*.py"))}

# Every allowed arrow: a module, and the modules of kdlib it may import.
ALLOWED = {
    "__init__": "",
    "files": "",
    "seeds": "",
    "processor": "",
    "params": "files tables",
    "tables": "files",
    "weights": "files",
    "engine": "",
    "data": "encoded files hub params seeds",
    "encoded": "files params",
    "hub": "encoded files params",
    "models": "files params seeds",
    "losses": "",
    "features": "",
    "own": "files params",
    "objectives": "features losses own params seeds",
    "optimising": "params",
    "states": "files",
    "ranks": "",
    "tracking": "files params",
    "pretrained": "models params weights",
    "augment": "params",
    "fused": "augment params",
    "looks": "files params",
    "progress": "files looks params",
    "plots": "files looks params",
    "maps": "looks",
    "agreement": "seeds",
    "coresets": "",
    "gradients": "augment models",
    "variants": "cartography dynamics",
    "noise": "cartography dynamics params",
    "linear": "",
    "diagnostics": "",
    "probe": "diagnostics linear seeds",
    "compare": "files params seeds",
    "telling": "compare",
    "ledger": "params",
    "published": "files params tables",
    "sql": "files",
    "checks": "files seeds",
    "dynamics": "files tables",
    "cartography": "dynamics tables",
    "selection": "coresets files own params seeds tables",
    "cache": "files",
    "building": "cache data files",
    "inspecting": "building cache data files params",
    "sampling": "seeds selection",
    "loading": "augment cache files fused params sampling teacher",
    "evaluation": "augment models",
    "teacher": "augment building cache evaluation models params weights",
    "runs": "files params processor states tables",
    "trainer": "augment dynamics evaluation files loading models objectives optimising params "
    "ranks runs seeds states tracking weights",
    "dataset": "augment building cache data files models params processor runs sampling",
    "experiment": "cache checks dataset dynamics evaluation files loading models objectives "
    "params processor ranks runs sampling seeds states teacher tracking trainer weights",
    "teaching": "augment cache checks dataset dynamics experiment files models objectives params "
    "pretrained probe ranks runs sampling seeds selection teacher trainer weights",
    "mapping": "cartography coresets dataset dynamics experiment files gradients models params "
    "runs seeds teaching",
    "distilling": "checks dataset experiment files mapping objectives params ranks runs sampling "
    "seeds selection teaching trainer",
    "extracting": "augment building cache data evaluation files models params sampling",
    "probing": "augment checks dataset diagnostics distilling experiment extracting files models "
    "params probe runs seeds tables teaching weights",
    "recordings": "checks dataset dynamics evaluation experiment files mapping params runs seeds "
    "tables teaching trainer",
    "scorecard": "agreement cartography dataset files looks maps noise params plots recordings "
    "runs variants",
    "compiling": "checks compare distilling files ledger objectives params probing published runs "
    "teaching",
    "report": "compiling files ledger objectives params runs telling",
    "drawing": "cartography compiling dataset dynamics looks mapping maps params plots progress "
    "report sampling",
    "exhibits": "cache cartography checks dataset dynamics evaluation experiment loading models "
    "objectives params probe runs sampling seeds selection teacher trainer weights",
    "subset_defects": "checks dynamics evaluation exhibits files params seeds selection trainer "
    "weights",
    "feature_defects": "checks diagnostics exhibits features objectives params probe runs "
    "sampling seeds teacher tracking trainer weights",
    "invariants": "",
    "audit": "dataset exhibits experiment feature_defects files invariants looks params plots "
    "published runs subset_defects tables",
    "findings": "compare compiling files params published telling",
    "picking": "__init__ dataset distilling experiment files mapping params runs selection",
    "explorer": "drawing looks params picking",
    "steps": "compiling dataset distilling mapping objectives params probing ranks report teaching "
    "trainer",
    "__main__": "audit augment cache dataset drawing files findings inspecting params probing "
    "ranks recordings runs scorecard steps teaching",
}
NOTEBOOK_SIDE = {"IPython", "ipywidgets", "jscatter", "papermill", "jupyter", "nbformat"}
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
DRAWING = {"looks", "plots", "progress", "maps", "drawing", "scorecard", "audit"}
WIDGETS = "explorer"  # imported by notebooks alone
ENGINE = "engine"  # papermill loads it, by its entry point; no module imports it
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
    """Modules of kdlib a tree imports."""
    found = set()
    for name in imports(tree):
        if name.startswith("(relative)"):
            found.add(name)  # no module here is written so
        elif name.split(".")[0] == "kdlib":
            found.add(name.split(".")[1] if "." in name else "__init__")
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


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def test_every_module_imports_only_what_the_table_allows():
    graph = {module: " ".join(sorted(arrows(parsed(module)))) for module in MODULES}
    assert graph == ALLOWED


def test_the_graph_has_no_cycle():
    graph = {module: arrows(parsed(module)) for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_only_engine_and_explorer_import_anything_of_the_notebook_s_side(module):
    found = {part for name in imports(parsed(module)) for part in name.split(".")}
    there = {ENGINE: {"papermill"}, WIDGETS: {"IPython", "ipywidgets", "jscatter"}}
    assert found & NOTEBOOK_SIDE == there.get(module, set())
    assert WIDGETS not in arrows(parsed(module))


@pytest.mark.parametrize("module", sorted(set(MODULES) - DRAWING - {WIDGETS}))
def test_slow_libraries_are_imported_where_they_are_used(module):
    assert not set(at_import_time(parsed(module))) & SLOW


@pytest.mark.parametrize("module", MODULES)
def test_no_module_unpickles_evaluates_or_touches_a_global_generator(module):
    tree = parsed(module)
    if module == "seeds":  # its one place, which restores what it found
        [block] = [n for n in tree.body if getattr(n, "name", "") == "torch_seeded"]
        assert sorted(forbidden(block)) == ["torch.manual_seed", "torch.random.fork_rng"]
        tree.body.remove(block)
    assert forbidden(tree) == []


def test_the_safe_yaml_loader_of_params_is_a_safe_loader():
    import yaml

    from kdlib.params import _SafeLoader

    assert issubclass(_SafeLoader, yaml.SafeLoader)
    inherited = yaml.SafeLoader.yaml_constructors
    assert _SafeLoader.yaml_constructors == inherited  # no tag was added
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
        "import kdlib\nfrom kdlib import files\nfrom . import data\n"
        "def f():\n    from kdlib.cache import Cache\n    import timm.models\n"
        "class C:\n    import torchvision\n"
    )
    assert arrows(tree) == {"__init__", "files", "(relative).data", "cache"}
    assert set(at_import_time(tree)) == {"torchvision", "kdlib", "(relative)"}


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
    core = sorted(set(MODULES) - DRAWING - {ENGINE, WIDGETS, "__init__", "__main__"})
    code = BLOCKED.format(names=NOTEBOOK_SIDE | {"matplotlib", "timm", "torchvision"}, modules=core)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"imported {len(core)}\n", done.stderr


@pytest.mark.parametrize(
    ("marker", "path"),
    [
        ("objectives", "objectives/objectives.md"),
        ("cifar10", "cifar10/summary.md"),
        ("cifar10n", "cifar10n/noise.md"),
        ("cifar10_scores", "cifar10/scores.md"),
    ],
)
def test_the_readme_shows_tables_as_they_were_generated(marker, path):
    root = Path(kdlib.__file__).parent.parent
    _, shown, _ = re.split(f"<!-- /?{marker} -->", (root / "README.md").read_text())
    assert len(shown) > 100
    assert shown.strip() in (root / "figures" / path).read_text()
