"""Tokenizers: load, save; a column of strings -> one flat array of token ids with offsets."""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from absl import logging

from mlm.data.sources import source as sources
from mlm.errors import UserError, one_line

BACKENDS = ("auto", "gigatoken", "tokenizers")
# One of them is in every directory with a tokenizer.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# What the two backends are compared on: this, the special tokens' names, and the first documents.
_PROBES = (
    "",
    "  two  spaces\n\n\ttab ",
    "don't I'LL 1234567 x\u00b2",
    "\u00e9\U0001f642 e\u0301 \u4e2d\u6587\u200d ",
)
_CHECKED_DOCUMENTS = 256
_CHECKED_BYTES = 1 << 20
# `tokenizers` gets texts in parts of this many bytes, from two threads by turns: it encodes on all cores and lets go
# of the interpreter, in which the other thread makes an array of the ids of the part before.
_PART_BYTES = 256 << 10


class Tokenizer:
    """A transformers tokenizer and the fast backend that makes its ids.

    Attributes:
        hf: the transformers tokenizer.
        name: for messages and the model card.
        num_ids: highest id + 1, added tokens included.
        bos_id, eos_id: laid around a document ([CLS] and [SEP] for BERT-likes); pad_id, mask_id.
        special_ids: sorted; every id that stands for no text.
        unused_ids: sorted; ids under num_ids that no token has.
    """

    def __init__(self, hf: transformers.PreTrainedTokenizerFast, *, name: str, backend: str = "auto"):
        if backend not in BACKENDS:
            raise UserError(f"tokenizer.backend={backend!r} is not known: choose one of {', '.join(BACKENDS)}")
        self.hf = hf
        self.name = name
        if hf.mask_token_id is None:
            raise UserError(
                f"the tokenizer {name!r} has no mask token, which masked language modelling needs: "
                "choose another, or add one and save it"
            )
        self.mask_id: int = hf.mask_token_id
        self.bos_id: int = self._needed_id("begin", hf.cls_token_id, hf.bos_token_id)
        self.eos_id: int = self._needed_id("end", hf.sep_token_id, hf.eos_token_id)
        self.pad_id: int = self._needed_id("padding", hf.pad_token_id)
        self.num_ids: int = max(hf.get_vocab().values()) + 1
        self.unused_ids: tuple[int, ...] = tuple(sorted(set(range(self.num_ids)) - set(hf.get_vocab().values())))
        if self.pad_id in (self.bos_id, self.eos_id, self.mask_id):
            raise UserError(f"the tokenizer {name!r} pads with a token that means something else: give it a pad token")
        special = {id for id, token in hf.added_tokens_decoder.items() if token.special}
        self.special_ids: tuple[int, ...] = tuple(sorted(special | set(hf.all_special_ids)))
        # Special, and not "unknown", which stands for a piece of text.
        self._laid_ids = np.array([id for id in self.special_ids if id != hf.unk_token_id], np.int32)

        model = json.loads(hf.backend_tokenizer.to_str())
        self._reference = _text_only(hf.backend_tokenizer)
        self._gigatoken = None if backend == "tokenizers" else _gigatoken(model)
        self._checked = False
        if self._gigatoken is None and backend == "gigatoken":
            raise UserError(
                f"tokenizer.backend='gigatoken' cannot do the tokenizer {name!r}, only byte-level BPE: "
                "use tokenizer.backend='auto' or 'tokenizers'"
            )

    def _needed_id(self, role: str, *candidates: int | None) -> int:
        for candidate in candidates:
            if candidate is not None:
                return candidate
        raise UserError(f"the tokenizer {self.name!r} has no {role} token: choose another, or add one and save it")

    @property
    def backend(self) -> str:
        """The backend in use: "gigatoken" or "tokenizers"."""
        return "tokenizers" if self._gigatoken is None else "gigatoken"

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """N strings without nulls -> ids int32 [T], offsets int64 [N + 1].

        No begin or end tokens are added, nothing is cut, and a text that spells a special token is text. Where a
        vocabulary has no other id for it than the special one (Unigram, or words split at spaces alone), the name is
        left out: begin, end, padding and mask stand only where packing and masking lay them.
        """
        if isinstance(texts, pa.ChunkedArray):
            texts = texts.combine_chunks()
        texts = texts.cast(pa.large_string())
        if self._gigatoken is not None and not self._checked:
            self._check(texts)
        if self._gigatoken is None:
            ids, offsets = _encode_tokenizers(self._reference, texts)
        else:
            ids, offsets = _encode_gigatoken(self._gigatoken, texts)
        is_laid = np.isin(ids, self._laid_ids)
        if not is_laid.any():
            return ids, offsets
        kept = ~is_laid
        return ids[kept], np.concatenate([[0], np.cumsum(kept)])[offsets]

    def _check(self, texts: pa.LargeStringArray) -> None:
        """Falls back to `tokenizers` if gigatoken gives other ids for the head of the first texts."""
        if len(texts) == 0:
            return
        self._checked = True
        lengths = np.diff(_offsets(texts))
        head = min(_CHECKED_DOCUMENTS, int(np.searchsorted(np.cumsum(lengths), _CHECKED_BYTES)) + 1)
        probes = pa.array([*_PROBES, *self.hf.all_special_tokens], pa.large_string())
        texts = pa.concat_arrays([probes, texts.slice(0, head)])
        expected, expected_offsets = _encode_tokenizers(self._reference, texts)
        ids, offsets = _encode_gigatoken(self._gigatoken, texts)
        if not (np.array_equal(offsets, expected_offsets) and np.array_equal(ids, expected)):
            logging.info("gigatoken differs from tokenizers on %s: going on with tokenizers.", self.name)
            self._gigatoken = None

    def save(self, path: str) -> None:
        """Writes the files `AutoTokenizer.from_pretrained(path)` loads."""
        # How this process came by it is nobody else's business.
        for name in ("is_local", "local_files_only"):
            self.hf.init_kwargs.pop(name, None)
        self.hf.save_pretrained(path)


