"""What calibration and training leave behind, as one directory: a plan, the predictor and the adapter of one base model.

    tokencache.json             format version, settings, provenance, the base model's fingerprint, SHA-256 of the files below
    predictor.safetensors       the predictor's state dict
    lora/                       a peft adapter: adapter_config.json, adapter_model.safetensors
    calibration.safetensors     what the plan was made from
    README.md                   a model card, free to be edited

All but the first and the last are optional. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCardData, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokencache_compile.errors import ConfigError
from tokencache_compile.fingerprint import base_model, explain_difference, fingerprint
from tokencache_compile.ir import LowRankUpdate
from tokencache_compile.json_data import from_json
from tokencache_compile.passes.capture import candidate_blocks
from tokencache_compile.plan import CacheConfig
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.schedule import is_ints
from tokencache_compile.whole_directory import sha256, written_whole

FORMAT_VERSION = 1
LIBRARY = "tokencache-compile"
_MANIFEST, _CARD = "tokencache.json", "README.md"
_PREDICTOR, _CALIBRATION = "predictor.safetensors", "calibration.safetensors"
_ADAPTER_FILES = ("lora/adapter_config.json", "lora/adapter_model.safetensors")
_DATA_FILES = (_PREDICTOR, *_ADAPTER_FILES, _CALIBRATION)
_LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What a plain LoRA adapter's configuration may say: which layers it is for, and how far its update is scaled.
_LORA_SETTINGS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_rslora"),
}
_PLAIN_LORA = "P-steps take plain LoRA of linears; tokencache_compile.learn.lora.refine trains it."


@dataclass(frozen=True, kw_only=True)
class CacheArtefact:
    """A plan for one base model, and what it was calibrated with.

    Attributes:
        config: the settings.
        base: :func:`fingerprint` of the base model.
        predictor: the scorer's weights, where ``config.scorer`` is "predictor".
        lora_path: a peft adapter's directory; saving copies its two files.
        calibration_path: a safetensors file; saving copies it as it is.
        steps: sampling steps of the run it was calibrated for.
        provenance: hyper-parameters, measured losses, versions: anything that JSON can hold.

    Raises:
        ConfigError: ``config.scorer`` and ``predictor`` do not agree, or ``steps`` is no number of steps.
    """

    config: CacheConfig
    base: dict[str, Any]
    predictor: CachePredictor | None = None
    lora_path: Path | None = None
    calibration_path: Path | None = None
    steps: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.config.scorer == "predictor") != (self.predictor is not None):
            given = "a" if self.predictor is not None else "no"
            raise ConfigError(f'scorer={self.config.scorer!r} and {given} predictor were given; a predictor goes with scorer="predictor".')
        if self.steps is not None and (not is_ints((self.steps,)) or self.steps < 1):
            raise ConfigError(f"steps={self.steps!r} was given; it is the number of sampling steps, 1 or more, or None.")

    def check_base(self, model: nn.Module) -> None:
        """Raise a ConfigError that says how ``model`` (or what is inside a Dispatcher) differs from the base model."""
        _check_base(self.base, model, "this artefact")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the artefact into ``directory``, all or nothing: it is moved there when it is complete.

        An older artefact there is replaced. (Killed outright between two renames, it is left in a hidden folder beside.)

        Raises:
            ConfigError: ``directory`` holds anything else, or a part of the artefact is missing or cannot be written as JSON.
        """
        target = Path(directory).resolve()
        _check_replaceable(target)
        with written_whole(target) as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        if self.predictor is not None:
            state = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in self.predictor.state_dict().items()}
            save_file(state, folder / _PREDICTOR)
        if self.lora_path is not None:
            (folder / "lora").mkdir()
            for name in _ADAPTER_FILES:
                _copy(Path(self.lora_path, Path(name).name), folder / name, "A peft adapter's save_pretrained writes it.")
        if self.calibration_path is not None:
            _copy(Path(self.calibration_path), folder / _CALIBRATION, "Pass a safetensors file, or None.")
        manifest = {
            "format_version": FORMAT_VERSION,
            "package_version": version(LIBRARY),
            "config": asdict(self.config),
            "steps": self.steps,
            "provenance": self.provenance,
            "base": self.base,
            "files": {name: sha256(folder / name) for name in _DATA_FILES if (folder / name).exists()},
        }
        try:
            text = json.dumps(manifest, indent=1, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"provenance={self.provenance!r} cannot be written as JSON: {error}. Keep to finite numbers, strings, lists and dicts."
            ) from error
        (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")
        (folder / _CARD).write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        data = ModelCardData(library_name=LIBRARY, tags=["tokencache", "diffusion", "token-caching"])
        steps = f", calibrated for {self.steps} sampling steps" if self.steps is not None else ""
        schedule = self.config.schedule_of(self.steps)
        return (
            f"---\n{data.to_yaml()}\n---\n\n# TokenCache plan for a {self.base['class']}\n\n"
            f"Ratio {self.config.ratio}, I-steps: {schedule}{steps}. For exactly the base model whose fingerprint is in "
            f'`{_MANIFEST}`.\n\n```python\npipe = tokencache_compile.transform(pipe, "this repository\'s id")\n```\n'
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        model: nn.Module,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> CacheArtefact:
        """Read an artefact from a directory or a repository of the hub, and check all of it.

        Args:
            model: the base model, or a Dispatcher of it; the predictor is rebuilt from its first block. It is not changed: an
                adapter is read by :func:`load_lora`, which :func:`tokencache_compile.transform` calls.
            revision, cache_dir, token, local_files_only: as for ``huggingface_hub.snapshot_download``; for a hub id only.

        Raises:
            ConfigError: nothing is found; a file is missing, added or changed; the format is another; a setting is invalid; the
                artefact is for another base model; or the predictor does not fit.
        """
        base = base_model(model)
        folder = _locate(name_or_path, revision, cache_dir, token, local_files_only)
        manifest = _read_manifest(folder / _MANIFEST)
        _check_files(folder, manifest["files"])
        config = _config_of(manifest["config"], folder / _MANIFEST)
        _check_base(manifest["base"], base, str(folder))
        listed = manifest["files"]
        try:
            return cls(
                config=config,
                base=manifest["base"],
                predictor=_load_predictor(folder / _PREDICTOR, base) if _PREDICTOR in listed else None,
                lora_path=folder / "lora" if _ADAPTER_FILES[0] in listed else None,
                calibration_path=folder / _CALIBRATION if _CALIBRATION in listed else None,
                steps=manifest["steps"],
                provenance=manifest["provenance"],
            )
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload TokenCache artefact",
    ) -> CommitInfo:
        """Upload the artefact as one commit to a repository of the hub, which is created if it is not there.

        Args:
            private: for a new repository; None takes the account's default.
            revision: an existing branch; None is the main one.

        Raises:
            ConfigError: as :meth:`save_pretrained`.
            huggingface_hub's errors: the hub cannot be reached or refuses.
        """
        api = HfApi(token=token, library_name=LIBRARY, library_version=version(LIBRARY))
        with TemporaryDirectory() as scratch:
            folder = Path(scratch, "artefact")
            self.save_pretrained(folder)
            created = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=list(_DATA_FILES),  # what an older artefact had and this one has not
            )


