"""benchmarks/full_tables.py: rows, published pipelines (tiny ones in their place) against their own loops, and the page."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines_tiny import PROMPT, build
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.shards import Shards
from tokencache_compile.judges.video import QUALITY, SEMANTIC, total_score, vbench_standard, video_name, write_video
from tokencache_compile.pixels import from_bytes
from tokencache_compile.sampling import Conditions, sample

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import full_tables
from full_rows import ROUTER, Learned, Row, groups, read_router, rows_of
from full_systems import Place, System, TextData, dit, pixart, text_score, video
from paper_figures import COLUMNS, TABLES, figures

CPU = Place("cpu", torch.float32, 3)
MODELS = {row.model for row in TABLES if row.table in COLUMNS}


def test_every_row_of_the_paper_has_a_method_or_a_reason() -> None:
    routers = tuple((steps, torch.randn(steps // 2, 12, 2)) for steps in (20, 50))
    seen = []
    for model in sorted(MODELS):
        for group in groups(model):
            assert group[0].method not in ("FORA", "ToCa", "Ours", "Learning-to-Cache") and group[0].steps == max(r.steps for r in group)
            for learned in (Learned(), Learned(routers=routers)):
                rows = rows_of(group, 12, 64, learned, "eager")
                assert all((row.method is None) == bool(row.why) for row in rows)
                assert len({row.method.name for row in rows if row.method}) == sum(row.method is not None for row in rows)
                without = [row.name for row in rows if row.method is None]
                expected = ["ToCa"] if model == "Open-Sora-Plan" else ["Learning-to-Cache"] * (not learned.routers and len(without))
                assert without == expected
            seen += [row.printed for row in rows if row.printed]
            assert rows[-1].printed is None and rows[-1].name.startswith("ours, defaults")
    assert len(seen) == len([row for row in TABLES if row.table in COLUMNS])
    best = next(row for row in seen if (row.model, row.method, row.steps) == ("DiT-XL/2 512²", "Ours", 20))
    assert figures(best) == dict(fid="5.43", sfid="6.21", inception_score="185.64", precision="0.83", recall="0.50", seconds="5.76")


def test_routers_of_both_kinds(tmp_path: Path) -> None:
    ours = torch.randn(3, 4, 2)
    save_file({ROUTER: ours}, tmp_path / "checkpoint.safetensors")
    steps, read = read_router(tmp_path / "checkpoint.safetensors")
    assert steps == 6 and torch.equal(read, ours)
    # Published: numbers count timesteps upwards, so the last pair of the run is number 0; attention and MLP in turn.
    published = {f"{2 * (2 - pair)}.prob": ours[pair].flatten() for pair in range(3)} | {f"{odd}.prob": torch.zeros(8) for odd in (1, 3, 5)}
    torch.save({"routers": published}, tmp_path / "DDIM6_router.pt")
    steps, read = read_router(tmp_path / "DDIM6_router.pt")
    assert steps == 6 and torch.equal(read, ours)
    save_file({"other": ours}, tmp_path / "other.safetensors")
    for wrong in ("other.safetensors", "none.pt", "DDIM50_none.pt"):
        with pytest.raises(ConfigError, match="was to be Learning-to-Cache's router and cannot be read"):
            read_router(tmp_path / wrong)


# --- published pipelines -----------------------------------------------------------------------------------------------


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1_000_000 * CPU.seed + number) for number in range(count)]


def drawn(system: System, number: int, count: int, steps: int) -> Tensor:
    """The first samples of a set, decoded."""
    subject = system.sets[number].subject
    noise, conditions = subject.draw(0, count)
    assert subject.decode is not None
    return subject.decode(sample(subject.load(), subject.scheduler(), noise, steps, conditions)).clamp(-1, 1)


def test_dit_is_sampled_as_its_pipeline_samples(tmp_path: Path) -> None:
    pipe, _ = build("DiT")
    pipe.save_pretrained(tmp_path)
    system = dit(256, str(tmp_path), tmp_path / "none.npz", tmp_path / "none.pth", 10, CPU)
    expected = pipe([0, 1, 2], guidance_scale=1.5, generator=generators(3), num_inference_steps=4, output_type="np").images
    torch.testing.assert_close(drawn(system, 0, 3, 4).permute(0, 2, 3, 1), torch.tensor(expected) * 2 - 1, rtol=0, atol=1e-4)
    assert (system.blocks, system.tokens) == (3, 16)
    with pytest.raises(ConfigError, match=r"none.npz, where there is none. Download it from https://github.com/openai/guided-diffusion"):
        system.sets[0].judge()
    with pytest.raises(ConfigError, match=r"DiTPipeline was to be loaded from .*nothing"):
        dit(256, str(tmp_path / "nothing"), tmp_path, tmp_path, 10, CPU)


def test_pixart_is_sampled_as_its_pipeline_samples(tmp_path: Path) -> None:
    pipe, _ = build("PixArt-alpha")
    pipe.save_pretrained(tmp_path)
    prompts = [PROMPT, "a dog"]
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\n" + "".join(f"{prompt}\tArts\n" for prompt in prompts))
    (tmp_path / "c.json").write_text(
        json.dumps({"annotations": [{"id": 1, "caption": "a mat"}], "images": [{"file_name": "i.png"}]})
    )
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    data = TextData(tmp_path / "p.tsv", "no-clip", tmp_path / "c.json", tmp_path, tmp_path / "none.pth", "")
    system = pixart(256, str(tmp_path), data, None, CPU)
    assert [(one.name, one.count) for one in system.sets] == [("coco", 1), ("partiprompts", 2)]
    expected = pipe(
        prompts, negative_prompt="", guidance_scale=4.5, generator=generators(2), num_inference_steps=4, output_type="np", height=16,
        width=16, max_sequence_length=120, clean_caption=False, use_resolution_binning=False,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn(system, 1, 2, 4).permute(0, 2, 3, 1), torch.tensor(expected) * 2 - 1, rtol=0, atol=1e-4)


def test_conditions_may_be_mappings() -> None:
    """As PixArt-α at 1024² takes the size of its image."""
    states, null, size = torch.randn(2, 3), torch.randn(1, 3), torch.tensor([[1.0], [2.0]])
    rows = Conditions({"states": states, "added": {"size": size}}, {"added": {"size": size[:1]}, "states": null}, 2.0).rows
    assert torch.equal(rows["states"], torch.cat([states, null, null]))
    assert rows["added"]["size"].flatten().tolist() == [1, 2, 1, 1]


def test_a_text_score_is_the_mean_over_samples_whatever_the_parts(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 5, 2)
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2).contiguous()
    for number in range(3):
        save_file({"sample": pixels[2 * number : 2 * number + 2].contiguous()}, shards.path(number))
    prompts = ["", "a", "ab", "abc", "abcd"]

    def score(images: Tensor, own: Any) -> float:
        values = [float(image.mean()) * len(prompt) for image, prompt in zip(images, own, strict=True)]
        return sum(values) / len(values)

    assert text_score(score, shards, prompts) == pytest.approx(score(from_bytes(pixels), prompts))


# --- video -------------------------------------------------------------------------------------------------------------


def test_vbench_s_total() -> None:
    most = {name: high for name, (_, high) in (*QUALITY, *SEMANTIC)}
    least = {name: low for name, (low, _) in (*QUALITY, *SEMANTIC)}
    assert len(most) == 16 and total_score(most) == pytest.approx(100) and total_score(least) == pytest.approx(0)
    assert total_score(least | {"motion_smoothness": 0.9975}) == pytest.approx(100 * 4 / 5 / 6.5)
    assert total_score(least | {"dynamic_degree": 1.0}) == pytest.approx(100 * 4 / 5 * 0.5 / 6.5)
    assert total_score(least | {"scene": 0.4111}) == pytest.approx(100 / 5 * 0.5 / 9)
    del most["color"]
    with pytest.raises(ConfigError, match="without color; all 16 dimensions are needed"):
        total_score(most)


def test_vbench_is_asked_for_its_own_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is replaced by one of the same calls: its networks are not at hand."""
    asked: list[Any] = []

    class VBench:
        def __init__(self, device: str, information: str, out: str) -> None:
            self.out = Path(out)
            asked.append((device, information))

        def evaluate(self, videos_path: str, name: str, dimension_list: list[str], mode: str) -> None:
            asked.append((sorted(path.name for path in Path(videos_path).iterdir()), mode))
            self.out.mkdir()
            results = {dimension: [0.5, []] for dimension in dimension_list}
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(results))

    package = types.ModuleType("vbench")
    package.VBench = VBench  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vbench", package)
    frames = torch.linspace(-1, 1, 3 * 5 * 4 * 6).view(3, 5, 4, 6)
    for number in range(2):
        write_video(tmp_path / "videos" / f"{video_name('a red cat', number)}.gif", frames)
    scores = vbench_standard(tmp_path / "videos", tmp_path / "info.json", tmp_path / "out", "cpu")
    assert scores == {name: 0.5 for name, _ in (*QUALITY, *SEMANTIC)}
    assert asked == [("cpu", str(tmp_path / "info.json")), (["a red cat-0.gif", "a red cat-1.gif"], "vbench_standard")]
    with Image.open(tmp_path / "videos" / "a red cat-1.gif") as film:
        assert film.n_frames == 5 and film.size == (6, 4)


