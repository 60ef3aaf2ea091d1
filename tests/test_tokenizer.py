import itertools
import json
import logging

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import transformers

from mlm.data import tokenizer as tokenizer_lib
from mlm.data.train_tokenizer import train_tokenizer
from mlm.errors import UserError
from mlm.settings import WORD_START

TEXT = "the quick brown fox jumps over a lazy dog and the dog isn't amused: 1234 times, é or 🙂"
RNG = np.random.default_rng(0)
CORPUS = [" ".join(RNG.choice(TEXT.split(), 12)) for _ in range(300)]
# Special tokens, white space and rare characters.
ODD = [
    "a <mask> b</s><s> <pad><unk>",
    "",
    " ",
    "\n\n  tab\t",
    "é🙂 ΑΒΓ 中文",
    "don't I'LL",
    "\u200d a\u0301",
    "<mask>",
]


def train(**kwargs):
    return train_tokenizer(iter(CORPUS), **{"vocab_size": 300, "max_seq_length": 32} | kwargs)


def word_piece(path):
    """Saves a BERT-like tokenizer in a directory and returns its path."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 5, "dog": 6, "##s": 7},
            unk_token="[UNK]",
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    named = {f"{name}_token": token for name, token in named.items()}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(path)
    return str(path)


def ragged(tokenizer, texts):
    ids, offsets = tokenizer.encode(texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts))
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    assert len(ids) == offsets[-1]
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_a_trained_tokenizer_has_robertas_special_tokens():
    tokenizer = train()
    assert tokenizer.num_ids == 300
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.hf.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    ids = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 4)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.hf.model_max_length == 32
    [the] = ragged(tokenizer, [" the"])
    # As in RoBERTa, the mask token includes the space before it.
    assert tokenizer.hf(" the <mask> the")["input_ids"] == [0, *the, 4, *the, 2]
    assert tokenizer.hf.decode(tokenizer.hf(CORPUS[0])["input_ids"], skip_special_tokens=True) == CORPUS[0]


def test_the_same_texts_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        train().save(str(tmp_path / name))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_saved_tokenizer_gives_the_same_ids_in_every_library(tmp_path):
    trained = train()
    trained.save(str(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "RobertaTokenizer"
    assert config["model_max_length"] == 32
    loaded = tokenizer_lib.load_tokenizer(str(tmp_path))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = CORPUS[:50] + ODD
    assert ragged(loaded, texts) == ragged(trained, texts)
    for text in texts:
        ids = trained.hf(text)["input_ids"]
        assert auto(text)["input_ids"] == ids
        assert raw.encode(text).ids == ids
    for field in ("num_ids", "bos_id", "eos_id", "pad_id", "mask_id", "special_ids", "backend"):
        assert getattr(loaded, field) == getattr(trained, field)


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_encode_gives_the_ids_of_hugging_face_without_special_tokens(backend):
    tokenizer = train(backend=backend)
    assert tokenizer.backend == backend
    assert ragged(tokenizer, CORPUS) == tokenizer.hf(CORPUS, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_names_of_special_tokens_in_a_text_are_text(backend):
    tokenizer = train(backend=backend)
    for text, ids in zip(ODD, ragged(tokenizer, ODD), strict=True):
        assert not set(ids) & set(tokenizer.special_ids)
        assert tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_sliced_chunked_and_empty_columns(backend):
    tokenizer = train(backend=backend)
    expected = ragged(tokenizer, CORPUS)
    large = pa.array(CORPUS, pa.large_string())
    assert ragged(tokenizer, large) == expected
    assert ragged(tokenizer, large.slice(3, 7)) == expected[3:10]
    assert ragged(tokenizer, pa.chunked_array([CORPUS[:9], CORPUS[9:]])) == expected
    assert ragged(tokenizer, large.slice(3, 0)) == []
    assert ragged(tokenizer, pa.array(["", ""])) == [[], []]
    assert ragged(tokenizer, pa.chunked_array([], pa.string())) == []


def test_wordpiece_uses_the_tokenizers_backend(tmp_path):
    tokenizer = tokenizer_lib.load_tokenizer(word_piece(tmp_path))
    assert tokenizer.backend == "tokenizers"
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert ids == (2, 3, 0, 4)
    assert ragged(tokenizer, ["the dogs", "the [MASK]"])[0] == [5, 6, 7]
    assert not set(ragged(tokenizer, ["[SEP] the [MASK]"])[0]) & {0, 2, 3, 4}
    with pytest.raises(UserError, match=r"tokenizer.backend='gigatoken': supports byte-level BPE only"):
        tokenizer_lib.load_tokenizer(word_piece(tmp_path), backend="gigatoken")


def test_unigram_never_gives_special_ids_for_a_text(tmp_path):
    """Its vocabulary has "<s>" as a piece of text as well."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [(name, 0.0) for name in names] + [("\u2581", -1.0), ("a", -2.0), ("b", -2.0)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip
    tokenizer = tokenizer_lib.Tokenizer(hf, name="pieces")
    assert ragged(tokenizer, ["a<s>b", "<mask>", "", "x</s> a"]) == [[5, 6, 7], [5], [], [5, 3, 5, 6]]


