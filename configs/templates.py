"""Job files for clusters to start from, with @NAME@ where a value of one's own belongs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from ..errors import UserError

_PLACE = re.compile(r"@([A-Z][A-Z_]*)@")
_LISTED = re.compile(r"^#   @([A-Z][A-Z_]*)@ .*\n", re.MULTILINE)  # where the header says what a place is for
# What would end the quotes around a value in bash, or mean something else there or in YAML.
_UNFIT = re.compile(r"""["'\\`;&|<>()#@\s]""")


def templates() -> dict[str, Path]:
    """Names and files of the templates inside the package."""
    folder = Path(str(resources.files("genkd.configs"))) / "cluster"
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".sbatch", ".yaml")}


def about(text: str) -> str:
    """The first sentence of a template's header."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if not line.startswith("#!")]
    return " ".join(lines).split(". ")[0].split(": ")[0]


def places(text: str) -> list[str]:
    """The names that stand for values of one's own, in the order of the header, which lists them all."""
    listed = _LISTED.findall(text)
    assert set(listed) == set(_PLACE.findall(text)), "a header lists each place of its template"
    return listed


def fill(name: str, values: Iterable[str] = ()) -> str:
    """The text of a template, with some or all of its places filled by "NAME=VALUE" texts.

    Raises UserError for a template or a place that there is not, and for a value that its quotes would not hold.
    """
    known = templates()
    if name not in known:
        raise UserError(f"no template {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
    text = known[name].read_text(encoding="utf-8")
    names = places(text)
    for given in values:
        place, separator, value = given.partition("=")
        if not separator or not value:
            raise UserError(f"{given!r} is not of the form NAME=VALUE; {name} has {', '.join(names)}")
        if place not in names:
            raise UserError(f"{name} has no {place!r}{_nearest(place, names)}; it has {', '.join(names)}")
        if found := _UNFIT.search(value):
            raise UserError(
                f"{place}={value!r} has {found[0]!r} in it, which a template cannot hold; edit the file instead"
            )
        text = re.sub(rf"^#   @{place}@ .*\n", "", text, flags=re.MULTILINE)
        text = text.replace(f"@{place}@", value)
    return text if _PLACE.search(text) else text.replace("# Fill in:\n#\n", "")


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else ""