# -- writing ----------------------------------------------------------------------------------------------------------


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; pass a directory to save the artefact in.")
    held = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if others := sorted(held - {_MANIFEST, _CARD, *_DATA_FILES}):
        raise ConfigError(f"{target} holds {others[0]}, which is not part of an artefact and would be lost. Pass a directory of its own.")
    if held and _MANIFEST not in held:
        raise ConfigError(f"{target} holds files and no {_MANIFEST}, so it is not an artefact to replace. Pass a directory of its own.")


def _copy(source: Path, target: Path, remedy: str) -> None:
    if not source.is_file():
        raise ConfigError(f"{source} is needed and is no file. {remedy}")
    if target.suffix == ".safetensors":
        _check_safetensors(source, remedy)
    shutil.copyfile(source, target)


def _check_safetensors(path: Path, remedy: str) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file ({error}). {remedy}") from error


# -- reading ----------------------------------------------------------------------------------------------------------


def _locate(
    name_or_path: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or not isinstance(name_or_path, str):
        raise ConfigError(f"{path} is not a directory. Pass the directory of an artefact, or a hub id as a string.")
    try:
        return Path(
            snapshot_download(
                name_or_path,
                revision=revision,
                cache_dir=os.fspath(cache_dir) if cache_dir is not None else None,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=[_MANIFEST, *_DATA_FILES],
                library_name=LIBRARY,
                library_version=version(LIBRARY),
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{name_or_path!r} is no directory, and the hub did not give it: {reason} "
            "Check the name, the revision, the token and the network."
        ) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, every field of its type; the settings in it are still to be checked."""
    remedy = "Save or download the artefact again."
    if not path.is_file():
        raise ConfigError(f"{path} is missing, so {path.parent} is no artefact. Pass the directory that save_pretrained wrote.")
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}. {remedy}") from error
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {found!r}, and this package ({version(LIBRARY)}) reads version {FORMAT_VERSION}. "
            "Install the package that wrote it, or make the artefact again."
        )
    kinds: dict[str, Any] = {"config": dict, "steps": (int, type(None)), "provenance": dict, "base": dict, "files": dict}
    if wrong := sorted(name for name, kind in kinds.items() if name not in manifest or not isinstance(manifest[name], kind)):
        raise ConfigError(f"{path} has no valid {', '.join(wrong)}. {remedy}")
    base = manifest["base"]
    if not isinstance(base.get("tensors"), dict) or not isinstance(base.get("weights"), dict) or not isinstance(base.get("class"), str):
        raise ConfigError(f"{path} has no valid base: the base model's class, tensors and weights are needed. {remedy}")
    result: dict[str, Any] = manifest
    return result


def read_config(folder: Path) -> CacheConfig:
    """The settings of an artefact directory, its files checked, without its base model.

    Raises:
        ConfigError: as for :meth:`CacheArtefact.from_pretrained`.
    """
    manifest = _read_manifest(folder / _MANIFEST)
    _check_files(folder, manifest["files"])
    return _config_of(manifest["config"], folder / _MANIFEST)


def _check_files(folder: Path, listed: Mapping[str, Any]) -> None:
    remedy = "Save or download the artefact again."
    if unknown := sorted(set(listed) - set(_DATA_FILES)):
        raise ConfigError(f"{folder / _MANIFEST} lists {unknown[0]!r}, which is no file of an artefact. {remedy}")
    if listed.keys() & set(_ADAPTER_FILES) not in (set(), set(_ADAPTER_FILES)):
        raise ConfigError(f"{folder / _MANIFEST} lists one of {' and '.join(_ADAPTER_FILES)}; an adapter is both. {remedy}")
    for name in _DATA_FILES:
        path = folder / name
        if path.is_file() and name not in listed:
            raise ConfigError(f"{path} is there, and {_MANIFEST} does not list it. Remove it, or save the artefact again.")
        if name not in listed:
            continue
        if not path.is_file():
            raise ConfigError(f"{path} is missing. {remedy}")
        if (found := sha256(path)) != listed[name]:
            raise ConfigError(f"{path} was changed or cut short: its SHA-256 is {found}, and {_MANIFEST} says {listed[name]}. {remedy}")


def _config_of(value: dict[str, Any], path: Path) -> CacheConfig:
    try:
        return from_json(CacheConfig, value, f"{path}: config")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_base(base: Mapping[str, Any], model: nn.Module, what: str) -> None:
    try:
        reason = explain_difference(base, fingerprint(model))
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{what} has no readable fingerprint of its base model. Save or download the artefact again.") from error
    if reason is not None:
        raise ConfigError(
            f"{what} was made for another base model: compared with that, this one differs: {reason}. "
            "Load the base model it was made for, or calibrate for this one."
        )


def _load_predictor(path: Path, model: nn.Module) -> CachePredictor:
    """The saved predictor on the model's device and in its dtype, in eval mode, around a copy of the model's first block."""
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path.name} is no safetensors file ({error}). Save the artefact again.") from error
    head, blocks = state.get("head.weight"), list(candidate_blocks(model).values())
    if head is None or head.dim() != 2 or not blocks:
        shape = None if head is None else list(head.shape)
        raise ConfigError(
            f"the predictor does not fit this model: its head.weight [blocks, channels] is {shape}, and the model has {len(blocks)} "
            "blocks. Train a predictor for this model."
        )
    num_blocks, channels = head.shape
    predictor = CachePredictor(blocks[0], channels, num_blocks).eval()
    own, found = _kinds(predictor.state_dict()), _kinds(state)
    different = [f"{n} is {found.get(n)} and not {own.get(n)}" for n in sorted(own.keys() | found.keys()) if own.get(n) != found.get(n)]
    if num_blocks > len(blocks):
        different.insert(0, f"its head scores {num_blocks} blocks, and the model has {len(blocks)}")
    if different:
        raise ConfigError(
            f"the predictor does not fit this model: {'; '.join(different[:3])}. "
            "Train a predictor for this model, or remove the adapters from its first block."
        )
    predictor.load_state_dict(state)
    return predictor


def _kinds(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Shapes, and dtypes where they are no floating-point ones, which are cast to each other."""
    kinds = {name: "float" if t.is_floating_point() else str(t.dtype).removeprefix("torch.") for name, t in state.items()}
    return {name: f"{kind} {list(state[name].shape)}" for name, kind in kinds.items()}


# -- the adapter ------------------------------------------------------------------------------------------------------


def load_lora(model: nn.Module, path: str | os.PathLike[str]) -> tuple[LowRankUpdate, ...]:
    """The peft adapter in directory ``path`` as what P-steps add to the linears of ``model``, which is left as it is.

    Raises:
        ConfigError: it is no adapter, or more than plain LoRA of linears; it does not fit the model, or the model carries it already.
    """
    folder = Path(path)
    config, weights = _read_adapter(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        found = _LORA_WEIGHT.fullmatch(name)
        if found is None:
            raise ConfigError(f"the adapter in {folder} holds {name}, which is no weight of LoRA. {_PLAIN_LORA}")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    if reason := next((r for r in (_misfit(model, module, pair) for module, pair in pairs.items()) if r), None):
        raise ConfigError(
            f"the adapter in {folder} does not fit this {type(model).__name__}: {reason}. Use it with the model it was trained on."
        )
    if _carries(model, pairs):
        raise ConfigError(
            f"this {type(model).__name__} carries the adapter in {folder} already, in every step, and it is meant for P-steps alone. "
            "Delete it there; the artefact brings it."
        )

    def scale(rank: int) -> float:
        return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)

    return tuple(LowRankUpdate(module, pair["A"], scale(len(pair["A"])) * pair["B"]) for module, pair in pairs.items())


def _misfit(model: nn.Module, module: str, pair: Mapping[str, Tensor]) -> str | None:
    """Why the weights ``pair`` (A [r, in], B [out, r]) cannot stand beside the linear at ``module``; None where they can."""
    if missing := {"A", "B"} - pair.keys():
        return f"it has no weights lora_{missing.pop()} for {module}"
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        return f"the model has no {module}"
    layer = getattr(layer, "base_layer", layer)  # where the model carries another adapter
    if not isinstance(layer, nn.Linear):
        return f"{module} is no torch.nn.Linear"
    down, up = tuple(pair["A"].shape), tuple(pair["B"].shape)
    rank = down[0] if down else 0
    if down != (rank, layer.in_features) or up != (layer.out_features, rank):
        return f"{module} is {layer.in_features} → {layer.out_features}, and the adapter's A and B are {down} and {up}"
    return None


def _carries(model: nn.Module, pairs: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether an adapter of the same weights is part of ``model``, under any name."""
    module, pair = next(iter(pairs.items()))
    carried = [p for name, p in model.named_parameters() if name.startswith(f"{module}.lora_A.")]
    return any(p.shape == pair["A"].shape and torch.equal(p.detach().cpu(), pair["A"].to(p.dtype)) for p in carried)


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of a plain LoRA adapter."""
    for name in _ADAPTER_FILES:
        if not Path(folder, Path(name).name).is_file():
            raise ConfigError(f"{folder} has no {Path(name).name}, so it is no adapter. A peft adapter's save_pretrained writes it.")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except ValueError as error:
        raise ConfigError(f"{folder / 'adapter_config.json'} is no JSON: {error}. Save the adapter again.") from error
    except SafetensorError as error:
        raise ConfigError(f"the adapter in {folder} is no safetensors file ({error}). Save it again.") from error
    known = isinstance(config, dict) and config.get("peft_type") == "LORA" and isinstance(config.get("lora_alpha"), int | float)
    if not known or not weights:
        raise ConfigError(f"the adapter in {folder} is none of peft's LORA. {_PLAIN_LORA}")
    for name, value in config.items():
        drawn = name == "init_lora_weights" and value in (True, "gaussian")  # others change the base weights
        if name not in _LORA_SETTINGS and not drawn and value not in (None, False, "none", {}, []):
            raise ConfigError(f"the adapter in {folder} has {name}={value!r}. {_PLAIN_LORA}")
    return config, weights
