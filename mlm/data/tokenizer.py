"""Tokenizers: loading, saving, and encoding a column of strings as one flat array of token ids with offsets."""

import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
from absl import logging
from tokenizers import processors

from mlm.data.sources.source import is_local_path, require_hub
from mlm.errors import UserError, one_line
from mlm.settings import WORD_START

# Imported where a tokenizer is loaded: it takes a second, which errors found before that need not wait for.
if TYPE_CHECKING:
    import transformers

# Every directory with a tokenizer has one of these files.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# The two backends are compared on these texts, on the names of the special tokens, and on the first documents.
_PROBE_TEXTS = (
    "",
    "  two  spaces\n\n\ttab ",
    "don't I'LL 1234567 x\u00b2",
    "\u00e9\U0001f642 e\u0301 \u4e2d\u6587\u200d ",
)
# The class that reads all of tokenizer.json; transformers 5 calls it TokenizersBackend and accepts this name.
_GENERAL_CLASS = "PreTrainedTokenizerFast"
_MAX_CHECK_DOCUMENTS = 256
_MAX_CHECK_BYTES = 1 << 20
# Leading characters compared of each later document, and characters shown on either side of a difference.
_MAX_COMPARED_CHARACTERS = 2000
_SHOWN_CHARACTERS = 40
# `tokenizers` encodes texts in parts of this many bytes, from two threads: while one encodes, on all cores and without
# the GIL, the other makes an array of the ids of the previous part.
_PART_BYTES = 256 << 10