def test_parts_of_a_column_are_concatenated_in_order(monkeypatch):
    tokenizer = train(backend="tokenizers")
    texts = [*CORPUS[:40], "", "the dog " * 50, *CORPUS[40:80], ""]
    expected = [tokenizer.encode(pa.array([text]))[0].tolist() for text in texts]
    assert ragged(tokenizer, texts) == expected
    for size in (1, 100, 1000):
        monkeypatch.setattr(tokenizer_lib, "_PART_BYTES", size)
        assert ragged(tokenizer, pa.array(["before", *texts], pa.large_string()).slice(1)) == expected


def test_a_backend_that_gives_other_ids_is_replaced_with_one_log_line(monkeypatch, caplog):
    honest = tokenizer_lib._encode_gigatoken

    def wrong(*arguments):
        ids, offsets = honest(*arguments)
        return np.where(np.arange(len(ids)) == 5, ids + 1, ids).astype(np.int32), offsets

    monkeypatch.setattr(tokenizer_lib, "_encode_gigatoken", wrong)
    tokenizer = train()
    assert tokenizer.backend == "gigatoken"
    with caplog.at_level(logging.INFO, logger="absl"):
        assert ragged(tokenizer, CORPUS) == tokenizer.hf(CORPUS, add_special_tokens=False)["input_ids"]
        ragged(tokenizer, CORPUS)
    assert tokenizer.backend == "tokenizers"
    assert [record.getMessage() for record in caplog.records if "gigatoken" in record.getMessage()] == [
        "gigatoken gives other ids than tokenizers for trained; using tokenizers"
    ]


class Differing:
    """gigatoken, but the ids of texts with "1234" are others from the fourth token on."""

    def __init__(self, honest):
        self._honest = honest

    def encode(self, text):
        ids = self._honest.encode(text)
        return np.concatenate([ids[:3], ids[2:]]) if "1234" in text else ids

    def __getattr__(self, name):
        return getattr(self._honest, name)


def test_differences_past_the_first_comparison_are_counted_and_the_first_is_logged(caplog):
    tokenizer = train()
    texts = pa.array(["the dog" + " the dog" * n + " 1234" * (n > 1) for n in range(1, 5)], pa.large_string())
    tokenizer._gigatoken = Differing(tokenizer._gigatoken)
    assert tokenizer.count_differences(texts) == 0  # The backend is not decided.
    tokenizer.encode(pa.array(CORPUS))
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert tokenizer.count_differences(texts.slice(0, 1)) == 0
        assert [tokenizer.count_differences(texts) for _ in range(2)] == [3, 3]
    [record] = caplog.records
    assert record.getMessage() == (
        "gigatoken gives other ids than tokenizers for trained near 'the dog the dog the dog 1234'; "
        "data/tokenizer_differences counts such documents; set tokenizer.backend='tokenizers' in new runs"
    )
    assert tokenizer.backend == "gigatoken"
    # Only their first characters are compared.
    assert tokenizer.count_differences(pa.array(["the dog " * 300 + "1234"], pa.large_string())) == 0


