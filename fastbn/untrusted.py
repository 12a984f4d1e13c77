"""What holds for every file that nobody vouches for: what it may grow to, and how its names are shown."""

from __future__ import annotations

import zipfile
from pathlib import PurePosixPath

LARGEST_SMALL = 1 << 28  # bytes that the contents of any file may grow to; those of a larger one to GROWTH times itself
GROWTH = 100
MEMBERS = 1 << 16  # of an archive


def check_archive(archive: zipfile.ZipFile, most: int) -> None:
    """Raise ValueError where a zip archive grows to more than `most` bytes, or has what no model's archive has.

    bzip2 and LZMA are refused since zipfile decompresses them without a bound; two members of one name since one of
    them would be lost; names that lead out of a folder since whoever unpacks the archive might follow them.
    """
    members = archive.infolist()
    if len(members) > MEMBERS:
        raise ValueError(f"it has {len(members):,} members")
    if (size := sum(member.file_size for member in members)) > most:
        raise ValueError(f"it would grow to {size:,} bytes")
    seen = set()
    for member in members:
        name = member.filename
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or not path.parts or name[1:2] == ":":
            raise ValueError(f"the member {name!r} would be outside")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"the member {name!r} is neither stored nor deflated")
        if name in seen:
            raise ValueError(f"the member {name!r} is there twice")
        seen.add(name)


def printable(text: str) -> str:
    """Return a text in which what would move a terminal's cursor, or turn its letters around, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
