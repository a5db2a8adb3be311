"""Which sampling steps run in full (I-steps); the others are P-steps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tokencache_compile.errors import ConfigError


def is_ints(values: object) -> bool:
    """Whether ``values`` is a tuple of integers, with no bool among them."""
    return isinstance(values, tuple) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)


@dataclass(frozen=True)
class Schedule:
    """I-steps by their index in sampling order (0 is the noisiest step, and always full).

    Attributes:
        every: an I-step every ``every`` steps, used where ``full`` is None. An even spacing is what a forecast likes.
        full: the I-steps, listed; steps past the last listed one go on with ``every``.
    """

    every: int = 4
    full: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not is_ints((self.every,)) or self.every < 1:
            raise ConfigError(f"every={self.every!r} was asked for; an I-step comes every 1, 2, 3 … steps.")
        if self.full is not None and (not is_ints(self.full) or list(self.full) != sorted({0, *self.full})):
            raise ConfigError(f"full={self.full!r} was asked for; it is a tuple of rising step indices that begins with 0.")

    @classmethod
    def with_last(cls, steps: int, every: int) -> Schedule:
        """An I-step every ``every`` of ``steps`` sampling steps, and the last one."""
        if not is_ints((steps, every)) or min(steps, every) < 1:
            raise ConfigError(f"I-steps every {every!r} of {steps!r} steps were asked for; both are whole numbers, 1 or more.")
        return cls(every, tuple(sorted({*range(0, steps, every), steps - 1})))

    @classmethod
    @functools.cache
    def of_run(cls, steps: int | None) -> Schedule:
        """The schedule of a run of ``steps`` sampling steps where none is asked for; None is an unknown number.

        An I-step every 4th step; every 3rd or 2nd in runs of fewer than 48 or 36, whose steps lie further apart. And the last step, whose
        error no later step mends: DPM-Solver++ and Euler samplers return what it predicts.
        """
        if steps is None:
            return cls()
        return cls.with_last(steps, min(4, max(2, steps // 12)))

    @classmethod
    def uniform(cls, steps: int, full_steps: int) -> Schedule:
        """``full_steps`` I-steps spread evenly over ``steps`` sampling steps."""
        if not is_ints((steps, full_steps)) or not 1 <= full_steps <= steps:
            raise ConfigError(f"{full_steps} I-steps of {steps} were asked for; 1 to {steps} are possible.")
        return cls(-(-steps // full_steps), tuple(sorted({round(j * steps / full_steps) for j in range(full_steps)})))

    @classmethod
    def denser_late(cls, steps: int, full_steps: int, power: float = 1.5) -> Schedule:
        """``full_steps`` I-steps of ``steps`` sampling steps, the first and the last among them, at intervals that grow shorter.

        I-step j of n stands at 1 − (1 − j/(n − 1))^``power`` of the run: what an early forecast errs, later steps mend; the last ones draw
        the details. A power of 1 is an even spacing. Some models gain by it and others lose (benchmarks/denser_late.py), so it is no
        default; ``tune`` tries it.
        """
        if not is_ints((steps, full_steps)) or not 2 <= full_steps <= steps or power < 1:
            raise ConfigError(
                f"{full_steps!r} I-steps of {steps!r}, power {power!r}, were asked for; 2 to all steps, and 1 or more, are possible."
            )
        found: list[int] = []
        for j in range(full_steps):
            place = round((steps - 1) * (1 - (1 - j / (full_steps - 1)) ** power))
            found.append(min(max(place, found[-1] + 1 if found else 0), steps - full_steps + j))
        return cls(steps, tuple(found))

    def is_full(self, step: int) -> bool:
        """Whether step ``step`` (index in sampling order) runs in full."""
        if self.full is None:
            return step % self.every == 0
        if step <= self.full[-1]:
            return step in self.full
        return (step - self.full[-1]) % self.every == 0

    def __str__(self) -> str:
        if self.full is None:
            return f"every {self.every} steps"
        last = self.full[-1]
        if last and self == Schedule.with_last(last + 1, self.every):
            return f"every {self.every} steps, and step {last}"
        return ", ".join(map(str, self.full)) + f", then every {self.every}"
