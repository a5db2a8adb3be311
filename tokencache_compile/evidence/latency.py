"""How long whole sampling runs take: each method in turn with the compiled uncached model, so that a busy machine slows both alike."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from tokencache_compile.api import transform
from tokencache_compile.evidence.methods import Method
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.sampling import sample
from tokencache_compile.step_times import seconds

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Times methods on the first ``batch`` samples of a subject, beside the uncached model compiled by this package."""

    def __init__(self, subject: Subject, batch: int, rounds: int, backend: str) -> None:
        self.subject, self.rounds = subject, rounds
        self.noise, self.conditions = subject.draw(0, batch)
        self.scheduler = subject.scheduler()
        self.uncached = transform(subject.load(), ratio=0.0, backend=backend, scheduler=self.scheduler)
        for _ in range(2):
            self._run(self.uncached, self.scheduler, subject.steps)

    def measure(self, method: Method, backend: str) -> dict[str, Any]:
        """Figures of ``method``, warm: its first two runs, which compile, are not among the timed ones."""
        steps = method.steps or self.subject.steps
        net, scheduler = self.uncached, self.scheduler
        if method.start is not None:
            # Methods share the model's code, of which torch.compile takes only so many versions: a later one would run eager.
            torch.compiler.reset()
            self._run(self.uncached, self.scheduler, self.subject.steps)
        with fresh_cache():  # nothing compiled is found on disk; what is compiled here stays in memory
            start = time.perf_counter()
            if method.start is not None:
                scheduler = self.subject.scheduler()
                net = method.start(self.subject.load(), scheduler, backend)
            prepared = time.perf_counter() - start
            first = self._run(net, scheduler, steps)
            self._run(net, scheduler, steps)
        peak = self._peak_growth(net, scheduler, steps)
        own, others = [], []
        for _ in range(self.rounds):
            others.append(self._run(self.uncached, self.scheduler, self.subject.steps))
            own.append(self._run(net, scheduler, steps))
        del net
        gc.collect()  # what torch.compile keeps of the model goes with it
        return {
            "seconds": statistics.median(own),
            "p90": sorted(own)[math.ceil(0.9 * self.rounds) - 1],
            "each": own,
            "uncached_each": others,
            "speed_up": statistics.median(other / one for other, one in zip(others, own, strict=True)),
            "compile_seconds": max(0.0, prepared + first - statistics.median(own)),
            "peak_bytes": peak,
            "load_average": os.getloadavg()[0],
        }

    def _run(self, net: Any, scheduler: Any, steps: int) -> float:
        return seconds(lambda: sample(net, scheduler, self.noise, steps, self.conditions), self.noise.device)

    def _peak_growth(self, net: Any, scheduler: Any, steps: int) -> int | None:
        """The most memory that a warm run takes beyond what is held between runs; None where the system does not tell."""
        if self.noise.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._run(net, scheduler, steps)
            return torch.cuda.max_memory_allocated() - before
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is resident still, and would hide what the run takes
            _CLEAR.write_text("5")  # the peak begins anew at what is resident now
            before = _resident("VmRSS")
        except (OSError, AttributeError):  # no Linux, another C library, or not allowed
            return None
        self._run(net, scheduler, steps)
        return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
