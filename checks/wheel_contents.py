"""What is in the sdist and in the repaired wheel; for checks/wheel, in an environment with auditwheel (pyelftools).

    wheel_contents.py sdist UNPACKED CHECKOUT
    wheel_contents.py wheel FILE.whl PATH_OF_THIS_MACHINE...
"""

import io
import re
import sys
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

LARGEST = 3_000_000  # bytes of a wheel
FOLDERS = [".github", "bench", "checks", "docs", "fastbn", "licenses", "tests"]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", ".ci/run"]
FILES += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
BUILT = {".so", ".c", ".o", ".pyc", ".pyd", ".html"}
SYSTEM_LIBRARIES = re.compile(r"(libc\.so\.6|libm\.so\.6|libpthread\.so\.0|libdl\.so\.2|ld-linux-.*)$")
LICENCES = {"LICENSE": "BSD 3-Clause", "licenses/libgomp.txt": "GCC RUNTIME LIBRARY EXCEPTION"}
IN_PACKAGE = (".py", ".pyi", ".so", "py.typed")
# Where things are built: nothing in a binary may name such a folder
BUILD_PATHS = re.compile(rb"/(?:tmp|root|home|project|usr/src|opt|build)/[\w.+/-]{2,}")


def sdist(unpacked, checkout):
    """Compare with the checkout: what it takes to build, test and read is there, and nothing that was built."""
    wanted = {path.relative_to(checkout).as_posix() for name in FOLDERS for path in files(Path(checkout, name))}
    there = {path.relative_to(unpacked).as_posix() for path in files(Path(unpacked))}
    missing = sorted((wanted | set(FILES)) - there)
    assert not missing, f"the sdist lacks {', '.join(missing)}"
    built = sorted(path.name for path in Path(unpacked).rglob("*") if path.suffix in BUILT)
    assert not built, f"the sdist has what was built: {', '.join(built)}"
    print(f"sdist: {len(there)} files, all {len(wanted) + len(FILES)} that belong in it")


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix not in BUILT]


def wheel(path, paths_of_this_machine):
    size = Path(path).stat().st_size
    assert size < LARGEST, f"{path}: expected less than {LARGEST} bytes, got {size}"
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    strays = [name for name in contents if name.startswith("fastbn/") and not name.endswith(IN_PACKAGE)]
    assert not strays, f"in the package, but of no use there: {', '.join(strays)}"

    for licence, words in LICENCES.items():
        found = [name for name in contents if name.endswith(f".dist-info/licenses/{licence}")]
        assert found, f"the wheel lacks {licence}"
        assert words in contents[found[0]].decode(), f"{licence}: expected the words {words!r}"

    bundled = {Path(name).name for name in contents if name.startswith("fastbn.libs/")}
    assert len(bundled) == 1, f"fastbn.libs: expected one OpenMP runtime, got {bundled or 'nothing'}"
    assert all(re.fullmatch(r"libgomp-[0-9a-f]{8}\.so\.1\.0\.0", name) for name in bundled), bundled
    binaries = {name: data for name, data in contents.items() if data[:4] == b"\x7fELF"}
    for name, data in binaries.items():
        binary(name, data, bundled, [path.encode() for path in paths_of_this_machine if len(path) > 1])
    print(f"wheel: {size} bytes, {len(contents)} files, {len(binaries)} binaries, bundled {', '.join(bundled)}")


def binary(name, data, bundled, paths_of_this_machine):
    """Stripped, no executable stack, relocations read-only, no library but the system's and the bundled, no paths."""
    elf = ELFFile(io.BytesIO(data))
    segments = {segment["p_type"]: segment for segment in elf.iter_segments()}
    assert "PT_GNU_RELRO" in segments, f"{name}: no RELRO"
    assert "PT_GNU_STACK" in segments, f"{name}: PT_GNU_STACK is missing, the stack would be executable"
    assert not segments["PT_GNU_STACK"]["p_flags"] & 1, f"{name}: executable stack"
    left = [s.name for s in elf.iter_sections() if s.name == ".symtab" or s.name.startswith(".debug")]
    assert not left, f"{name}: not stripped, has {', '.join(left)}"

    tags = [tag for s in elf.iter_sections() if isinstance(s, DynamicSection) for tag in s.iter_tags()]
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    foreign = {library for library in needed - bundled if not SYSTEM_LIBRARIES.match(library)}
    assert not foreign, f"{name}: needs {', '.join(foreign)} from elsewhere"
    runpaths = [getattr(tag, "runpath", None) or getattr(tag, "rpath", None) for tag in tags]
    runpaths = [path for path in runpaths if path]
    assert all(path.startswith("$ORIGIN") for path in runpaths), f"{name}: loads from {runpaths}"
    if "kernels" in name:
        assert needed & bundled, f"{name}: without OpenMP"

    paths = {match.decode() for match in BUILD_PATHS.findall(data)}
    paths |= {path.decode() for path in paths_of_this_machine if path in data}
    assert not paths, f"{name}: names {', '.join(sorted(paths))}"


if __name__ == "__main__":
    what, first, *others = sys.argv[1:]
    if what == "sdist":
        sdist(first, *others)
    else:
        wheel(first, others)
