"""Where documents come from: local files and Hub data sets, read by index through `datasets`.

A corpus is opened once, memory-mapped, and then any process can ask for document i. Its fingerprint
says what it was: names, sizes and hashes of local files, or repository and commit on the Hub.
"""

from pathlib import Path

import datasets

from shared.errors import CorpusError
from shared.format.manifest import CorpusInfo
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.columns import columns_of
from teacher_cache.corpus.corpus import Corpus
from teacher_cache.corpus.files import loader_of, local_files, of_split
from teacher_cache.corpus.hub import open_hub
from teacher_cache.corpus.local import columns_in_file, open_local


def open_corpus(config: CaptureConfig) -> Corpus:
    """Opens the corpus a config asks for, and picks its columns."""
    datasets.disable_progress_bars()
    files = local_files(config.corpus)
    if files:
        documents, fingerprint = open_local(config, of_split(files, config.split))
    else:
        documents, fingerprint = open_hub(config)
    if config.limit_documents:
        documents = documents.select(range(min(config.limit_documents, len(documents))))
    if len(documents) == 0:
        raise CorpusError(
            f"{config.corpus}: no document in {config.split}. Check --split and the file."
        )
    columns = (
        columns_in_file(config, files[0].suffix).names
        if files and loader_of(files[0]) == "conll"
        else columns_of(documents.column_names, config)
    )
    info = CorpusInfo(
        source=_shown(config.corpus, local=bool(files)),
        fingerprint=fingerprint,
        num_documents=len(documents),
    )
    return Corpus(info, documents, columns)


def _shown(source: str, *, local: bool) -> str:
    """No absolute path in a manifest: the same corpus elsewhere is the same corpus."""
    return Path(source).name if local else source
