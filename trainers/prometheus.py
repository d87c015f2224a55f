"""Metrics of a run in Prometheus' text format, as a file for node_exporter or served over HTTP.

Every sample has the label `run`, the run folder. Gauges:

    genkd_running                         1 while the run trains, 0 once it has ended (a file stays, without speeds)
    genkd_updated_timestamp_seconds       when the run last wrote; one that was killed stays running=1 and falls behind
    genkd_step, genkd_steps               the step reached, and those of the whole run
    genkd_epoch, genkd_learning_rate
    genkd_loss{term}                      means since the last log step
    genkd_evaluation{metric}              the newest evaluation's
    genkd_clips_per_second, genkd_frames_per_second, genkd_read_bytes_per_second
    genkd_data_wait_ratio                 share of the time that the main rank waited for data
    genkd_decoded_per_used_frames, genkd_remaining_seconds
    genkd_rank_step_seconds{rank, host}   seconds a step; see spread.Row, also for the next two
    genkd_rank_own_seconds, genkd_rank_data_wait_seconds
    genkd_rank_straggler{rank, host}      1 for the rank that the others wait for
    genkd_rank_gpu_memory_bytes{rank, host, kind}   peaks, allocated and reserved

The format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from __future__ import annotations

import logging
import math
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any, NamedTuple

from ..configs.values import Address, prometheus_target
from ..errors import UserError, explain_os_error
from ..files import prepare_file, write_atomically
from .spread import Row, summary

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Of a training line: its name in metrics.jsonl, the metric, its help, and the factor to Prometheus' base units.
_SPEEDS = (
    ("clips_per_s", "clips_per_second", "Clips of all ranks trained on a second.", 1),
    ("frames_per_s", "frames_per_second", "Frames of those clips a second.", 1),
    ("data_wait", "data_wait_ratio", "Share of the time that the main rank waited for data.", 1),
    ("decoded_per_used", "decoded_per_used_frames", "Frames decoded for one that a clip has.", 1),
    ("read_mb_per_s", "read_bytes_per_second", "Bytes read a second by the main rank.", 1e6),
    ("eta_s", "remaining_seconds", "Estimated seconds to the end of the run.", 1),
)
_STATE = (
    ("epoch", "epoch", "Epoch, counted from 1.", 1),
    ("lr", "learning_rate", "Learning rate of the network's optimizer.", 1),
)
_RANKS = (
    ("step", "step_seconds", "Seconds a step."),
    ("own", "own_seconds", "Of those, seconds outside of the backward passes, in which ranks wait for each other."),
    ("wait", "data_wait_seconds", "Of those, seconds until the data were there."),
)


class Family(NamedTuple):
    """A gauge: name, help, and samples of labels and value."""

    name: str
    help: str
    samples: list[tuple[dict[str, str], float]]


class Exporter:
    """Gives a run's newest metrics to a file or an HTTP server. Only for the main rank.

    rows: the ranks' newest times. Raises UserError for a path that cannot be written and an address that cannot be
    served on.
    """

    def __init__(self, target: str, run: Path, steps: int, rows: Callable[[], Iterable[Row]] = tuple):
        self._labels, self._steps, self._rows = {"run": str(run)}, steps, rows
        self._train: dict[str, Any] = {}
        self._eval: dict[str, Any] = {}
        self._step = 0
        place = prometheus_target(target)
        self.server = Server(place) if isinstance(place, Address) else None
        self._path = None if isinstance(place, Address) else Path(place)
        if self._path is not None:
            prepare_file(self._path)
        self._failed = ""

    def begin(self, step: int) -> None:
        """The run goes on from a step."""
        self._step = step
        self._publish(running=True)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._step = step
        if kind == "eval":
            self._eval = values
        else:
            self._train = values
        self._publish(running=True)

    def close(self, finished: bool) -> None:
        """The run has ended: a file says so, a server is shut down."""
        if self.server is not None:
            self.server.close()
        else:
            self._publish(running=False)

    def text(self, running: bool = True) -> str:
        """The metrics in Prometheus' text format."""
        one = [
            ("running", "1 while the run trains, 0 once it has ended.", float(running)),
            ("updated_timestamp_seconds", "When the run last wrote, seconds since 1970.", time.time()),
            ("step", "Step that the run has reached.", float(self._step)),
            ("steps", "Steps of the whole run.", float(self._steps)),
        ]
        for key, name, told, factor in (*_STATE, *(_SPEEDS if running else ())):
            if key in self._train:
                one.append((name, told, self._train[key] * factor))
        families = [Family(f"genkd_{name}", told, [(self._labels, value)]) for name, told, value in one]
        losses = [({**self._labels, "term": name}, value) for name, value in self._train.items() if "/" in name]
        families.append(Family("genkd_loss", "Loss terms, means since the last log step.", losses))
        scores = [({**self._labels, "metric": name}, float(value)) for name, value in self._eval.items()
                  if isinstance(value, int | float) and name != "epoch"]  # fmt: skip
        families.append(Family("genkd_evaluation", "The newest evaluation.", scores))
        if running:
            families += self._of_ranks()
        return exposition(families)

    def _of_ranks(self) -> list[Family]:
        rows = list(self._rows())
        labels = [{**self._labels, "rank": str(row.rank), "host": row.host} for row in rows]
        families = [
            Family(f"genkd_rank_{name}", told, [(label, getattr(row, key)) for label, row in zip(labels, rows,
                                                                                              strict=True)])
            for key, name, told in _RANKS
        ]  # fmt: skip
        slow = summary(rows).get("straggler", {}).get("rank") if len(rows) > 1 else None
        named = [(label, float(row.rank == slow)) for label, row in zip(labels, rows, strict=True)]
        families.append(Family("genkd_rank_straggler", "1 for the rank that the others wait for.", named))
        memory = [
            ({**label, "kind": kind}, float(value))
            for label, row in zip(labels, rows, strict=True)
            for kind, value in (("allocated", row.allocated), ("reserved", row.reserved))
            if value is not None
        ]
        families.append(Family("genkd_rank_gpu_memory_bytes", "Peak of the GPU's memory, of this process.", memory))
        return families

    def _publish(self, *, running: bool) -> None:
        content = self.text(running).encode("utf-8", "backslashreplace")
        if self.server is not None:
            self.server.content = content
            return
        assert self._path is not None
        try:
            write_atomically(self._path, content)
            self._failed = ""
        except OSError as error:  # a full disk of the exporter's is no reason to end a run; it is told once
            told = explain_os_error(error, f"writing {self._path}")
            if told != self._failed:
                log.warning("%s; training goes on without these metrics until it can be written", told)
            self._failed = told


