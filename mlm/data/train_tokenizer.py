"""Trains tokenizers: byte-level BPE, WordPiece and Unigram, with the special tokens and class of a model family.

The same texts give the same files, byte for byte. `tokenizers` guarantees this for BPE. Its WordPiece assigns ids to
the letters inside words, and its Unigram sums probabilities, in the order of a hash table with a random seed. So
WordPiece gets these ids in advance here, and Unigram is trained with SentencePiece.
"""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlm.data.tokenizer import Tokenizer, post_processor
from mlm.errors import UserError, one_line
from mlm.settings import check_tokenizer_options, resolve_algorithm

# Special tokens in the order of their ids.
_ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ALBERT_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
# WordPiece and Unigram keep the most frequent characters that make up this fraction of the text, SentencePiece's
# default. Without a limit a text with many rare characters would leave no room for words.
_CHARACTER_COVERAGE = 0.9995
# The order of SentencePiece's sums, and so the rounding, depends on the number of threads: use the same everywhere.
_NUM_THREADS = 16


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    max_seq_length: int,
    algorithm: str = "auto",
    model_type: str = "roberta",
    lowercase: bool = False,
    backend: str = "auto",
    marks_words: bool = False,
    name: str = "trained",
) -> Tokenizer:
    """Trains a tokenizer for a model family; the same texts give the same files, byte for byte.

    Args:
      texts: documents.
      vocab_size: entries, special tokens included; the tokenizer has fewer if the texts have too few different words.
      max_seq_length: `model_max_length` of the saved tokenizer.
      algorithm: "bpe" (byte-level), "wordpiece", "unigram", or "auto" for the one of the family.
      model_type: the family, which also determines the names and ids of the special tokens.
      lowercase: lowercase texts and strip accents, as the "uncased" models do.
      backend, marks_words: see `Tokenizer`.
      name: see `Tokenizer`.

    Raises:
      UserError: the options cannot be combined, or `vocab_size` is too small for the texts.
    """
    algorithm = resolve_algorithm(algorithm, model_type=model_type)
    check_tokenizer_options(algorithm, model_type=model_type, vocab_size=vocab_size, lowercase=lowercase)
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[algorithm]
    hf = train(
        texts, vocab_size=vocab_size, model_type=model_type, lowercase=lowercase, model_max_length=max_seq_length
    )
    return Tokenizer(hf, name=name, backend=backend, marks_words=marks_words)


