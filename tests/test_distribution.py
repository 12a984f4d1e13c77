"""What is shipped: no build for one machine alone, licences of what wheels bundle, one version, every Python and
system. Read from the source tree; `checks/wheel` builds the sdist and the wheel and looks into them.
"""

import fnmatch
import importlib.metadata
import re

import pytest
from interpreter import ROOT

import fastbn

if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PYTHONS = ["310", "311", "312", "313", "314"]
MINIMUM = re.compile(r"^[A-Za-z0-9_-]+(\[[a-z,]+\])?>=[0-9.]+(,!=[0-9.]+(\.\*)?)*$")


def without_comments(text):
    return "\n".join(line.partition("#")[0] for line in text.splitlines())


# ---- what it is compiled with --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml", ".ci/run", "checks/wheel"])
def test_nothing_is_compiled_for_the_machine_at_hand(name):
    text = without_comments((ROOT / name).read_text(encoding="utf-8"))
    assert not re.search(r"-m(arch|tune|cpu)=native|-ffast-math|-Ofast|-funsafe-math", text)


def test_workflows_compile_as_setup_py_says():
    assert {"tests", "wheels", "checks"} <= WORKFLOWS.keys()
    for name, text in WORKFLOWS.items():
        assert not re.search(r"native|fast-math|CFLAGS", text), name


def test_every_check_runs_in_its_long_form_every_week_and_in_its_quick_one_in_ci():
    helpers = {"debian", "sources", "fuzz_files.py", "wheel_contents.py", "wheel_installed.py"}
    checks = {path.name for path in (ROOT / "checks").iterdir() if path.is_file()} - helpers
    (weekly,) = re.findall(r"check: \[(.*)\]", WORKFLOWS["checks"])
    assert set(weekly.split(", ")) == checks
    ci, page = ((ROOT / name).read_text(encoding="utf-8") for name in (".ci/run", "docs/promises.md"))
    for name in checks:
        assert re.search(rf"\b{re.escape(name)}\b", ci), name
        assert re.search(rf"^checks/{re.escape(name)} ", page, re.M), name


# ---- metadata ------------------------------------------------------------------------------------------------------


def test_the_version_has_one_source():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastbn._version.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", fastbn.__version__)
    assert f"## {fastbn.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_extras_ask_for_the_oldest_safe_versions():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\w+) \| ([\d.]+)(?:, not (.*?))? \|", text, re.M)
    assert {"onnx", "torch", "keras", "protobuf"} <= {name for name, *_ in table}
    asked = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    for name, least, without in table:
        clauses = [f">={least}", *(f"!={version}" for version in without.split(" or ") if version)]
        assert f"{name}{','.join(clauses)}" in asked


def test_what_is_installed_has_that_version():
    try:
        installed = importlib.metadata.version("fastbn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place")
    assert installed == fastbn.__version__


def test_the_licences_of_bundled_runtimes_are_shipped():
    assert PROJECT["license"] == "BSD-3-Clause"
    shipped = {path.relative_to(ROOT).as_posix() for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)}
    assert shipped == {"LICENSE", "licenses/libgomp.txt", "licenses/libomp.txt"}
    gomp, omp = ((ROOT / "licenses" / f"{name}.txt").read_text(encoding="utf-8") for name in ("libgomp", "libomp"))
    for part in ("GCC RUNTIME LIBRARY EXCEPTION", "GNU GENERAL PUBLIC LICENSE", "END OF TERMS AND CONDITIONS"):
        assert part in gomp
    for part in ("Apache License", "END OF TERMS AND CONDITIONS", "LLVM Exceptions to the Apache 2.0 License"):
        assert part in omp


def requirements():
    for extra, needed in PROJECT["optional-dependencies"].items():
        yield from ((f"extra {extra}", requirement) for requirement in needed)
    yield from (("dependencies", requirement) for requirement in PROJECT["dependencies"])
    yield from (("build", requirement) for requirement in PYPROJECT["build-system"]["requires"])