def load_tokenizer(
    tokenizer_name: str, *, cache_dir: str = "", use_fast_tokenizer: bool = True, backend: str = "auto"
) -> Tokenizer:
    """Loads a tokenizer from a local directory or the Hugging Face hub."""
    if not use_fast_tokenizer:
        raise UserError(
            "tokenizer.use_fast_tokenizer=False: only fast tokenizers keep up with a device, and they give "
            "the same ids; leave it True"
        )
    tokenizer_name = os.path.expanduser(tokenizer_name)
    local = os.path.isdir(tokenizer_name)
    if not local and sources.is_local_path(tokenizer_name):
        raise UserError(f"no tokenizer directory {tokenizer_name!r}: check tokenizer.tokenizer_name")
    options = {"cache_dir": cache_dir or None, "use_fast": True}
    try:
        # What is here, or was fetched before, needs no network.
        hf = transformers.AutoTokenizer.from_pretrained(tokenizer_name, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        if local:
            raise UserError(
                f"no tokenizer in {tokenizer_name!r}: {one_line(error)}; check tokenizer.tokenizer_name"
            ) from None
        sources.require_hub(f"the tokenizer {tokenizer_name!r}")
        try:
            hf = transformers.AutoTokenizer.from_pretrained(tokenizer_name, **options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no tokenizer {tokenizer_name!r} on the hub: {one_line(error)}; "
                "check tokenizer.tokenizer_name, or leave it empty to train one"
            ) from None
    if not getattr(hf, "is_fast", False):
        raise UserError(f"the tokenizer {tokenizer_name!r} has no fast version: choose one that has")
    return Tokenizer(hf, name=tokenizer_name, backend=backend)


def read_vocabulary(directory: str) -> dict[str, int] | None:
    """Token -> id of the tokenizer in a directory; None where there is none."""
    if not any(os.path.isfile(os.path.join(directory, name)) for name in _VOCABULARY_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer in {directory!r} cannot be read ({one_line(error)}); fetch it anew, or remove it"
        ) from None


def _text_only(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that takes special tokens in a text for text, and neither cuts nor pads."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def _gigatoken(model: dict):
    """gigatoken's tokenizer for a parsed tokenizer.json, or None where it does not apply."""
    if model["model"]["type"] != "BPE":
        return None
    # Imported here: a tokenizer it cannot do needs neither it nor awkward.
    import gigatoken

    # Without the special tokens, a text that spells one is text. Begin and end are added in packing.py.
    added = [token for token in model["added_tokens"] if not token["special"]]
    plain = {**model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    # It says by one or another of these that it lacks a part of a tokenizer. `tokenizers` has all parts, and is slower.
    try:
        return gigatoken.Tokenizer.from_json(json.dumps(plain))
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        logging.info("gigatoken cannot do this tokenizer (%s): going on with tokenizers.", one_line(error))
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


def _encode_tokenizers(tokenizer: tokenizers.Tokenizer, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    def encode(part: pa.LargeStringArray) -> tuple[np.ndarray, list[int]]:
        encodings = tokenizer.encode_batch_fast(part.to_pylist(), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = [len(document) for document in ids]
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32, sum(lengths)), lengths

    starts = _offsets(texts)
    # A part ends with the document that fills it.
    _, firsts = np.unique((starts[:-1] - starts[0]) // _PART_BYTES, return_index=True)
    parts = [texts.slice(first, stop - first) for first, stop in itertools.pairwise([*firsts.tolist(), len(texts)])]
    with ThreadPoolExecutor(2, thread_name_prefix="mlm-tokenizers") as pool:
        encoded = list(pool.map(encode, parts))
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([length for _, lengths in encoded for length in lengths], out=offsets[1:])
    return np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded)]), offsets


def _offsets(texts: pa.LargeStringArray) -> np.ndarray:
    """int64 [N + 1] byte offsets into the data buffer, the array's own offset heeded."""
    if len(texts) == 0:
        return np.zeros(1, np.int64)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