def test_what_is_missing_for_videos_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"prompts was looked for in .*Download it from https://github.com/Vchitect/VBench"):
        video(tmp_path, "", tmp_path / "none.json", tmp_path, None, CPU)
    (tmp_path / "info.json").write_text('[{"prompt_en": "a cat"}]')
    with pytest.raises(ConfigError, match="Open-Sora-Plan's video autoencoder was asked for and its package is missing"):
        video(tmp_path, "", tmp_path / "info.json", tmp_path, None, CPU)
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(ConfigError, match="pip install imageio"):
        write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 4, 4))


# --- the script --------------------------------------------------------------------------------------------------------


def test_the_video_table_on_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled, judged and written, all rows but two; sampling once more draws nothing."""

    def fewer(*given: Any) -> list[Row]:
        return [row for row in rows_of(*given) if not row.name.startswith(("FORA", "the paper's"))]

    monkeypatch.setattr(full_tables, "rows_of", fewer)
    options = ["--out", str(tmp_path), "--samples", "2", "--shard", "1", "--backend", "eager"]
    times = []
    for phase in ("sample", "sample", "judge"):
        result = CliRunner().invoke(full_tables.app, [*options, "--phase", phase, "video", "--reference"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        times.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")})
    assert len(times[0]) == 3 * 2 and times[0] == times[1] == times[2]
    page = next(tmp_path.rglob("table.md")).read_text()
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert lines[0][:4] == ["| method", "steps", "VBench", "seconds"] and len(lines) == 2 + 4
    by_name = {line[0].removeprefix("| "): line for line in lines[2:]}
    assert by_name["uncached, 25 steps"][2] == "– (71.38)" and "published no settings" in by_name["ToCa"][-1]
    assert by_name["uncached, 50 steps"][5] == "–"  # no error to itself
    assert float(by_name["uncached, 25 steps"][5]) < float(by_name["ours, defaults, random tokens"][5])
    tmacs = {name: float(line[4].split()[0]) for name, line in by_name.items() if line[4][0] != "–"}
    assert tmacs["ours, defaults, random tokens"] < tmacs["uncached, 50 steps"] == 2 * tmacs["uncached, 25 steps"]
    assert sorted(path.name for path in tmp_path.rglob("*.gif"))[::3] == ["prompt 0-0.gif", "prompt 0-1.gif"]


def test_only_sampling_runs_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    several = types.SimpleNamespace(num_processes=2, process_index=1, device="cpu")
    monkeypatch.setattr(full_tables, "PartialState", lambda cpu: several)
    result = CliRunner().invoke(full_tables.app, ["--phase", "judge", "video", "--reference"])
    assert result.exit_code == 1 and "sample in several, then judge and time in one" in result.output
