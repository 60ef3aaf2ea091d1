"""Training tokenizers on text: byte-level BPE, WordPiece and Unigram, each in the dress of a family of encoders.

The same texts give the same files, byte for byte. `tokenizers` gives that for BPE. Its WordPiece numbers the letters
inside words, and its Unigram adds probabilities, in the order of a hash table seeded anew in every process: WordPiece
is therefore told the numbers, and Unigram is left to SentencePiece.
"""

import io
import json
from collections.abc import Iterable

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlm.data.tokenizer import Tokenizer
from mlm.errors import UserError, one_line

# What tokenizer.algorithm="auto" takes for the models of a family: what the published ones of it have.
FAMILIES = {
    "bpe": ("roberta", "roberta-prelayernorm", "modernbert"),
    "wordpiece": ("bert", "distilbert", "electra", "roformer"),
    "unigram": ("albert", "camembert", "xlm-roberta"),
}
ALGORITHMS = ("auto", *FAMILIES)
# Special tokens in the order of their ids.
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALBERT = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
# Of the letters in the text WordPiece and Unigram keep the most frequent ones that make up this share of it, as
# SentencePiece does by default; a text full of rare signs would leave no room for words.
_COVERAGE = 0.9995
# SentencePiece's sums, and so its figures' last digits, follow the number of threads: it is the same everywhere.
_THREADS = 16


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    max_seq_length: int,
    algorithm: str = "auto",
    model_type: str = "roberta",
    lowercase: bool = False,
    backend: str = "auto",
    name: str = "trained",
) -> Tokenizer:
    """Trains a tokenizer for models of one family. The same texts give the same files, byte for byte.

    Args:
      texts: documents.
      vocab_size: entries, special tokens included; there are fewer when the texts have no more to give.
      max_seq_length: what the saved tokenizer tells its users to cut at.
      algorithm: "bpe" (of bytes), "wordpiece", "unigram", or "auto": that of the family.
      model_type: the family, which also chooses the names and ids of the special tokens.
      lowercase: fold case and drop accents, as the "uncased" models do.
      backend: of the `Tokenizer`.
      name: of the `Tokenizer`.

    Raises:
      UserError: the options do not go together, or `vocab_size` is too small for the texts.
    """
    algorithm = chosen_algorithm(algorithm, model_type=model_type)
    if lowercase and (algorithm == "bpe" or (algorithm == "unigram" and model_type != "albert")):
        raise UserError(
            f"tokenizer.lowercase=True does not go with the {algorithm} tokenizer of {model_type} models, which has no "
            'uncased form; set it to False, or --config.tokenizer.algorithm="wordpiece"'
        )
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[algorithm]
    options = {"lowercase": lowercase, "model_max_length": max_seq_length}
    hf = train(texts, vocab_size=vocab_size, model_type=model_type, **options)
    return Tokenizer(hf, name=name, backend=backend)


def chosen_algorithm(algorithm: str, *, model_type: str) -> str:
    """`algorithm`, or the one of the family for "auto"; UserError for one that is not known."""
    if algorithm not in ALGORITHMS:
        raise UserError(f"tokenizer.algorithm={algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    if algorithm != "auto":
        return algorithm
    return next((known for known, family in FAMILIES.items() if model_type in family), "bpe")


def _train_bpe(
    texts: Iterable[str], *, vocab_size: int, model_type: str, lowercase: bool, model_max_length: int
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE: any text in 256 letters and their merges (GPT-2's; RoBERTa's and ModernBERT's tokenizers)."""
    del lowercase
    special = BERT if model_type == "modernbert" else ROBERTA
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(special)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(special)} special tokens need at "
            f"least {smallest}"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if model_type == "modernbert":
        bpe.normalizer = normalizers.NFC()
    # It takes the space before it, so that what fills it brings its own.
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
        bpe.post_processor = _template(begin, end, ids=(2, 3))
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            pad_token=pad,
            unk_token=unk,
            cls_token=begin,
            sep_token=end,
            mask_token=mask,
            # No segments: the model takes no token_type_ids.
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=model_max_length,
        )
    model = json.loads(bpe.to_str())["model"]
    return transformers.RobertaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        mask_token=mask,
        model_max_length=model_max_length,
    )


