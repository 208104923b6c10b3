"""What holds for the package as a whole: what importing it does, and how its files may depend on each other."""

import ast
import doctest
import graphlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
from public_for_tests import public_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jbilevel"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from its own row or from a row above it, never from one below.
ROWS = (
    ("_core",),
    ("losses", "metrics", "nets", "operators", "prox", "regularizers"),
    ("_views", "data"),
    ("solvers",),
    ("_oracle",),
    ("explicit", "implicit", "nonsmooth", "piggyback", "unroll"),
    ("problems",),
    ("_method",),
    ("alternating", "first_order", "hoag", "maid", "nba", "quasi_newton", "stochastic"),
    ("_training",),
    ("training",),
    ("task",),
    ("dfols",),  # its package owns the loop, so it comes after ours
    ("cli",),
)
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
ENTRY_POINTS = {"__init__", "__main__"}  # these may import everything

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def syntax(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path):
    """The name directly under jbilevel/ that a file belongs to: a module, or a sub-package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def without_type_checking(tree):
    """Every node but those under `if TYPE_CHECKING:`, which never run."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def imported(path):
    """Full dotted names of all that a file imports, inside functions too."""
    package = ("jbilevel", *path.relative_to(PACKAGE).parent.parts)
    for node in without_type_checking(syntax(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{start}.{alias.name}" for alias in node.names)


def rooms_used(path):
    names = (name.split(".") for name in imported(path))
    return {(name + ["__init__"])[1] for name in names if name[0] == "jbilevel"} - {room(path)}


def run(code):
    """Runs code in a fresh interpreter that sees this checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_changes_no_global_setting():
    run("""
import os
import jax, numpy, optax, tqdm

def settings():
    return {**jax.config.values, **os.environ, **numpy.geterr(), **numpy.get_printoptions()}

before = settings()
import jbilevel
after = settings()
changed = {name: (value, after.get(name)) for name, value in before.items() if after.get(name) != value}
assert not changed, changed
""")


def test_import_makes_no_array():
    """Making an array starts the devices, after which a user could no longer choose them."""
    run("""
import jax
import jbilevel
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)  # raises once the devices have been started
assert jax.device_count() == 2
""")


def test_import_needs_no_optional_package():
    run("""
import sys
import jbilevel
optional = {"astra", "dfols", "equinox", "flax", "h5py", "jaxopt", "matplotlib", "nibabel", "openjpeg", "optimistix",
            "PIL", "pydicom", "pylibjpeg", "safetensors", "skimage", "sklearn", "tomosipo"}
found = optional & set(sys.modules)
assert not found, f"import jbilevel also imports {sorted(found)}"
""")


@every_file
def test_imports_go_one_way(path):
    here = room(path)
    if here in ENTRY_POINTS:
        return
    assert here in ROW, f"jbilevel/{here} is new: give it a place in ROWS of {Path(__file__).name}"
    for other in rooms_used(path):
        assert other in ROW, f"imports {other!r} from jbilevel itself: name the module that defines it"
        assert ROW[other] <= ROW[here], f"{here} imports {other}, which stands below it"


def test_no_two_modules_need_each_other():
    graph = {}
    for path in FILES:
        if room(path) not in ENTRY_POINTS:
            graph.setdefault(room(path), set()).update(rooms_used(path))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@every_file
def test_nothing_can_execute_the_content_of_a_file(path):
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}), ast.unparse(node)
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
    forbidden = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
    assert not forbidden & {name.split(".")[0] for name in imported(path)}


def test_no_file_is_two_rooms():
    folders = ("jbilevel", "tests", "benchmarks", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(lines) > 100 and not {path: count for path, count in lines.items() if count > 500}


@every_file
def test_only_public_names_of_jax(path):
    if path == PACKAGE / "operators" / "linear.py":  # the one exception: the linear primitive
        return
    written = {ast.unparse(node) for node in ast.walk(syntax(path)) if isinstance(node, ast.Attribute)}
    private = ("jax.interpreters", "jax._src", "jax.extend")
    used = [name for name in {*imported(path), *written} if f"{name}.".startswith(tuple(f"{p}." for p in private))]
    assert not used, used


# Foreign objects and files may be asked what they are: arrays of other libraries, modules of flax, packages that are
# not ours, and what a reader finds. Of our own objects every ability is a method of a base class.
FOREIGN = {
    "_core/recompilation.py",
    "_core/brief.py",
    "_core/io.py",
    "_core/validate.py",
    "_training/batches.py",
    "_training/fingerprint.py",
    "nets/__init__.py",
    "nets/adapters.py",
    "operators/tomosipo.py",
    "problems/variational.py",
    "task.py",
}


@every_file
def test_nothing_asks_an_object_of_ours_what_it_can_do(path):
    name = str(path.relative_to(PACKAGE))
    if name in FOREIGN or name.startswith("data/"):
        return
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"hasattr", "getattr"}, ast.unparse(node)
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            assert "AttributeError" not in ast.unparse(node.type), ast.unparse(node)


def test_no_name_hides_a_module():
    run("""
import importlib, pkgutil, types
import jbilevel

def walk(package):
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        shown = vars(package)[found.name]
        assert isinstance(shown, types.ModuleType), f"{package.__name__}.{found.name} is hidden by {shown}"
        if found.ispkg:
            walk(module)

walk(jbilevel)
""")


# Public functions and classes without an example, each with the reason; the examples are run with these tests.
WITHOUT_EXAMPLE = {
    f"{module}.{name}State": "made and read by its method; `jb.MethodState` shows how"
    for module, name in (
        ("alternating", "Alternating"),
        ("first_order", "FirstOrder"),
        ("hoag", "HOAG"),
        ("maid", "MAID"),
        ("nba", "NBA"),
        ("quasi_newton", "QuasiNewton"),
        ("stochastic", "Growing"),
        ("stochastic", "Stochastic"),
    )
} | {"operators.Astra": "its package is not installed everywhere; the example is shown, not run"}


def test_every_public_name_has_an_example():
    missing = []
    for public in public_names():
        if isinstance(public.thing, (type, types.FunctionType)):
            own = vars(public.thing)["__doc__"] if isinstance(public.thing, type) else public.thing.__doc__
            examples = doctest.DocTestParser().get_examples(own or "")
            skipped = [e for e in examples if e.options.get(doctest.SKIP)]
            if len(skipped) == len(examples):
                missing.append(public.name)
    assert sorted(missing) == sorted(WITHOUT_EXAMPLE)


def test_the_root_is_small():
    modules = [path for path in PACKAGE.glob("*.py")]
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(modules) <= 22 and len(folders) <= 13, (sorted(modules), sorted(folders))
