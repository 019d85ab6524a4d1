"""Opens a data set of the Hub at the commit that its name means now."""

import json

import datasets
import xxhash

from shared.errors import CorpusError
from teacher_cache.config import CaptureConfig


def open_hub(config: CaptureConfig) -> tuple[datasets.Dataset, str]:
    """The data set, and a hash of repository, commit and configuration."""
    from huggingface_hub import HfApi, errors

    no_connection = errors.HTTPError  # type: ignore[attr-defined]  # of the HTTP client it uses
    name, _, configuration = config.corpus.partition(":")
    try:
        commit = HfApi().dataset_info(name).sha
        documents = datasets.load_dataset(
            name, configuration or None, split=config.split, revision=commit
        )
    except (no_connection, errors.HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"{config.corpus}: no such file or folder, and as a Hub data set it cannot be loaded: "
            f"{reason}"
        ) from error
    parts = [name, commit, configuration]
    return documents, xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