def _template(begin: str, end: str, *, ids: tuple[int, int]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=list(zip((begin, end), ids, strict=True)),
    )


def _train_wordpiece(
    texts: Iterable[str], *, vocab_size: int, model_type: str, lowercase: bool, model_max_length: int
) -> transformers.PreTrainedTokenizerFast:
    """WordPiece: words and signs, cut into the longest pieces from the left (BERT's tokenizer)."""
    del model_type
    options = {"do_lower_case": lowercase, "model_max_length": model_max_length}
    # With the steps before the pieces as the finished tokenizer has them.
    steps = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(BERT)}, **options).backend_tokenizer
    texts = [steps.normalizer.normalize_str(text) for text in texts]
    alphabet = _alphabet(texts)

    def train(*, vocab_size: int, first: list[str]) -> list[str]:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=BERT[1]))
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

    # Letters inside words get their ids in the order of a hash table, and merges of one frequency go by ids. What is
    # called special has its id from the start.
    letters = sorted(set(train(vocab_size=0, first=list(BERT))) - set(BERT))
    smallest = len(BERT) + len(letters)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: the letters of this text, at the beginning of words and "
            f"in them, and {len(BERT)} special tokens need at least {smallest}"
        )
    pieces = train(vocab_size=vocab_size, first=[*BERT, *letters])
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, **options)


def _alphabet(texts: Iterable[str]) -> list[str]:
    """The letters that make up `_COVERAGE` of the texts, in the order of their code points; white space aside."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        codes, found = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_counts=True)
        counts[codes] += found
    counts[[code for code in np.flatnonzero(counts) if chr(code).isspace()]] = 0
    # Of equal counts the lower code point comes first.
    order = np.argsort(-counts, kind="stable")
    cumulative = np.cumsum(counts[order])
    kept = order[: np.searchsorted(cumulative, _COVERAGE * cumulative[-1]) + 1]
    return sorted(chr(code) for code in kept if counts[code])


def _train_unigram(
    texts: Iterable[str], *, vocab_size: int, model_type: str, lowercase: bool, model_max_length: int
) -> transformers.PreTrainedTokenizerFast:
    """Unigram: the likeliest cut into pieces with probabilities (Kudo 2018), after NFKC as SentencePiece has it."""
    # Imported here: only this needs it.
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    dress, special, options = transformers.XLMRobertaTokenizer, ROBERTA, {}
    if model_type == "camembert":
        # Without the unused entries that the published one has for historical reasons.
        dress, options = transformers.CamembertTokenizer, {"additional_special_tokens": []}
    elif model_type == "albert":
        dress, special, options = transformers.AlbertTokenizer, ALBERT, {"do_lower_case": lowercase}
        options["keep_accents"] = not lowercase
    blank = dress(vocab=[(token, 0.0) for token in special], **options)
    normalizer = blank.backend_tokenizer.normalizer
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts) if normalizer is None else map(normalizer.normalize_str, texts),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            # Fewer of a small text.
            hard_vocab_limit=False,
            character_coverage=_COVERAGE,
            bos_piece=blank.cls_token,
            bos_id=blank.cls_token_id,
            eos_piece=blank.sep_token,
            eos_id=blank.sep_token_id,
            pad_piece=blank.pad_token,
            pad_id=blank.pad_token_id,
            unk_piece=blank.unk_token,
            unk_id=blank.unk_token_id,
            # It takes the id that is left, the last.
            control_symbols=[blank.mask_token],
            # Longer documents would be left out without a word.
            max_sentence_length=1 << 30,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: no Unigram tokenizer of this size can be trained on this text "
            f"({one_line(error)})"
        ) from None
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    return dress(
        vocab=[(piece.piece, piece.score) for piece in model.pieces],
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap,
        model_max_length=model_max_length,
        **options,
    )
