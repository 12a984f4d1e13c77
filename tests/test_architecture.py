"""The house: imports go down only, NumPy alone comes along, what is public is documented, stubs are true."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
from interpreter import run_python

import fastbn
from fastbn._core import dispatch

PACKAGE = Path(__file__).parents[1] / "fastbn"  # the source tree: what is installed has no .pyx

# From the top; a module imports from the rows below its own, and within its own sub-package.
ROWS = [
    {"__main__"},
    {"cli"},
    {"demo", "interop"},
    {"nn"},
    {"layer", "fold", "optim", "preprocessing", "config"},
    {"affine"},
    {"norm", "schedules"},
    {"paths"},
    {"threads", "interrupts", "untrusted"},
    {"_core"},
    {"_version"},
]
LEVEL = {part: -i for i, row in enumerate(ROWS) for part in row}
SUBPACKAGES = {"_core", "nn", "interop"}
CORE_ROWS = [
    {"dispatch"}, {"kernels", "optim_kernels"}, {"layout"}, {"buffers", "check", "caches", "openmp", "cpu", "state"},
]  # fmt: skip
CORE_LEVEL = {f"_core.{part}": -i for i, row in enumerate(CORE_ROWS) for part in row}

# Where extras are used: inside a function, except in a module that is an extra as a whole.
FOREIGN = {"demo": {"matplotlib", "rich", "sklearn", "threadpoolctl"}, "nn.progress": {"rich"}}


def module_name(path):
    """`nn.layers` for fastbn/nn/layers.py, `nn` for fastbn/nn/__init__.py, "" for fastbn/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
COMPILED = {module_name(path): path for path in sorted(PACKAGE.rglob("*.pyx"))}
MODULES = SOURCES | COMPILED


class Import:
    """One name of one import statement: `target` is a module of fastbn, or `foreign` a package besides it."""

    def __init__(self, line, target=None, foreign=None, at_import=True):
        self.line, self.target, self.foreign, self.at_import = line, target, foreign, at_import


def resolve(importer, is_package, level, module, name, line, at_import):
    """The import `from <level dots><module> import <name>` in a module of fastbn."""
    if level == 0:
        root, _, rest = module.partition(".")
        if root != "fastbn":
            return Import(line, foreign=root, at_import=at_import)
        base = rest
    else:
        parents = importer.split(".") if importer else []
        up = level - 1 if is_package else level
        assert up <= len(parents), f"{importer}:{line} leaves the package"
        base = ".".join([*parents[: len(parents) - up], *filter(None, [module])])
    inner = ".".join(filter(None, [base, name]))
    return Import(line, target=inner if inner in MODULES else base, at_import=at_import)


def imports_of_python(name, path):
    """Yield every import of a file, those inside functions too."""
    is_package = path.name == "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield resolve(name, is_package, 0, alias.name, None, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield resolve(
                    name, is_package, node.level, node.module or "", alias.name, node.lineno, at_import
                )


CYTHON_IMPORT = re.compile(
    r"^\s*(?:from\s+(\.*)([\w.]*)\s+c?import\s+(.+)|c?import\s+([\w.]+))", re.MULTILINE
)


def imports_of_cython(name, path):
    """Yield every import and cimport of a .pyx file; its own C headers are not imports."""
    text = path.read_text(encoding="utf-8")
    for match in CYTHON_IMPORT.finditer(text):
        dots, module, names, plain = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if plain:
            yield resolve(name, False, 0, plain, None, line, True)
            continue
        for part in names.strip("()").split(","):
            yield resolve(name, False, len(dots), module, part.split()[0], line, True)


def imports_of(name):
    path = MODULES[name]
    return list((imports_of_cython if path.suffix == ".pyx" else imports_of_python)(name, path))


def part_of(module):
    return module.partition(".")[0]


# ---- arrows ------------------------------------------------------------------------------------------------


def test_every_part_has_its_row():
    assert {part_of(name) for name in MODULES} - {""} <= LEVEL.keys()
    assert {"_core", "norm", "threads", "layer", "fold", "nn"} <= {part_of(name) for name in MODULES}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_down_only(name):
    for found in imports_of(name):
        if found.target is None:
            continue
        own, other = part_of(name), part_of(found.target)
        where = f"{name}, line {found.line}: {found.target or 'fastbn'}"
        assert other, f"{where} is the top, which imports everything"
        if own == other and own in SUBPACKAGES:
            continue
        assert LEVEL[other] < LEVEL[own], where


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("_core.")])
def test_inside_the_core_imports_go_down_too(name):
    for found in imports_of(name):
        if found.target is not None:
            where = f"{name}, line {found.line}: {found.target}"
            assert found.target in CORE_LEVEL, where
            assert CORE_LEVEL[found.target] < CORE_LEVEL[name], where


