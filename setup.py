"""Build the compiled room of fastbn: each kernel source once per instruction set.

Environment
-----------
FASTBN_OPENMP=0   build without OpenMP (one thread; everything else the same)
FASTBN_WERROR=1   make the compiler's warnings in our own headers errors (used by CI)

For tests of the library itself, each much slower:

FASTBN_SANITIZE=1        AddressSanitizer and UndefinedBehaviorSanitizer (checks/sanitize)
FASTBN_SANITIZE=thread   ThreadSanitizer (checks/races)
FASTBN_BOUNDSCHECK=1     Cython's checks of indices, and ours of pointers into arrays (checks/bounds)
FASTBN_LEVELS=v4         of x86-64's instruction sets these alone, for the quick checks
"""

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CORE = "fastbn/_core"
KERNELS = ["kernels", "optim_kernels"]
PLAIN = ["buffers", "check", "layout", "state", "cpu", "openmp"]
# Contraction off: a*b + c must round twice on every CPU, or the bits would depend on the instruction set.
# errno and traps cost vectorisation and change no result; -ffast-math and -march=native are never used.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall", "-Wextra"]
# What Cython's generated C does as a matter of course
FLAGS += ["-Wno-unused-parameter", "-Wno-unused-function", "-Wno-missing-field-initializers"]
FLAGS += ["-Wno-sign-compare", "-Wno-unused-variable", "-Wno-cast-function-type"]
if os.environ.get("FASTBN_WERROR") == "1":
    FLAGS += ["-Werror"]
# A sanitizer that finds something ends the process: nothing can pass by it
SANITIZERS = {
    "0": [],
    "1": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZE = SANITIZERS[os.environ.get("FASTBN_SANITIZE") or "0"]
if SANITIZE:
    FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
CHECKED = os.environ.get("FASTBN_BOUNDSCHECK") == "1"
DIRECTIVES = {"boundscheck": CHECKED, "wraparound": CHECKED}  # a source may say otherwise
# How to compile and link OpenMP: GCC and clang; Apple's clang, for which libomp is installed apart; clang-cl
OPENMP = {
    "linux": [(["-fopenmp"], ["-fopenmp"])],
    "darwin": [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])],
    "win32": [(["/openmp"], ["libomp.lib"])],
}
MACROS = [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")]
if sys.platform == "darwin":
    # Python from python.org would compile for both architectures at once; -march and libomp are of one
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
if CHECKED:
    MACROS += [("FASTBN_CHECKED", "1")]


def instruction_sets():
    """Return {name: flags}: three levels of x86-64, or the compiler's baseline elsewhere."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        levels = os.environ.get("FASTBN_LEVELS", "v2 v3 v4").split()
        return {level: [f"-march=x86-64-{level}"] for level in levels}
    return {"baseline": []}


def extension(name, source, flags=()):
    return Extension(
        f"fastbn._core.{name}",
        [f"{CORE}/{source}.pyx"],
        include_dirs=[CORE, np.get_include()],
        depends=sorted(str(header) for header in Path(CORE).glob("*.h")),
        define_macros=MACROS,
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=[*SANITIZE],
    )


def extensions():
    """What has no kernels at baseline flags; every kernel source once per instruction set."""
    built = generated([extension(name, name) for name in PLAIN], "any")
    for level, flags in instruction_sets().items():
        modules = [extension(f"_{source}_{level}", source, flags) for source in KERNELS]
        built += generated(modules, level)  # apart: the C files share a name
    return built


def generated(modules, folder):
    """Cythonize; what is made with other directives goes elsewhere, for Cython compares times alone."""
    kind = "cython-checked" if CHECKED else "cython"
    return cythonize(modules, build_dir=f"build/{kind}/{folder}", compiler_directives=DIRECTIVES)


class BuildKernels(build_ext):
    """build_ext that compiles in parallel and turns OpenMP on where the compiler has it."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        if self.compiler.compiler_type == "msvc":
            self.use_clang_cl()
        openmp = None if os.environ.get("FASTBN_OPENMP") == "0" else self.openmp_flags()
        if openmp is None:
            print("fastbn: building without OpenMP: every call will use one thread")
        for module in self.extensions if openmp else ():
            module.extra_compile_args += openmp[0]
            module.extra_link_args += openmp[1]
        # setuptools compares times, not flags: build/ may hold objects of other options, or of no build that ended
        options = f"{self.compiler.compiler_type} {os.environ.get('CC')} openmp={openmp} {FLAGS} {DIRECTIVES}"
        built = Path(self.build_temp, "options.txt")
        self.force = self.force or not built.exists() or built.read_text() != options
        built.unlink(missing_ok=True)
        super().build_extensions()
        built.parent.mkdir(parents=True, exist_ok=True)
        built.write_text(options)

    def use_clang_cl(self):
        """Compile by LLVM's clang-cl: Microsoft's compiler lacks the kernels' vector extensions."""
        compiler = shutil.which("clang-cl")
        if compiler is None:
            raise CompileError("clang-cl: expected on PATH, which LLVM for Windows brings; got no such command")
        self.compiler.initialize()
        self.compiler.cc = compiler
        self.compiler.add_library_dir(str(Path(compiler).parents[1] / "lib"))  # libomp
        for module in self.extensions:
            module.extra_compile_args = [f"/clang:{flag}" for flag in module.extra_compile_args]

    def openmp_flags(self):
        """Return the first of OPENMP that compiles and links here, None if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.c")
            source.write_text("#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n")
            for compile_flags, link_flags in OPENMP.get(sys.platform, OPENMP["linux"]):
                try:
                    objects = self.compiler.compile([str(source)], folder, extra_postargs=compile_flags)
                    library = str(Path(folder, "openmp.so"))
                    self.compiler.link_shared_object(objects, library, extra_postargs=link_flags)
                except (CompileError, LinkError):
                    continue
                return compile_flags, link_flags
        return None


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
