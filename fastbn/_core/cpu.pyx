# cython: language_level=3, freethreading_compatible=True
"""CPU features, read at import; compiled with baseline flags so that any CPU can ask."""

cdef extern from "cpu.h" nogil:
    int fastbn_x86_level()


def x86_level():
    """Return the x86-64 level (1 to 4) that this CPU and operating system run; 0 on other architectures."""
    return fastbn_x86_level()
