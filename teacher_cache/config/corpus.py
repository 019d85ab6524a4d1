"""Which documents of the corpus are read, and what is a document."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import Option, group


@group("Which documents")
@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Which documents of the corpus, and how they are read."""

    split: Annotated[str, Option(help="Which documents: train, train[:98%], train[100:200].")] = (
        "train"
    )
    limit_documents: Annotated[int, Option(help="At most this many documents; 0: all.", min=0)] = 0
    columns: Annotated[
        tuple[str, ...],
        Option(
            help="Column of the corpus for a role: text=body; of a column file by its number, from "
            "0 or negative from the end: tags=3. Repeatable."
        ),
    ] = ()
    sample_by: Annotated[
        Literal["line", "paragraph", "document"],
        Option(help="What a document is in a .txt file: a line, a paragraph, or the whole file."),
    ] = "line"
    encoding_errors: Annotated[
        Literal["strict", "replace", "ignore"], Option(help="What to do with bytes not UTF-8.")
    ] = "strict"

    @property
    def column_of(self) -> dict[str, str]:
        """Column of the corpus by role."""
        pairs = (pair.partition("=") for pair in self.columns)
        return {role: column for role, _, column in pairs}
