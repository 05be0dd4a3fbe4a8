"""What a user names as a model -> `Source`: config, files beside it, and the checkpoint if there is one.

A directory, a config.json, a preset, or a Hub repository id. An export needs no weight data, so of a
repository only the config and the tokenizer are fetched unless the caller asks for the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from v4graph.checkpoint import Checkpoint
from v4graph.config import FILE_NAME, PRESETS, ModelConfig
from v4graph.errors import CheckpointError, ConfigError

SMALL_FILES = (FILE_NAME, "generation_config.json", "tokenizer*.json", "special_tokens_map.json")
WEIGHTS_SUFFIX = ".safetensors"
WEIGHT_FILES = (f"*{WEIGHTS_SUFFIX}", f"*{WEIGHTS_SUFFIX}.index.json")
# Folders of a repository hold other forms of the same model; v4graph reads the top level.
_FOLDERS = "*/*"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        name: What the user called it.
        config: The model.
        checkpoint: Its weights, opened lazily; None for a config alone.
        path: The directory that may hold tokenizer files; None for a preset or a lone config.json.
    """

    name: str
    config: ModelConfig
    checkpoint: Checkpoint | None = None
    path: Path | None = None


def resolve(name: str, *, allow_unknown: bool = False, weights: bool = False) -> Source:
    """Find the model that `name` stands for; an existing path wins over a preset of that name.

    With `weights`, a Hub repository is fetched with its safetensors files.

    Raises:
        ConfigError: nothing has this name, or its config.json is not a model that v4graph knows.
        CheckpointError: its safetensors files cannot be opened.
    """
    path = Path(name).expanduser()
    if not path.exists() and name not in PRESETS and _REPOSITORY.fullmatch(name):
        path = _download(name, weights)
    folder = path if path.is_dir() else path.parent if path.suffix == WEIGHTS_SUFFIX else None
    if folder is not None and path.exists() and any(folder.glob(f"*{WEIGHTS_SUFFIX}*")):
        checkpoint = Checkpoint.open(path, allow_unknown_config_keys=allow_unknown)
        return Source(name, checkpoint.config, checkpoint, folder)
    config = ModelConfig.load(path if path.exists() else name, allow_unknown=allow_unknown)
    return Source(name, config, path=folder)


def open_checkpoint(name: str, *, allow_unknown: bool = False) -> Checkpoint:
    """Open the weights that `name` stands for, fetched from the Hub where it is a repository id.

    Raises:
        ConfigError: as `resolve`.
        CheckpointError: there is no such directory, its files cannot be opened, or it has no weights.
    """
    if not Path(name).expanduser().exists() and not _REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"{name}: no such directory; give a checkpoint directory or a Hub repository id (org/name)."
        )
    checkpoint = resolve(name, allow_unknown=allow_unknown, weights=True).checkpoint
    if checkpoint is None:
        raise CheckpointError(
            f"{name}: no weights here; give a directory with *{WEIGHTS_SUFFIX} files and their config.json."
        )
    return checkpoint


def _download(repository: str, weights: bool) -> Path:
    """Fetch the files of one repository into the Hub's cache and return its snapshot directory."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{repository}: no such directory, and fetching it from the Hub needs huggingface_hub; "
            "install it with `pip install 'v4graph[hub]'`."
        ) from error
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=_FOLDERS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{repository}: no such directory, and the Hub did not deliver a repository of this name "
            f"({type(error).__name__}: {reason})."
        ) from error
