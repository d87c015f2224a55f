"""Finds an interpreter that has a peer's packages: genkd's own, or one made for the peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UserError

# Another interpreter to look for the peers' packages in, where they cannot share genkd's environment.
PEERS_PYTHON = "GENKD_BENCH_PYTHON"


class Entry(NamedTuple):
    """A contender of a script of contenders, its job for that script, and the interpreter that has its packages."""

    contender: str
    job: Any
    python: str = sys.executable


def find_peer(script: str, contender: str, environment: Mapping[str, str]) -> tuple[str, dict[str, str]] | str:
    """The interpreter for which `script CONTENDER --versions` prints versions, and these; or why there is none.

    Raises UserError where the interpreter named by the user cannot be run.
    """
    reasons = []
    for python in dict.fromkeys([sys.executable, os.environ.get(PEERS_PYTHON, sys.executable)]):
        try:
            done = subprocess.run(
                [python, script, contender, "--versions"], capture_output=True, text=True, env=dict(environment)
            )
        except OSError as error:
            raise UserError(f"{PEERS_PYTHON}={python} cannot be run: {error.strerror}") from None
        if not done.returncode:
            return python, json.loads(done.stdout.splitlines()[-1])
        reasons.append(f"{python}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return "; ".join(reasons)
