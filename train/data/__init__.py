"""From corpora to batches: documents, train/validation split, tokens on disk, blocks in a deterministic order."""

from train.data.base import IGNORED, Batch, Batches, TextData
from train.data.config import DataConfig
from train.data.loader import BatchStream
from train.data.tokens import TokenData, prepare

__all__ = ["IGNORED", "Batch", "BatchStream", "Batches", "DataConfig", "TextData", "TokenData", "prepare"]