class Tokenizer:
    """A transformers tokenizer with a fast backend.

    Args:
        hf: the transformers tokenizer.
        name: for messages and the model card.
        backend: one of settings.BACKENDS.
        marks_words: set the bit `WORD_START` of ids where a word of the tokenizer's pre-tokenizer starts.

    Attributes:
        num_ids: highest id + 1, added tokens included.
        bos_id, eos_id: the ids at the begin and end of a document ([CLS] and [SEP] in BERT).
        pad_id, mask_id: the ids of the padding and mask tokens.
        special_ids: all special ids, sorted.
        unknown_id: the id of the unknown token; None if text never has it, as with byte-level BPE.
        unused_ids: ids below num_ids that no token has, sorted.
    """

    def __init__(
        self,
        hf: "transformers.PreTrainedTokenizerFast",
        *,
        name: str,
        backend: str = "auto",
        marks_words: bool = False,
    ):
        self.hf = hf
        self.name = name
        self.mask_id: int = self._required_id("mask", hf.mask_token_id)
        self.bos_id: int = self._required_id("begin", hf.cls_token_id, hf.bos_token_id)
        self.eos_id: int = self._required_id("end", hf.sep_token_id, hf.eos_token_id)
        self.pad_id: int = self._required_id("padding", hf.pad_token_id)
        self.num_ids: int = max(hf.get_vocab().values()) + 1
        self.unused_ids: tuple[int, ...] = tuple(sorted(set(range(self.num_ids)) - set(hf.get_vocab().values())))
        if self.pad_id in (self.bos_id, self.eos_id, self.mask_id):
            raise UserError(
                f"the tokenizer {name!r}: its padding token is also its begin, end or mask token; "
                "choose another tokenizer, or add a padding token and save it"
            )
        special = {id for id, token in hf.added_tokens_decoder.items() if token.special}
        self.special_ids: tuple[int, ...] = tuple(sorted(special | set(hf.all_special_ids)))
        # The unknown token is special, but it represents text.
        self._structural_ids = np.array([id for id in self.special_ids if id != hf.unk_token_id], np.int32)
        # A specialized class may replace the post-processor of tokenizer.json when it is loaded.
        self._saved_class = _GENERAL_CLASS if self._set_post_processor() else type(hf).__name__

        model = json.loads(hf.backend_tokenizer.to_str())
        has_unknown = any(model["model"].get(key) is not None for key in ("unk_token", "unk_id"))
        self.unknown_id: int | None = hf.unk_token_id if has_unknown else None
        self._reference = text_only(hf.backend_tokenizer)
        self.marks_words = marks_words
        if marks_words and not _has_words(self._reference):
            raise UserError(
                f"the tokenizer {name!r}: does not split text into words, which masking.strategy needs; set that to "
                "'token', or choose another tokenizer"
            )
        # gigatoken does not say where words start.
        self._gigatoken = None if backend == "tokenizers" or marks_words else _gigatoken(model)
        self._checked = False
        self._logged_difference = False
        if self._gigatoken is None and backend == "gigatoken":
            raise UserError(
                f"tokenizer.backend='gigatoken': supports byte-level BPE only, not the tokenizer {name!r}; "
                "set it to 'auto' or 'tokenizers'"
            )

    def _required_id(self, role: str, *candidates: int | None) -> int:
        for candidate in candidates:
            if candidate is not None:
                return candidate
        raise UserError(
            f"the tokenizer {self.name!r}: has no {role} token; choose another tokenizer, or add the token and save it"
        )

    def _set_post_processor(self) -> bool:
        """Makes `hf` add the begin and end tokens of training, if it adds other tokens; returns True if it changed."""
        if self.hf("")["input_ids"] == [self.bos_id, self.eos_id]:
            return False
        begin, end = (str(self.hf.convert_ids_to_tokens(id)) for id in (self.bos_id, self.eos_id))
        self.hf.backend_tokenizer.post_processor = post_processor(begin, end, ids=(self.bos_id, self.eos_id))
        logging.info(
            "the tokenizer %s does not add the begin and end tokens of training, %s and %s; the exported one adds them",
            self.name,
            begin,
            end,
        )
        return True

    @property
    def backend(self) -> str:
        """The backend in use: "gigatoken" or "tokenizers"."""
        return "tokenizers" if self._gigatoken is None else "gigatoken"

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Encodes N strings, none of them null, as ids int32 [T] and offsets int64 [N + 1].

        No begin or end tokens are added, nothing is truncated, and the name of a special token in a text is text. If
        the vocabulary has no id for this name but the special one (Unigram, or words split at spaces only), the name is
        dropped: only packing and masking may insert begin, end, padding and mask tokens. Ids have the bit `WORD_START`
        if this tokenizer marks words.
        """
        if isinstance(texts, pa.ChunkedArray):
            texts = texts.combine_chunks()
        texts = texts.cast(pa.large_string())
        if self._gigatoken is not None and not self._checked:
            self._check(texts)
        if self._gigatoken is None:
            ids, offsets = _encode_tokenizers(self._reference, texts, marks_words=self.marks_words)
        else:
            ids, offsets = _encode_gigatoken(self._gigatoken, texts)
        keep_mask = np.isin(without_word_starts(ids), self._structural_ids, invert=True)
        if keep_mask.all():
            return ids, offsets
        return ids[keep_mask], np.concatenate([[0], np.cumsum(keep_mask)])[offsets]

    def _check(self, texts: pa.LargeStringArray) -> None:
        """Falls back to `tokenizers` if gigatoken gives other ids for the first of these texts."""
        if len(texts) == 0:
            return
        self._checked = True
        lengths = np.diff(_offsets(texts))
        num_texts = min(_MAX_CHECK_DOCUMENTS, int(np.searchsorted(np.cumsum(lengths), _MAX_CHECK_BYTES)) + 1)
        probes = pa.array(
            [*_PROBE_TEXTS, *self.hf.all_special_tokens, *_texts_with_added_tokens(self.hf)], pa.large_string()
        )
        texts = pa.concat_arrays([probes, texts.slice(0, num_texts)])
        expected, expected_offsets = _encode_tokenizers(self._reference, texts)
        ids, offsets = _encode_gigatoken(self._gigatoken, texts)
        if not (np.array_equal(offsets, expected_offsets) and np.array_equal(ids, expected)):
            logging.info("gigatoken gives other ids than tokenizers for %s; using tokenizers", self.name)
            self._gigatoken = None

    def count_differences(self, texts: pa.LargeStringArray) -> int:
        """Returns for how many of the texts, shortened, gigatoken gives other ids than `tokenizers`; logs the first.

        The backend stays the same, because positions in the data count tokens. 0 before the first `encode`, whose
        comparison may change the backend.
        """
        if self._gigatoken is None or not self._checked:
            return 0
        count = 0
        for text in pc.utf8_slice_codeunits(texts, 0, _MAX_COMPARED_CHARACTERS).to_pylist():
            expected = self._reference.encode(text, add_special_tokens=False)
            ids = self._gigatoken.encode(text).tolist()
            if ids == expected.ids:
                continue
            count += 1
            if not self._logged_difference:
                self._logged_difference = True
                pairs = itertools.zip_longest(ids, expected.ids)
                first = next(n for n, (found, wanted) in enumerate(pairs) if found != wanted)
                start = ([start for start, _ in expected.offsets] + [len(text)])[first]
                logging.warning(
                    "gigatoken gives other ids than tokenizers for %s near %r; data/tokenizer_differences counts such "
                    "documents; set tokenizer.backend='tokenizers' in new runs",
                    self.name,
                    text[max(0, start - _SHOWN_CHARACTERS) : start + _SHOWN_CHARACTERS],
                )
        return count

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included; blanks before punctuation stay."""
        ids = without_word_starts(np.asarray(ids, np.int64)).tolist()
        return str(self.hf.decode(ids, clean_up_tokenization_spaces=False))

    def unknown_fraction(self, ids: np.ndarray) -> float:
        """Returns the fraction of unknown tokens among those that represent text; 0 without any."""
        if self.unknown_id is None:
            return 0.0
        ids = without_word_starts(ids)
        is_text = np.isin(ids, self._structural_ids, invert=True)
        return float(np.sum(ids == self.unknown_id) / max(1, np.sum(is_text)))

    def unknown_words(self, texts: Sequence[str], *, count: int = 3) -> list[str]:
        """Returns up to `count` distinct parts of the texts that have no token but the unknown one."""
        found: dict[str, None] = {}
        for encoding, text in zip(self._reference.encode_batch(texts, add_special_tokens=False), texts, strict=True):
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            found |= {text[start:end]: None for id, (start, end) in spans if id == self.unknown_id}
            if len(found) >= count:
                break
        return list(found)[:count]

    def max_tokens(self, max_seq_length: int) -> int:
        """Returns the number of tokens that texts are cut to, for a model that accepts `max_seq_length`.

        A tokenizer that was trained here has the length of the sequences that its model was trained on; longer texts
        would reach positions that no training step has seen.
        """
        return min(self.hf.model_max_length, max_seq_length)

    def save(self, path: str, *, max_seq_length: int | None = None, has_token_types: bool = True) -> None:
        """Writes the files that `AutoTokenizer.from_pretrained(path)` loads, in transformers 4 and 5.

        Args:
            path: the directory.
            max_seq_length: number of tokens that the model accepts, which limits `model_max_length`.
            has_token_types: the model accepts the token types 0 and 1.
        """
        # These say how this process loaded the tokenizer, and would be saved with it.
        for name in ("is_local", "local_files_only"):
            self.hf.init_kwargs.pop(name, None)
        self.hf.save_pretrained(path)
        config_path = os.path.join(path, "tokenizer_config.json")
        with open(config_path, encoding="utf-8") as file:
            fields = json.load(file)
        # transformers 4 does not know the class TokenizersBackend, and expects a dict in extra_special_tokens.
        fields["tokenizer_class"] = _GENERAL_CLASS if self._saved_class == "TokenizersBackend" else self._saved_class
        if isinstance(fields.get("extra_special_tokens"), list):
            fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
        # Defaults that depend on the class or differ between the versions.
        fields["clean_up_tokenization_spaces"] = self.hf.clean_up_tokenization_spaces
        names = self.hf.model_input_names
        fields["model_input_names"] = [name for name in names if has_token_types or name != "token_type_ids"]
        if max_seq_length is not None:
            fields["model_max_length"] = self.max_tokens(max_seq_length)
        with open(config_path, "w", encoding="utf-8") as file:
            json.dump(fields, file, indent=2, sort_keys=True, ensure_ascii=False)
            file.write("\n")


