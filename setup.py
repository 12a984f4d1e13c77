"""Build the compiled room of fastbn: each kernel source once per instruction set.

Environment
-----------
FASTBN_OPENMP=0   build without OpenMP (one thread; everything else the same)
FASTBN_WERROR=1   make the compiler's warnings in our own headers errors (used by CI)
"""

import os
import platform
import tempfile
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CORE = "fastbn/_core"
KERNELS = ["kernels", "optim_kernels"]
PLAIN = ["check", "layout", "cpu", "openmp"]
# Contraction off: a*b + c must round twice on every CPU, or the bits would depend on the instruction set.
# errno and traps cost vectorisation and change no result; -ffast-math and -march=native are never used.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall", "-Wextra"]
# What Cython's generated C does as a matter of course
FLAGS += ["-Wno-unused-parameter", "-Wno-unused-function", "-Wno-missing-field-initializers"]
FLAGS += ["-Wno-sign-compare", "-Wno-unused-variable", "-Wno-cast-function-type"]
if os.environ.get("FASTBN_WERROR") == "1":
    FLAGS += ["-Werror"]
MACROS = [("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")]


def instruction_sets():
    """Return {name: flags}: three levels of x86-64, or the compiler's baseline elsewhere."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {level: [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")}
    return {"baseline": []}


def extension(name, source, flags=()):
    return Extension(
        f"fastbn._core.{name}",
        [f"{CORE}/{source}.pyx"],
        include_dirs=[CORE, np.get_include()],
        depends=sorted(str(header) for header in Path(CORE).glob("*.h")),
        define_macros=MACROS,
        extra_compile_args=[*FLAGS, *flags],
    )


def extensions():
    """What has no kernels at baseline flags; every kernel source once per instruction set."""
    built = cythonize([extension(name, name) for name in PLAIN], build_dir="build/cython/any")
    for level, flags in instruction_sets().items():
        modules = [extension(f"_{source}_{level}", source, flags) for source in KERNELS]
        built += cythonize(modules, build_dir=f"build/cython/{level}")  # apart: the C files share a name
    return built


class BuildKernels(build_ext):
    """build_ext that compiles in parallel and turns OpenMP on where the compiler has it."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        openmp = os.environ.get("FASTBN_OPENMP", "1") != "0" and self.has_openmp()
        if openmp:
            for module in self.extensions:
                module.extra_compile_args.append("-fopenmp")
                module.extra_link_args.append("-fopenmp")
        else:
            print("fastbn: building without OpenMP: every call will use one thread")
        self.force = self.force or self.options_changed(f"openmp={openmp} {FLAGS}")
        super().build_extensions()

    def options_changed(self, options):
        """Say whether build/ holds objects of other options: setuptools compares times, not flags."""
        stamp = Path(self.build_temp, "options.txt")
        changed = not stamp.exists() or stamp.read_text() != options
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(options)
        return changed

    def has_openmp(self):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.c")
            source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, "openmp", folder, extra_postargs=["-fopenmp"])
            except (CompileError, LinkError):
                return False
        return True


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
