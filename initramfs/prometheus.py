"""The state of the machine for Prometheus: a file of node_exporter's textfile collector, in its text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from initramfs import state
from initramfs.status import BAD, DOUBT, GOOD, Status

if TYPE_CHECKING:
    from initramfs.crashes import SavedCrash

FILE = Path("/var/lib/prometheus/node-exporter/vmcapture.prom")
"""Where Debian's prometheus-node-exporter looks."""
STANDARD_OUTPUT = Path("-")
_VALUES = {GOOD: 2, DOUBT: 1, BAD: 0}


class Metric(NamedTuple):
    """One metric, a gauge: each value with its labels."""

    name: str
    help: str
    values: Sequence[tuple[dict[str, str], float]]

    def text(self) -> str:
        """Return it in the text format."""
        name = f"vmcapture_{self.name}"
        lines = [f"# HELP {name} {self.help}", f"# TYPE {name} gauge"]
        for labels, value in self.values:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(f"{name}{f'{{{inside}}}' if inside else ''} {value:.17g}")
        return "\n".join(lines) + "\n"


def metrics(found: Status, crashes: Sequence[SavedCrash]) -> str:
    """Return what is known now."""
    return "".join(metric.text() for metric in _metrics(found, crashes) if metric.values)


def write(path: Path, text: str) -> None:
    """Write the file in one piece, readable for the exporter; ``-`` is standard output.

    Raises:
        StateError: it cannot be written.
    """
    if path == STANDARD_OUTPUT:
        print(text, end="")
    else:
        state.make_directory(path.parent)
        state.write_text(path, text, 0o644)


def _metrics(found: Status, crashes: Sequence[SavedCrash]) -> Iterator[Metric]:
    def one(name: str, what: str, value: float | None) -> Metric:
        return Metric(name, what, [] if value is None else [({}, float(value))])

    yield one("survives", "A crash now would be saved: 2 yes, 1 yes but for a doubt, 0 no.", _VALUES[found.verdict])
    yield one("armed", "Whether a capture kernel is loaded.", found.armed)
    checks: dict[str, int] = {}
    for check in found.checks:  # of two targets, the worse one
        checks[check.name] = min(checks.get(check.name, _VALUES[GOOD]), _VALUES[check.state])
    values = [({"check": name}, float(value)) for name, value in checks.items()]
    yield Metric("check", "What has to hold: 2 good, 1 doubtful, 0 bad.", values)
    yield one("reservation_bytes", "Memory that is reserved for the capture kernel.", found.reservation)
    yield one("reservation_needed_bytes", "Memory that the capture kernel needs, estimated.", found.needed)
    yield one("image_built_timestamp_seconds", "When the capture image was built.", found.image_built)
    yield one("encrypted", "Whether a crash is saved encrypted.", found.encrypted)
    most = None if found.predicted is None else found.predicted.most
    yield one("predicted_dump_bytes", "What a dump would have at the most, uncompressed.", most)
    for name, what, values_of in (
        ("target_reached", "Whether a target is there; absent where it was not tried.", "reached"),
        ("target_free_bytes", "Room on a target, where that can be seen.", "free"),
    ):
        there = [(target.target, getattr(target, values_of)) for target in found.targets]
        yield Metric(name, what, [({"target": name}, float(value)) for name, value in there if value is not None])
    states = {(crash.state.replace(" ", "_"), str(crash.encrypted).lower()) for crash in crashes}
    counts = [
        (
            {"state": kind, "encrypted": encrypted},
            float(sum((c.state.replace(" ", "_"), str(c.encrypted).lower()) == (kind, encrypted) for c in crashes)),
        )
        for kind, encrypted in sorted(states)
    ]
    yield Metric(
        "crashes", "Crashes that lie on this host.", counts or [({"state": "whole", "encrypted": "false"}, 0.0)]
    )
    newest = max((crash.when.timestamp() for crash in crashes), default=None)
    yield one("last_crash_timestamp_seconds", "When the newest of them happened.", newest)
    yield one("status_timestamp_seconds", "When this was looked at.", round(time.time(), 3))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
