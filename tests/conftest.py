"""Hypothesis profiles: "dev", quick and exploring; "ci", longer; "few", for sanitizers and emulators.

HYPOTHESIS_PROFILE chooses one, else whether CI is set. Where it is, each run has the same examples: what fails there
has failed for a change.
"""

import os

from hypothesis import HealthCheck, settings

CI = bool(os.environ.get("CI"))
# Examples are arrays of up to 10⁵ values on machines of any speed: their time says nothing about the library.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": CI, "print_blob": CI}
for name, examples in (("few", 8), ("dev", 60), ("ci", 200)):
    settings.register_profile(name, max_examples=examples, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if CI else "dev"))
