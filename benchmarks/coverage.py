"""Which of diffusers' transformer classes can be cached, and whether what comes out is right: writes docs/coverage.md.

    python benchmarks/coverage.py                       # all classes, JSON and table (13 minutes on one core)
    python benchmarks/coverage.py --only Flux --no-write

Each tiny configuration (tests/families.py) goes through capture, an I-step and a P-step in every context:
I must be bit-identical to the model, a P-step that keeps all tokens must be the model's step, and one at ratio 0.9 must be
what an independent eager reference gives (tests/plain_blocks.py). Then the P-step of one context (reuse, where it is right) is
exported to ONNX and run in ONNX Runtime. Classes without a configuration are listed too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffusers.configuration_utils import ConfigMixin
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from check_family import CONTEXTS, ENGINE_TOLERANCE, Result, check  # noqa: E402
from families import FAMILIES  # noqa: E402


def transformer_classes() -> dict[str, str]:
    """Class name → module of every model with a configuration in diffusers.models.transformers."""
    found = {}
    package = importlib.import_module("diffusers.models.transformers")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, nn.Module) and issubclass(value, ConfigMixin):
                found[name] = info.name
    return found


def first_line(reason: str) -> str:
    return reason.splitlines()[0][:300]


def table(results: list[Result], missing: list[str]) -> str:
    """The page docs/coverage.md."""
    right = [x for x in results if x.supported]
    classes = {x.name for x in results} | set(missing)
    lines = [
        "# Coverage of diffusers' transformer classes",
        "",
        f"Written by `python benchmarks/coverage.py` with diffusers {diffusers.__version__}, torch {torch.__version__}; do not edit.",
        "",
        f"**{len({x.name for x in right})} of {len(classes)} classes** ({len(right)} of {len(results)} configurations) have an I-step "
        "that is bit-identical to the model, a P-step that keeps all tokens and gives the model's step within 1e-5, and a P-step at "
        "ratio 0.9 that agrees with an independent eager reference, in at least one context. Others are refused by name, or not tried.",
        "",
        "Contexts: ✓ all three hold; – refused (why stands below). Streams: the cached one, and others computed in full; "
        "(text +7) says that 7 text tokens stand in the cached stream itself. ONNX: ✓ the P-step (reuse, or the first context that is "
        f"right) is exported, and ONNX Runtime's result is within {ENGINE_TOLERANCE:.0e} of eager's.",
        "",
        "| class | blocks cached | streams | kept | cached | full | reuse | P error, largest | ONNX |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in results:
        marks = ["✓" if x.contexts[c].ok else "–" if x.contexts[c].refusal else "✗" for c in CONTEXTS]
        error = f"{x.worst:.0e}" if x.supported else ""
        engine = "" if x.onnx is None else "✓" if x.onnx.ok else "–" if x.onnx.refusal else "✗"
        lines.append(f"| {x.key} | {x.blocks} | {x.streams} | {' | '.join(marks)} | {error} | {engine} |")
    refused = [(x.key, c, r.refusal) for x in results for c, r in x.contexts.items() if r.refusal]
    lines += ["", "## Refusals", ""]
    seen: dict[tuple[str, str], list[str]] = {}
    for key, context, refusal in refused:
        seen.setdefault((key, first_line(refusal)), []).append(context)
    lines += [f"- **{key}**, {', '.join(contexts)}: {reason}" for (key, reason), contexts in seen.items()]
    lines += ["", "## Not run in ONNX Runtime", ""]
    lines += [f"- **{x.key}**: {first_line(x.onnx.note())}" for x in results if x.onnx is not None and not x.onnx.ok]
    lines += ["", "## No configuration yet", "", ", ".join(missing) or "none", ""]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = ROOT / "benchmarks/results/coverage.json",
    page: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "docs/coverage.md",
    only: Annotated[str, typer.Option(help="only configurations whose name has this in it")] = "",
    write: Annotated[bool, typer.Option(help="write the files")] = True,
) -> None:
    torch.set_num_threads(1)
    results = []
    for key, entry in FAMILIES.items():
        if only.lower() not in key.lower():
            continue
        start = time.monotonic()
        result = check(entry, engines=True)
        results.append(result)
        print(f"{result.line()}  [{time.monotonic() - start:.0f} s]", flush=True)
    if not write or only:
        return
    missing = sorted(set(transformer_classes()) - {entry.name for entry in FAMILIES.values()})
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    content: dict[str, Any] = {"versions": versions, "results": [x.as_json() for x in results], "not_tried": missing}
    out.write_text(json.dumps(content, indent=1) + "\n")
    page.write_text(table(results, missing))


if __name__ == "__main__":
    typer.run(main)
