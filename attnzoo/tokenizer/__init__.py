"""Text to token ids and back, whatever the vocabulary came in."""

from attnzoo.tokenizer.base import StreamDecoder, Tokenizer
from attnzoo.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = ["SentencePieceTokenizer", "StreamDecoder", "Tokenizer"]
