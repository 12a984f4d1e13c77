"""Run Python in a process of its own: for what is decided at import, and for what might hang or crash."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import fastbn

ROOT = Path(__file__).parents[1]  # the source tree
UNDER_TEST = Path(fastbn.__file__).parents[1]  # the same, or where fastbn is installed
_DECIDES_AT_IMPORT = ("FASTBN_ISA", "OMP_NUM_THREADS")
TIME_LIMIT = 120  # seconds until a process counts as hanging


def run_python(code, *, check=True, **environment):
    """Return the CompletedProcess of `code`; fastbn's own variables come from `environment` only."""
    inherited = {key: value for key, value in os.environ.items() if key not in _DECIDES_AT_IMPORT}
    path = os.pathsep.join(filter(None, (str(UNDER_TEST), inherited.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=inherited | {"PYTHONPATH": path} | environment,
        cwd=tempfile.gettempdir(),  # not in the source tree, whose fastbn may not be compiled
        capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    if check and process.returncode:
        raise AssertionError(f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process