@pytest.mark.parametrize(("where", "requirement"), list(requirements()))
def test_every_requirement_has_a_least_version_and_no_upper_one(where, requirement):
    assert MINIMUM.match(requirement), f"{where}: expected name>=version, got {requirement}"


def test_numpy_is_built_against_and_needed_alike():
    assert PROJECT["dependencies"] == ["numpy>=2.0"]
    assert "numpy>=2.0" in PYPROJECT["build-system"]["requires"]


# ---- wheels --------------------------------------------------------------------------------------------------------


def builds(pattern):
    """The patterns of cibuildwheel, braces expanded."""
    before, _, rest = pattern.partition("{")
    choices, _, after = rest.partition("}")
    return [before + choice + after for choice in choices.split(",")]


def test_wheels_are_built_for_every_python_and_system():
    configuration = PYPROJECT["tool"]["cibuildwheel"]
    patterns = builds(configuration["build"])
    oldest = PROJECT["requires-python"].removeprefix(">=3.")
    assert PYTHONS[0] == f"3{oldest}"
    for python in PYTHONS:
        for system in ("manylinux_x86_64", "manylinux_aarch64", "macosx_x86_64", "macosx_arm64", "win_amd64"):
            identifier = f"cp{python}-{system}"
            assert any(fnmatch.fnmatch(identifier, pattern) for pattern in patterns), identifier
            assert not fnmatch.fnmatch(identifier, configuration["skip"]), identifier
    assert "universal2" not in str(configuration), "kernels are built for the architecture at hand"


def test_wheels_are_tested_as_installed():
    configuration = PYPROJECT["tool"]["cibuildwheel"]
    assert configuration["test-extras"] == ["test"]
    tests = re.findall(r"\S+\.py", configuration["test-command"])
    assert "tests/test_norm.py" in tests
    assert [name for name in tests if not (ROOT / name).exists()] == []
    assert not {"fastbn", "."} & set(configuration["test-sources"]), "the package must come from the wheel"


def test_every_system_has_a_runner():
    (runners,) = re.findall(r"os: \[(ubuntu.*windows.*)\]", WORKFLOWS["wheels"])
    assert [name.split("-")[0] for name in runners.split(", ")] == ["ubuntu", "ubuntu", "macos", "macos", "windows"]
    (pythons,) = re.findall(r'python: \[("3\.10".*)\]', WORKFLOWS["tests"])
    assert [version.strip('"').replace(".", "") for version in pythons.split(", ")] == PYTHONS


# ---- publishing ----------------------------------------------------------------------------------------------------


def jobs(text):
    """The text of each job of a workflow, by name; what comes before the first is under None."""
    head, _, body = text.partition("\njobs:\n")
    parts = re.split(r"^  (\w+):\n", body, flags=re.MULTILINE)
    return {None: head} | dict(zip(parts[1::2], parts[2::2], strict=True))


def test_only_publishing_may_write_and_only_from_a_tag():
    for name, text in WORKFLOWS.items():
        parts = jobs(text)
        assert re.search(r"^permissions:\n  contents: read\n\n", parts[None], re.MULTILINE), name
        for job, part in parts.items():
            may_write = "write" in without_comments(part)
            assert may_write == ((name, job) == ("wheels", "publish")), f"{name}, {job}"
    publish = jobs(WORKFLOWS["wheels"])["publish"]
    assert re.search(r"permissions:\n      id-token: write\n    steps", publish)
    assert "name: pypi" in publish
    assert re.search(r"pypa/gh-action-pypi-publish@[0-9a-f]{40}  # v", publish)  # no tag that moves
    assert "github.ref_type == 'tag'" in publish
    assert "needs: [sdist, wheels]" in publish


def test_workflows_hold_no_secret_and_name_versions_of_actions():
    for name, text in WORKFLOWS.items():
        assert "secrets." not in text, name
        assert "password" not in without_comments(text), name
        actions = re.findall(r"uses: (\S+)", text)
        assert actions
        assert [action for action in actions if not re.search(r"@(v\d+|[0-9a-f]{40})$", action)] == []
        checkouts = text.count("actions/checkout@")
        assert checkouts == text.count("persist-credentials: false"), name
