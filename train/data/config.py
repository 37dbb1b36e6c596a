"""The configuration section `data`."""

import re
from dataclasses import dataclass

HUB = re.compile(r"hub:\w[\w.-]*(/\w[\w.-]*)?(:.*)?\Z")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """source: "stdlib" (the source code of Python's standard library), "retrieval" (generated tasks, see
    train.data.retrieval), the path of a .txt, .jsonl or .parquet file or of a directory of such files, or
    "hub:<dataset id>[:<config name>]" for the `datasets` library.

    text_field: column or key of the text in jsonl, parquet and hub sources. split: of a hub data set.
    validation_fraction: of the documents, or, if there are few, of the text. sequence_length: tokens of a block.
    isolate_documents: attention does not cross documents that are packed into the same block. max_bytes: stop reading
    after about so many bytes of text. Raises ValueError that names the key.
    """

    source: str = "stdlib"
    text_field: str = "text"
    split: str = "train"
    validation_fraction: float = 0.05
    sequence_length: int = 256
    isolate_documents: bool = False
    seed: int = 0
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must be between 0 and 1; 0.05 is usual"
            )
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length={self.sequence_length} must be at least 1")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data.max_bytes={self.max_bytes} must be at least 1, or null for all text")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed={self.seed} must be between 0 and {2**32 - 1}")
        if not self.source:
            raise ValueError("data.source is empty; give 'stdlib', 'retrieval', a path or 'hub:<dataset id>'")
        if self.source.startswith("hub:") and not HUB.match(self.source):
            raise ValueError(
                f"data.source={self.source!r} names no dataset; give 'hub:<dataset id>' with an id such as name or "
                "owner/name, or a local path without 'hub:'"
            )
