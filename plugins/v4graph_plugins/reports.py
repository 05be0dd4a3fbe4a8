"""TensorRT's messages and progress: collected for our errors, shown where the user asked for them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
MOST_LINES = 12


@functools.cache
def logger_class(trt: Any) -> type[Any]:
    """Return a TensorRT logger class that keeps errors and passes everything on to `logging`."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
        severity.VERBOSE: logging.DEBUG,
    }

    class V4Logger(trt.ILogger):  # type: ignore[misc]
        """`errors` holds what went wrong since `take`."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.INFO)
            if level == logging.ERROR:
                self.errors.append(message.strip())
            # Errors reach the user below ours; TensorRT's warnings here are about int64 and long names.
            logger.debug("%s", message) if level != logging.INFO else logger.info("%s", message)

        def take(self) -> str:
            lines, self.errors = self.errors, []
            return "\n".join(f"TensorRT: {line}" for line in lines[:MOST_LINES])

    return V4Logger


@functools.cache
def monitor_class(trt: Any) -> type[Any]:
    """Return a progress monitor class that reports TensorRT's outermost phase."""

    class V4Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, report: Progress) -> None:
            trt.IProgressMonitor.__init__(self)
            self.report = report
            self.phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.phases[phase_name] = num_steps
                self.report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.report(phase_name, step + 1, self.phases[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return V4Monitor