def exposition(families: Iterable[Family]) -> str:
    """Gauges in the text format; those without a sample are left out."""
    lines = []
    for family in families:
        if family.samples:
            told = family.help.replace("\\", r"\\").replace("\n", r"\n")
            lines += [f"# HELP {family.name} {told}", f"# TYPE {family.name} gauge"]
            lines += [f"{family.name}{{{_labels(labels)}}} {_number(value)}" for labels, value in family.samples]
    return "".join(line + "\n" for line in lines)


def _labels(labels: dict[str, str]) -> str:
    escaped = {name: value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
               for name, value in labels.items()}  # fmt: skip
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


class Server(ThreadingHTTPServer):
    """Answers GET /metrics with `content` from a daemon thread. Raises UserError where it cannot listen."""

    def __init__(self, address: Address):
        self.content = b""
        self.address_family = AF_INET6 if ":" in address.host else AF_INET
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise UserError(
                f"prometheus={address.host}:{address.port}: cannot listen there ({error.strerror or error}); "
                "choose another port, or an address of this machine"
            ) from None
        log.info("metrics are served at http://%s:%d/metrics", address.host or "localhost", self.server_address[1])
        threading.Thread(target=self.serve_forever, name="genkd-prometheus", daemon=True).start()

    def server_bind(self) -> None:
        """Without http.server's look-up of the host's full name, which may take a name server's time-out."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def close(self) -> None:
        """Stops listening."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of the run's business."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a client that says nothing

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "metrics are at /metrics")
            return
        assert isinstance(self.server, Server)
        content = self.server.content
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing for every scrape."""
