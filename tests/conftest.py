"""Hypothesis profiles: "dev", quick and exploring; "ci", longer and the same on every run; "few". HYPOTHESIS_PROFILE
chooses, else whether CI is set."""

import os

from hypothesis import HealthCheck, settings

# Examples are arrays of up to 10⁵ values on machines of any speed: their time says nothing about the library.
settings.register_profile("dev", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), max_examples=200, derandomize=True, print_blob=True)
settings.register_profile("few", settings.get_profile("dev"), max_examples=8)  # under sanitizers and emulators
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
