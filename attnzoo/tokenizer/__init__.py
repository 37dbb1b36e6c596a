"""Text to token ids and back, for every supported vocabulary format."""

from attnzoo.tokenizer.base import StreamDecoder, Tokenizer
from attnzoo.tokenizer.foreign_sentencepiece import ForeignSentencePieceTokenizer
from attnzoo.tokenizer.huggingface import HuggingFaceTokenizer, TokenizerSettings
from attnzoo.tokenizer.load import load_tokenizer
from attnzoo.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = [
    "ForeignSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerSettings",
    "load_tokenizer",
]
