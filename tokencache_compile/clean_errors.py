"""Errors on the command line: what this package raises on purpose is one message, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from tokencache_compile.errors import TokenCacheError, UnsupportedModelError


@contextmanager
def clean_errors() -> Iterator[None]:
    """What this package raises on purpose is one message on stderr and exit code 1."""
    try:
        yield
    except TokenCacheError as error:
        console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        if isinstance(error, UnsupportedModelError):
            console.print(f"error: {error.where} is refused\n  reason: {error.reason}\n  remedy: {error.remedy}")
        else:
            console.print(f"error: {error}")
        raise typer.Exit(1) from error