def without_word_starts(ids: np.ndarray) -> np.ndarray:
    """Returns ids without the bits of a tokenizer that marks words."""
    return ids & (WORD_START - 1)


def load_tokenizer(
    tokenizer_name: str, *, cache_dir: str | None = None, backend: str = "auto", marks_words: bool = False
) -> Tokenizer:
    """Loads a tokenizer from a local directory or the Hugging Face hub.

    Raises:
        UserError: there is no such tokenizer, or it is not one for masked language models.
    """
    tokenizer_name = os.path.expanduser(tokenizer_name)
    is_directory = os.path.isdir(tokenizer_name)
    if not is_directory and is_local_path(tokenizer_name):
        raise UserError(f"the tokenizer {tokenizer_name!r}: there is no such directory; check tokenizer.tokenizer_name")
    import transformers  # Imported here: see the top.

    options = {"cache_dir": cache_dir or None, "use_fast": True}
    try:
        # A local or cached tokenizer needs no network.
        hf = transformers.AutoTokenizer.from_pretrained(tokenizer_name, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        if is_directory:
            raise UserError(
                f"the tokenizer {tokenizer_name!r}: cannot be loaded ({one_line(error)}); "
                "check tokenizer.tokenizer_name"
            ) from None
        require_hub(f"the tokenizer {tokenizer_name!r}")
        try:
            hf = transformers.AutoTokenizer.from_pretrained(tokenizer_name, **options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer {tokenizer_name!r}: cannot be loaded from the hub ({one_line(error)}); "
                "check tokenizer.tokenizer_name, or set it to None to train one"
            ) from None
    if not isinstance(hf, transformers.PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {tokenizer_name!r}: has no fast version; choose a tokenizer that has one")
    return Tokenizer(hf, name=tokenizer_name, backend=backend, marks_words=marks_words)


def read_vocabulary(directory: str) -> dict[str, int] | None:
    """Returns token -> id of the tokenizer in a directory, or None if there is no tokenizer."""
    if not any(os.path.isfile(os.path.join(directory, name)) for name in _VOCABULARY_FILES):
        return None
    import transformers  # Imported here: see the top.

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {directory!r}: cannot be loaded ({one_line(error)}); download it again, or remove it"
        ) from None


def post_processor(begin: str, end: str, *, ids: tuple[int, int]) -> processors.TemplateProcessing:
    """Returns the post-processor that adds the begin and end tokens of training, with these ids."""
    return processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, "$B", end],
        special_tokens=list(zip((begin, end), ids, strict=True)),
    )


