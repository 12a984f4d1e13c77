"""Cache sizes, as the operating system reports them.

They decide how a result is written (through the cache or past it) and in which order the parts are visited,
never what is computed: bits do not depend on them.
"""

from pathlib import Path

_TYPICAL = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}  # where the system does not say


def read(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, int]:
    """Return the bytes of {"L1" (data), "L2", "L3"} that one core sees.

    Linux's /sys is asked, not sysconf: under virtualisation glibc reports the whole socket's L3 (320 MiB where
    the machine had 32).
    """
    sizes = dict(_TYPICAL)
    for index in Path(folder).glob("index*"):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind != "Instruction":
                sizes[f"L{level}"] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue  # a line that is not there or not understood leaves the typical size
    return sizes


_SIZES = read()
L1, L2, L3 = _SIZES["L1"], _SIZES["L2"], _SIZES["L3"]