def _train_bpe(
    texts: Iterable[str], *, vocab_size: int, model_type: str, lowercase: bool, model_max_length: int
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, RoBERTa and ModernBERT: the 256 bytes and merges of them encode any text."""
    del lowercase
    special = _BERT_TOKENS if model_type == "modernbert" else _ROBERTA_TOKENS
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if model_type == "modernbert":
        bpe.normalizer = normalizers.NFC()
    # As in RoBERTa the mask token includes the space before it, because the token that replaces it begins with one.
    mask = tokenizers.AddedToken(special[4], lstrip=True, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*special[:4], mask],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if model_type == "modernbert":
        pad, unk, begin, end, _ = special
        bpe.decoder = decoders.ByteLevel()
        bpe.post_processor = post_processor(begin, end, ids=(2, 3))
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            pad_token=pad,
            unk_token=unk,
            cls_token=begin,
            sep_token=end,
            mask_token=mask,
            # ModernBERT has no token_type_ids.
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=model_max_length,
        )
    model = json.loads(bpe.to_str())["model"]
    # Its annotations allow strings only.
    tokenizer_class: Any = transformers.RobertaTokenizer
    return tokenizer_class(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        mask_token=mask,
        model_max_length=model_max_length,
    )


def _train_wordpiece(
    texts: Iterable[str], *, vocab_size: int, model_type: str, lowercase: bool, model_max_length: int
) -> transformers.PreTrainedTokenizerFast:
    """WordPiece, as in BERT: splits words into the longest known pieces, from the left."""
    options: dict[str, Any] = {"do_lower_case": lowercase, "model_max_length": model_max_length}
    if model_type == "distilbert":  # It has no token_type_ids.
        options["model_input_names"] = ["input_ids", "attention_mask"]
    # The normalizer and pre-tokenizer of the finished tokenizer.
    steps = transformers.BertTokenizer(
        vocab={token: i for i, token in enumerate(_BERT_TOKENS)}, **options
    ).backend_tokenizer
    texts = [steps.normalizer.normalize_str(text) for text in texts]
    alphabet = _alphabet(texts)

    def train(*, vocab_size: int, first: list[str]) -> list[str]:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=_BERT_TOKENS[1]))
        tokenizer.pre_tokenizer = steps.pre_tokenizer
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        vocab = tokenizer.get_vocab()
        return sorted(vocab, key=vocab.__getitem__)

    # The trainer gives letters inside words ids in the order of a hash table, and sorts merges of equal frequency by
    # ids. So it is trained twice: without merges, to find the letters; then with the sorted letters as special tokens,
    # which have fixed ids.
    letters = sorted(set(train(vocab_size=0, first=list(_BERT_TOKENS))) - set(_BERT_TOKENS))
    smallest = len(_BERT_TOKENS) + len(letters)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: must be at least {smallest} for this text: its letters, at the "
            f"beginning of words and inside them, and {len(_BERT_TOKENS)} special tokens"
        )
    pieces = train(vocab_size=vocab_size, first=[*_BERT_TOKENS, *letters])
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, **options)


def _alphabet(texts: Iterable[str]) -> list[str]:
    """Returns the most frequent characters, `_CHARACTER_COVERAGE` of the texts without white space, by code point."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        codes, found = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_counts=True)
        counts[codes] += found
    counts[[code for code in np.flatnonzero(counts) if chr(code).isspace()]] = 0
    # Stable: for equal counts the lower code point comes first.
    order = np.argsort(-counts, kind="stable")
    cumulative = np.cumsum(counts[order])
    frequent = order[: np.searchsorted(cumulative, _CHARACTER_COVERAGE * cumulative[-1]) + 1]
    return sorted(chr(code) for code in frequent if counts[code])


def _train_unigram(
    texts: Iterable[str], *, vocab_size: int, model_type: str, lowercase: bool, model_max_length: int
) -> transformers.PreTrainedTokenizerFast:
    """Unigram (Kudo 2018): the most probable segmentation, after SentencePiece's NFKC normalization."""
    # Imported here: the other algorithms do not need it.
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    tokenizer_class: Any = transformers.XLMRobertaTokenizer
    special, options = _ROBERTA_TOKENS, dict[str, Any]()
    if model_type == "camembert":
        # The published tokenizer has unused entries for historical reasons.
        tokenizer_class, options = transformers.CamembertTokenizer, {"additional_special_tokens": []}
    elif model_type == "albert":
        tokenizer_class, special = transformers.AlbertTokenizer, _ALBERT_TOKENS
        options = {"do_lower_case": lowercase, "keep_accents": not lowercase}
    blank = tokenizer_class(vocab=[(token, 0.0) for token in special], **options)
    normalizer = blank.backend_tokenizer.normalizer
    model_file = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts) if normalizer is None else map(normalizer.normalize_str, texts),
            model_writer=model_file,
            model_type="unigram",
            vocab_size=vocab_size,
            # A small text gives fewer entries.
            hard_vocab_limit=False,
            character_coverage=_CHARACTER_COVERAGE,
            bos_piece=blank.cls_token,
            bos_id=blank.cls_token_id,
            eos_piece=blank.sep_token,
            eos_id=blank.sep_token_id,
            pad_piece=blank.pad_token,
            pad_id=blank.pad_token_id,
            unk_piece=blank.unk_token,
            unk_id=blank.unk_token_id,
            # It gets the only free id below 5, the last one.
            control_symbols=[blank.mask_token],
            # The default silently drops long documents.
            max_sentence_length=1 << 30,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: no Unigram tokenizer of this size can be trained on this text "
            f"({one_line(error)}); change it"
        ) from None
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file.getvalue())  # type: ignore[attr-defined]
    return tokenizer_class(
        vocab=[(piece.piece, piece.score) for piece in model.pieces],
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap,
        model_max_length=model_max_length,
        **options,
    )