def test_imports_have_no_cycle():
    """At import time: what a function imports later cannot bite, nor its own package's __init__ a module."""
    arrows = {
        name: {i.target for i in imports_of(name) if i.target and i.at_import and i.target != part_of(name)}
        for name in MODULES
    }
    done, path = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        path.append(name)
        for target in sorted(arrows[name]):
            visit(target)
        done.add(path.pop())

    for name in arrows:
        visit(name)
    assert done == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_foreign_imports_are_the_standard_library_and_numpy(name):
    allowed = FOREIGN.get(name, set())
    cython = {"cython", "libc", "libcpp", "cpython"} if name in COMPILED else set()
    for found in imports_of(name):
        if found.foreign is None or found.foreign in sys.stdlib_module_names | {"numpy"} | cython:
            continue
        where = f"{name or 'fastbn'}, line {found.line}: {found.foreign}"
        if part_of(name) == "interop":
            assert "." in name, where
            continue
        assert found.foreign in allowed, where
        assert not found.at_import or name == "demo", f"{where} at import"


def test_the_imports_of_this_test_are_read_as_python_reads_them():
    """The reader above finds what there is: one arrow of each kind that the package has for certain."""
    assert "norm" in {i.target for i in imports_of("layer")}
    assert "_core.check" in {i.target for i in imports_of("norm")}
    assert "_core.dispatch" in {i.target for i in imports_of("norm")}
    assert "_core.cpu" in {i.target for i in imports_of("_core.dispatch")}
    assert "_core.caches" in {i.target for i in imports_of("_core.kernels")}
    assert {"layer", "preprocessing", "nn.base"} <= {i.target for i in imports_of("nn.layers")}
    assert "numpy" in {i.foreign for i in imports_of("_core.kernels")}
    late = [i for i in imports_of("nn.progress") if i.foreign == "rich"]
    assert late
    assert not any(i.at_import for i in late)


# ---- what `import fastbn` brings ---------------------------------------------------------------------------

NEW_MODULES = """
    import sys
    import numpy
    before = set(sys.modules)
    import fastbn
    print(*sorted(set(sys.modules) - before))
"""


def test_importing_fastbn_imports_numpy_and_nothing_else_foreign():
    new = run_python(NEW_MODULES).stdout.split()
    roots = {name.partition(".")[0] for name in new}
    assert "fastbn" in roots
    made_by_cython = {name for name in roots if name == "cython_runtime" or name.startswith("_cython_")}
    assert roots - sys.stdlib_module_names - made_by_cython == {"fastbn"}
    assert not [name for name in new if name.startswith(("fastbn.cli", "fastbn.demo", "fastbn.interop"))]


def test_importing_fastbn_starts_no_thread_and_writes_nothing():
    code = "import threading, fastbn; assert threading.active_count() == 1"
    process = run_python(code)
    assert (process.stdout, process.stderr) == ("", "")


def test_importing_fastbn_leaves_the_floating_point_state():
    """No flush to zero: a library linked with -ffast-math would switch it on for the whole process."""
    code = """
        import numpy as np
        import fastbn
        tiny = np.array([1e-310, 3.0])
        half = tiny / 2
        assert half[0] == 5e-311 and float(tiny[0]) * 0.5 > 0
        fastbn.batch_norm_train(np.full((600, 64), 1e-40, np.float32), num_threads=2)
        assert (tiny / 2)[0] == 5e-311
        assert (np.array([1e-40, 3], np.float32) / np.float32(2))[0] > 0
    """
    run_python(code)


# ---- what is public ----------------------------------------------------------------------------------------


def test_every_public_name_is_there_once_and_sorted_out():
    assert len(set(fastbn.__all__)) == len(fastbn.__all__)
    assert [name for name in fastbn.__all__ if not hasattr(fastbn, name)] == []
    namespace = {}
    exec("from fastbn import *", namespace)
    assert set(fastbn.__all__) <= namespace.keys()