def text_only(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a copy that encodes names of special tokens as text, and neither truncates nor pads."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def _texts_with_added_tokens(hf: "transformers.PreTrainedTokenizerFast") -> list[str]:
    """Returns texts that show whether added tokens are found within words, and what becomes of blanks around them."""
    tokens = [token.content for token in hf.added_tokens_decoder.values() if not token.special]
    forms = ("{}", "a{}", "{}s", "the {} and", "the {}, ({})", " {} ", "{}{}", "{}\n")
    return [form.format(*[name] * 2) for token in tokens for name in {token, token.upper()} for form in forms]


def _gigatoken(model: dict):
    """Returns gigatoken's tokenizer for a parsed tokenizer.json, or None if it does not support it."""
    if model["model"]["type"] != "BPE":
        return None
    # Imported here: other tokenizers need neither gigatoken nor awkward.
    import gigatoken

    # Without the special tokens, their names in a text are encoded as text. packing.py adds begin and end tokens.
    added = [token for token in model["added_tokens"] if not token["special"]]
    plain = {**model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    try:
        return gigatoken.Tokenizer.from_json(json.dumps(plain))
    # It raises any of these for a component that it does not support. `tokenizers` supports all, and is slower.
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        logging.info("gigatoken does not support this tokenizer (%s); using tokenizers", one_line(error))
        return None


def _encode_gigatoken(tokenizer, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    import awkward as ak

    offsets = _offsets(texts)
    data = texts.buffers()[2]
    data = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
    strings = ak.contents.ListOffsetArray(ak.index.Index64(offsets), characters, parameters={"__array__": "string"})
    layout = tokenizer.encode_batch(ak.Array(strings)).layout
    ids = np.asarray(layout.content.data).view(np.int32)
    token_offsets = np.asarray(layout.offsets.data)
    return ids[token_offsets[0] : token_offsets[-1]], token_offsets - token_offsets[0]


def _has_words(tokenizer: tokenizers.Tokenizer) -> bool:
    return len(set(tokenizer.encode("one two three", add_special_tokens=False).word_ids)) > 1


def _encode_tokenizers(
    tokenizer: tokenizers.Tokenizer, texts: pa.LargeStringArray, *, marks_words: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    # The fast version does not say which word a token belongs to.
    encode_batch = tokenizer.encode_batch if marks_words else tokenizer.encode_batch_fast

    def flat(values: list[list[Any]], count: int) -> np.ndarray:
        return np.fromiter(itertools.chain.from_iterable(values), np.int32, count)

    def encode(part: pa.LargeStringArray) -> tuple[np.ndarray, list[int]]:
        encodings = encode_batch(part.to_pylist(), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = [len(document) for document in ids]
        ids_T = flat(ids, sum(lengths))
        if marks_words:
            words_T = flat([encoding.word_ids for encoding in encodings], sum(lengths))
            starts_T = np.diff(words_T, prepend=-1) != 0
            firsts = np.cumsum([0, *lengths[:-1]])
            starts_T[firsts[firsts < len(starts_T)]] = True
            ids_T[starts_T] |= WORD_START
        return ids_T, lengths

    starts = _offsets(texts)
    # A document is in the part in which it starts.
    _, firsts = np.unique((starts[:-1] - starts[0]) // _PART_BYTES, return_index=True)
    parts = [texts.slice(first, stop - first) for first, stop in itertools.pairwise([*firsts.tolist(), len(texts)])]
    with ThreadPoolExecutor(2, thread_name_prefix="mlm-tokenizers") as pool:
        encoded = list(pool.map(encode, parts))
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([length for _, lengths in encoded for length in lengths], out=offsets[1:])
    return np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded)]), offsets


def _offsets(texts: pa.LargeStringArray) -> np.ndarray:
    """Returns int64 [N + 1]: byte offsets into the data buffer, of a sliced array too."""
    if len(texts) == 0:
        return np.zeros(1, np.int64)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
