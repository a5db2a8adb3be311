"""The command ``tokencache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokencache_compile.clean_errors import clean_errors
from tokencache_compile.engine import Backend
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence import commands as evidence_commands
from tokencache_compile.export import commands as export_commands
from tokencache_compile.learn import commands
from tokencache_compile.plan import CacheConfig, CacheDtype, Context, History, Scorer, Selection
from tokencache_compile.schedule import Schedule

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Cache the tokens of diffusion transformers between sampling steps.")

_DEFAULTS = CacheConfig()


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tokencache {version('tokencache-compile')}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("out/demo"),
    model: Annotated[Path | None, typer.Option(help="Folder of a DiT of pixels; the reference model that is shipped if none.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Artefact directory; the shipped ones for the shipped model.")] = None,
    backend: Annotated[Backend, typer.Option(help="What runs the graphs, uncached and cached alike.")] = "inductor",
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Weight of classifier-free guidance.")] = 2.5,
    ratio: Annotated[float | None, typer.Option(help="Share of tokens that a P-step does not recompute; the plan's if left out.")] = None,
    samples: Annotated[int, typer.Option(help="Images of each class; the picture shows the first.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each kind whose median latency is reported.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Sample the reference model uncached, cached (with the shipped LoRA too), and with fewer steps; compare speed and images."""
    from tokencache_compile.artefact import read_config
    from tokencache_compile.demo import DEFAULT_MODEL, DEFAULT_PLAN, DEFAULT_REFINED, DemoSettings, report, run_demo, write_files

    console = Console()
    with clean_errors():
        refined = None
        if plan is None and model is None:
            plan, refined = DEFAULT_PLAN, DEFAULT_REFINED
        if ratio is None:
            ratio = read_config(plan).ratio if plan is not None else _DEFAULTS.ratio
        settings = DemoSettings(model or DEFAULT_MODEL, plan, backend, steps, guidance, ratio, samples, repeats, seed, refined)
        result = run_demo(settings, console)
        console.print(report(result))
        picture, figures = write_files(result, out)
        console.print(f"Written: {picture} and {figures}", markup=False, highlight=False, soft_wrap=True)


def _schedule(every: int | None, full: str | None) -> Schedule | None:
    """The schedule of ``--every`` and ``--full``; None where neither was given."""
    if full is None:
        return None if every is None else Schedule(every)
    try:
        return Schedule(Schedule().every if every is None else every, tuple(int(part) for part in full.split(",")))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"full={full!r} was asked for; I-steps are numbers with commas between, such as 0,4,8.") from error


@app.command()
def explain(
    model_or_config: Annotated[str, typer.Argument(help="A diffusers folder, a config.json, or a hub id. No weights are loaded.")],
    ratio: Annotated[float, typer.Option(help="Share of the cached blocks' tokens that a P-step does not recompute.")] = _DEFAULTS.ratio,
    last_k: Annotated[int, typer.Option(help="The last K blocks run in full on every step.")] = _DEFAULTS.last_k,
    context: Annotated[Context, typer.Option(help="What a kept token attends to.")] = _DEFAULTS.context,
    forecast: Annotated[int, typer.Option(help="Order of the extrapolation of what is not recomputed: 0 holds it.")] = _DEFAULTS.forecast,
    history: Annotated[History, typer.Option(help="Which of a token's updates are held: those of I-steps, or all.")] = _DEFAULTS.history,
    scorer: Annotated[Scorer, typer.Option(help="How the tokens to keep are chosen.")] = _DEFAULTS.scorer,
    selection: Annotated[Selection, typer.Option(help="One index set per sample, guidance pair or batch.")] = _DEFAULTS.selection,
    every: Annotated[int | None, typer.Option(help="An I-step every so many steps; if left out, by the number of steps.")] = None,
    full: Annotated[str | None, typer.Option(help="The I-steps by index, such as 0,4,8; later ones follow --every.")] = None,
    cache_dtype: Annotated[CacheDtype | None, typer.Option(help="What the caches are stored in; the model's dtype if left out.")] = None,
    max_cache_bytes: Annotated[int | None, typer.Option(help="The most that one branch's caches may take; no limit if left out.")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps of the run whose MACs are printed.")] = 50,
    batch: Annotated[int, typer.Option(help="Rows of a call; 2 are one image with guidance.")] = 2,
) -> None:
    """Print what the compiler finds in a model, its plan, and what a run would cost; or why the model is refused."""
    from tokencache_compile.explain import explain as explain_model

    with clean_errors():
        config = CacheConfig(
            ratio=ratio,
            last_k=last_k,
            context=context,
            forecast=forecast,
            history=history,
            scorer=scorer,
            selection=selection,
            schedule=_schedule(every, full),
            cache_dtype=cache_dtype,
            max_cache_bytes=max_cache_bytes,
        )
        explain_model(model_or_config, config, Console(), steps, batch)


for _command in (
    commands.train,
    commands.calibrate,
    commands.tune,
    commands.plot,
    export_commands.export,
    export_commands.engines,
    evidence_commands.bench,
    evidence_commands.report,
):
    app.command()(_command)