def test_what_is_public_at_the_top_is_public_where_it_lives():
    for name in fastbn.__all__:
        thing = getattr(fastbn, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            home = importlib.import_module(thing.__module__)
            assert name in getattr(home, "__all__", [name]), f"{thing.__module__}.__all__ lacks {name}"


def test_public_modules_have_docstrings_and_their_names_exist():
    modules = [
        getattr(fastbn, name) for name in fastbn.__all__ if inspect.ismodule(getattr(fastbn, name, None))
    ]
    assert fastbn.nn in modules
    for module in [fastbn, *modules]:
        assert module.__doc__
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        things = [getattr(module, name) for name in module.__all__]
        assert [t for t in things if (inspect.isfunction(t) or inspect.isclass(t)) and not t.__doc__] == []


SECTIONS = [
    "Parameters",
    "Attributes",
    "Returns",
    "Yields",
    "Raises",
    "Warns",
    "See Also",
    "Notes",
    "References",
    "Examples",
]


def sections_of(text):
    """Summary and {section: body} of a numpydoc docstring; a section's title is underlined to its length."""
    lines = inspect.cleandoc(text).splitlines()
    starts = [i for i, line in enumerate(lines[1:]) if line and set(line) == {"-"} and lines[i].strip()]
    found = {}
    for k, i in enumerate(starts):
        title, underline = lines[i], lines[i + 1]
        assert title in SECTIONS, f"no section of numpydoc: {title!r}"
        assert len(title) == len(underline), f"{title!r} is not underlined to its length"
        assert title not in found, f"{title!r} twice"
        end = starts[k + 1] if k + 1 < len(starts) else len(lines)
        found[title] = "\n".join(lines[i + 2 : end]).strip("\n")
    return lines[0], found


def documented(body):
    """Names of a Parameters or Attributes section: `a, b : type` and `*args` alike."""
    names = []
    for line in body.splitlines():
        if line and not line.startswith(" "):
            names += [name.strip().lstrip("*") for name in line.split(" : ")[0].split(",")]
    return names


MADE_BY_FASTBN = {"Saved", "Gradients"}  # nobody else constructs them
CALLABLES = [name for name in fastbn.__all__ if callable(getattr(fastbn, name, None))]
CLASSES = [name for name in CALLABLES if inspect.isclass(getattr(fastbn, name))]


def test_there_are_public_functions_and_classes():
    assert {"batch_norm_train", "BatchNorm", "num_threads", "fold_conv"} <= set(CALLABLES)


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_are_numpydoc(name):
    thing = getattr(fastbn, name)
    text = thing.__doc__
    assert text, "no docstring"
    summary, sections = sections_of(text)
    assert summary.strip() == summary != ""
    assert re.match(r"[A-ZΑ-Ω\"`(]", summary), summary
    paragraph = inspect.cleandoc(text).split("\n\n")[0].replace("\n", " ")
    assert paragraph.endswith((".", ":")) or ". " in paragraph or ": " in paragraph, paragraph
    assert list(sections) == sorted(sections, key=SECTIONS.index), "sections out of numpydoc's order"
    assert all(body.strip() for body in sections.values()), "an empty section"
    if "Examples" in sections:
        assert ">>> " in sections["Examples"]


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_name_the_parameters_there_are(name):
    thing = getattr(fastbn, name)
    _, sections = sections_of(thing.__doc__)
    expected = list(inspect.signature(thing).parameters)
    if "Parameters" in sections:
        assert sorted(documented(sections["Parameters"])) == sorted(expected)
    else:
        assert name in MADE_BY_FASTBN or not expected, (
            f"no Parameters section; there are {', '.join(expected)}"
        )


@pytest.mark.parametrize("name", CLASSES)
def test_documented_attributes_exist(name):
    thing = getattr(fastbn, name)
    _, sections = sections_of(thing.__doc__)
    if "Attributes" not in sections:
        return
    source = ast.parse(inspect.getsource(thing))
    assigned = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for attribute in documented(sections["Attributes"]):
        declared = inspect.get_annotations(thing)
        assert attribute in assigned or attribute in declared or hasattr(thing, attribute), attribute


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_docstrings(name):
    thing = getattr(fastbn, name)
    for attribute, member in vars(thing).items():
        if not attribute.startswith("_") and callable(getattr(thing, attribute)):
            assert inspect.getdoc(member), attribute


# ---- stubs and compiled modules ----------------------------------------------------------------------------

STUBS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.pyi"))}


def modules_of(source):
    """The compiled modules of a .pyx: itself, or one per instruction set."""
    folder, _, stem = source.rpartition(".")
    names = [f"fastbn.{source}", *(f"fastbn.{folder}._{stem}_{isa}" for isa in dispatch.available())]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name) is not None]


def test_every_compiled_module_has_a_stub_and_every_stub_a_module():
    assert STUBS.keys() == COMPILED.keys()
    assert all(modules_of(source) for source in STUBS)


def public_names(module):
    """Functions and classes that a compiled module defines itself."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and callable(thing)
        and getattr(thing, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("source", STUBS)
def test_a_stub_lists_exactly_the_functions_of_its_module(source):
    tree = ast.parse(STUBS[source].read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    values = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    for module in modules_of(source):
        found = public_names(module)
        assert found.keys() == functions.keys() | classes.keys(), module.__name__
        assert {name for name, thing in found.items() if inspect.isclass(thing)} == classes.keys()
        assert all(hasattr(module, name) for name in values), module.__name__
        for name, node in functions.items():
            assert arguments_of(node) == signature_of(found[name]), f"{module.__name__}.{name}"
        for name, node in classes.items():
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            methods = {name for name in methods if not name.startswith("__")}
            attributes = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            assert {m for m in vars(found[name]) if not m.startswith("_")} == methods | attributes, (
                f"{module.__name__}.{name}"
            )


def arguments_of(node):
    arguments = node.args
    found = (*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg)
    return [a.arg for a in found if a is not None]


def signature_of(function):
    return list(inspect.signature(function).parameters)


def test_the_typed_marker_is_there():
    assert (PACKAGE / "py.typed").exists()


def test_every_package_is_shipped():
    """A folder that pyproject.toml forgets works here and is missing from the wheel."""
    tomllib = pytest.importorskip("tomllib")
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("no source tree: fastbn is installed")
    shipped = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")}
    assert set(shipped) == {".".join(folder.parts) for folder in folders}
