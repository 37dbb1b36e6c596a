"""Converts a tokenizer that was trained here to a tokenizer.json, for transformers."""

from attnzoo.tokenizer.byte_table import SPACE
from attnzoo.tokenizer.gguf import USER_DEFINED, merges_by_score
from attnzoo.tokenizer.huggingface import HuggingFaceTokenizer, TokenizerSettings, import_tokenizers
from attnzoo.tokenizer.sentencepiece import SPECIAL, SentencePieceTokenizer, is_bpe, read_pieces


def to_huggingface(tokenizer: SentencePieceTokenizer) -> HuggingFaceTokenizer:
    """A tokenizer of the package tokenizers that gives the same ids for the same text.

    The vocabulary has a space where sentencepiece writes U+2581, so that a literal U+2581 in a text becomes its three
    bytes, as in `SentencePieceTokenizer`. Also as there, `<s>` written in a text stays text (`split_special_tokens`).
    Raises ValueError for a model that is not BPE, or has user-defined pieces of more than one character.
    """
    import_tokenizers()
    from tokenizers import AddedToken, decoders, processors
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    if not is_bpe(tokenizer.model):
        raise ValueError("the tokenizer is not BPE and has no form as tokenizer.json; train it with train.tokenizer")
    spellings, scores, kinds = zip(*read_pieces(tokenizer.model), strict=True)
    pieces = [spelling.replace(SPACE, " ") for spelling in spellings]
    for piece, kind in zip(pieces, kinds, strict=True):
        # A piece of one character needs no merge rule.
        if kind == USER_DEFINED and len(piece) != 1:
            raise ValueError(
                f"the tokenizer has the user-defined piece {piece!r} of more than one character, which has no form as "
                "tokenizer.json; train it with train.tokenizer"
            )
    vocab = {piece: token for token, piece in enumerate(pieces)}
    merges = merges_by_score(pieces, list(scores), list(kinds))
    backend = Backend(BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bos = pieces[tokenizer.bos_id]
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{bos}:0", "$A:0"],
        pair=[f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"],
        special_tokens=[(bos, tokenizer.bos_id)],
    )
    settings = TokenizerSettings(
        bos_token=bos,
        eos_token=pieces[tokenizer.eos_id],
        pad_token=pieces[tokenizer.pad_id],
        stop_ids=frozenset(tokenizer.stop_ids - {tokenizer.eos_id}),
        chat_template=tokenizer.chat_template,
        split_special_tokens=True,
    )
    return HuggingFaceTokenizer(backend, settings, source="a converted tokenizer")