def test_gigatoken_gives_single_texts_the_ids_of_a_batch():
    tokenizer = train()
    for text, ids in zip(CORPUS + ODD, ragged(tokenizer, CORPUS + ODD), strict=True):
        assert tokenizer._gigatoken.encode(text).tolist() == ids
    assert tokenizer.count_differences(pa.array(CORPUS + ODD, pa.large_string())) == 0


@pytest.mark.parametrize(
    "options", [{}, {"single_word": True}, {"lstrip": True}, {"rstrip": True}, {"normalized": False}]
)
def test_added_tokens_are_found_where_hugging_face_finds_them(options):
    # gigatoken finds "foo" in "food" whatever single_word says; the first document shows no difference.
    hf = train().hf
    hf.add_tokens([tokenizers.AddedToken("foo", **options)])
    tokenizer = tokenizer_lib.Tokenizer(hf, name="with an added token")
    texts = ["plain text", "food", "a foo b", "foo, (foo) xfoo", "foofoo", "FOO"]
    assert [ragged(tokenizer, [text])[0] for text in texts] == [
        hf(text, add_special_tokens=False)["input_ids"] for text in texts
    ]


def test_num_ids_is_the_highest_id_plus_one(tmp_path):
    word_piece(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"]["far"] = 20
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = tokenizer_lib.load_tokenizer(str(tmp_path))
    assert len(tokenizer.hf) == 9
    assert tokenizer.num_ids == 21
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)


def test_missing_tokenizers_and_missing_special_tokens_are_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the tokenizer './none': there is no such directory"):
        tokenizer_lib.load_tokenizer("./none")
    with pytest.raises(UserError, match=r"the tokenizer '.*': cannot be loaded \("):
        tokenizer_lib.load_tokenizer(str(tmp_path))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=train().hf.backend_tokenizer)
    with pytest.raises(UserError, match="'maskless': has no mask token"):
        tokenizer_lib.Tokenizer(hf, name="maskless")
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=train().hf.backend_tokenizer, mask_token="<mask>")
    with pytest.raises(UserError, match="'endless': has no begin token"):
        tokenizer_lib.Tokenizer(hf, name="endless")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"'no-such/tokenizer': is not a local directory, and http.* cannot be reached"):
        tokenizer_lib.load_tokenizer("no-such/tokenizer", cache_dir=str(tmp_path))


@pytest.mark.parametrize("family", ["roberta", "bert", "xlm-roberta"])
def test_word_starts_are_those_of_the_tokenizers_words(family):
    """Byte-level BPE, WordPiece and Unigram."""
    plain = train(model_type=family)
    marked = train(model_type=family, marks_words=True)
    assert marked.backend == "tokenizers"
    texts = ["the quick unbelievable fox isn't here: 1234", "", "dog", " <mask> dogs"]
    for ids, with_starts, text in zip(ragged(plain, texts), ragged(marked, texts), texts, strict=True):
        assert tokenizer_lib.without_word_starts(np.array(with_starts, np.int32)).tolist() == ids
        words = [-1, *plain._reference.encode(text, add_special_tokens=False).word_ids]
        if len(words) == len(ids) + 1:  # The name of a special token is dropped from some.
            assert [id >= WORD_START for id in with_starts] == [a != b for a, b in itertools.pairwise(words)]
    assert marked.decode(ragged(marked, ["the dog"])[0]) == plain.decode(ragged(plain, ["the dog"])[0])
    assert marked.decode([]) == ""  # Between two masked tokens, in show_data.


def test_a_tokenizer_without_words_is_refused_where_they_are_needed():
    hf = train().hf
    hf.backend_tokenizer.pre_tokenizer = None
    assert tokenizer_lib.Tokenizer(hf, name="plain").num_ids > 0
    with pytest.raises(
        UserError, match=r"^the tokenizer 'plain': does not split text into words, which masking\.strat"
    ):
        tokenizer_lib.Tokenizer(hf, name="plain", marks_words=True)
