"""Tokenizers trained here: the family's dress, the same files every time, the same ids for `AutoTokenizer`."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import sentencepiece
import transformers

from mlm.data.train_tokenizer import FAMILIES, train_tokenizer
from mlm.errors import UserError
from tests.tiny import sentences

REPO = Path(__file__).parent.parent
# Letters enough, repeated, that the rare ones fall out of the alphabet.
CORPUS = [f"{text} Isn't it? (Ça va, déjà-vu: {n % 7}%)" for n, text in enumerate(sentences(400))] + ["\u2603"]
ODD = [
    "Hello the World, d\u00e9j\u00e0 vu",
    "",
    "\n\n  tab\t \u00a0",
    "\ufb01ne x\u00b2 \u2460 \u4e2d\u6587\U0001f642 a\u0301 e\u200db",
    "don't I'LL 12.5",
    "x" * 150,
]
SIZE = 400
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# model_type, lowercase -> algorithm, class, special tokens by id.
DRESSES = {
    ("roberta", False): ("bpe", "RobertaTokenizer", ROBERTA),
    ("modernbert", False): ("bpe", "TokenizersBackend", BERT),
    ("bert", False): ("wordpiece", "BertTokenizer", BERT),
    ("electra", True): ("wordpiece", "BertTokenizer", BERT),
    ("roformer", False): ("wordpiece", "BertTokenizer", BERT),
    ("xlm-roberta", False): ("unigram", "XLMRobertaTokenizer", ROBERTA),
    ("camembert", False): ("unigram", "CamembertTokenizer", ROBERTA),
    ("albert", False): ("unigram", "AlbertTokenizer", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]),
    ("albert", True): ("unigram", "AlbertTokenizer", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]),
}


def train(model_type="roberta", **kwargs):
    return train_tokenizer(iter(CORPUS), model_type=model_type, **{"vocab_size": SIZE, "max_seq_length": 64} | kwargs)


@pytest.fixture(scope="module")
def trained():
    """(model_type, lowercase) -> its tokenizer, trained once."""
    return {key: train(key[0], lowercase=key[1]) for key in DRESSES}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("key", DRESSES)
def test_auto_tokenizer_gives_the_same_ids_in_a_models_directory(trained, key, tmp_path):
    tokenizer = trained[key]
    algorithm, dress, _ = DRESSES[key]
    tokenizer.save(str(tmp_path))
    # A model's config.json beside it has a say in what AutoTokenizer loads.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": key[0]}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(auto).__name__ == dress
    kind = json.loads(auto.backend_tokenizer.to_str())["model"]["type"]
    assert kind.lower() == algorithm
    texts = CORPUS[:50] + ODD
    ids, offsets = tokenizer.encode(pa.array(texts))
    for text, (start, stop) in zip(texts, itertools.pairwise(offsets), strict=True):
        own = ids[start:stop].tolist()
        assert auto(text)["input_ids"] == [tokenizer.bos_id, *own, tokenizer.eos_id]
        # As pairs are: [CLS] a [SEP] b [SEP], and with RoBERTa's doubled separator.
        double = [tokenizer.eos_id] * (2 if dress[:3] in ("Rob", "XLM", "Cam") else 1)
        assert auto(text, "the")["input_ids"][: len(own) + 1 + len(double)] == [tokenizer.bos_id, *own, *double]


@pytest.mark.parametrize("key", DRESSES)
def test_special_tokens_are_the_familys(trained, key):
    tokenizer = trained[key]
    special = DRESSES[key][2]
    assert tokenizer.hf.convert_ids_to_tokens(range(5)) == special
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.num_ids <= SIZE
    assert len(tokenizer.hf) == tokenizer.num_ids
    assert tokenizer.unused_ids == ()
    assert tokenizer.mask_id == 4
    assert tokenizer.pad_id == special.index(tokenizer.hf.pad_token)
    # Positions of these models begin after the padding's id, which is 1 wherever they are published.
    roberta_like = key[0] in ("roberta", "xlm-roberta", "camembert")
    assert tokenizer.pad_id == (1 if roberta_like else 0)
    assert tokenizer.hf.model_max_length == 64
    # The mask token in a sentence is itself, with begin and end around.
    ids = tokenizer.hf(f"the {tokenizer.hf.mask_token} sees")["input_ids"]
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert ids.count(4) == 1


@pytest.mark.parametrize("key", [key for key in DRESSES if DRESSES[key][0] != "bpe"])
def test_case_is_folded_where_asked(trained, key):
    hf = trained[key].hf
    assert (hf("THE dog")["input_ids"] == hf("the dog")["input_ids"]) is key[1]
    assert (hf("d\u00e9j\u00e0")["input_ids"] == hf("deja")["input_ids"]) is key[1]


def test_rare_letters_make_room_for_words(trained):
    for key in (("bert", False), ("xlm-roberta", False)):
        vocabulary = trained[key].hf.get_vocab()
        assert "\u2603" not in vocabulary
        assert trained[key].hf("\u2603")["input_ids"].count(trained[key].hf.unk_token_id) == 1
        assert any(word in vocabulary for word in ("river", "\u2581river"))
        assert "\u00e9" in vocabulary or "##\u00e9" in vocabulary


def test_unigram_cuts_as_sentencepiece_does(trained, tmp_path):
    """The likeliest cut: two programs agree on it."""
    written = tmp_path / "m"
    with written.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, model_type="unigram", vocab_size=SIZE, num_threads=16,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3, control_symbols=["<mask>"], minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(written))
    hf = trained["xlm-roberta", False].hf
    for text in CORPUS[:100]:
        assert hf(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)


@pytest.mark.slow
def test_another_process_writes_the_same_files(trained, tmp_path):
    """Hash tables are seeded anew in every process, and it has other cores to share."""
    keys = [("roberta", False), ("bert", False), ("xlm-roberta", False), ("albert", True)]
    code = f"""
import os
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
from tests.test_train_tokenizer import train
for model_type, lowercase in {keys}:
    train(model_type, lowercase=lowercase).save(os.path.join({str(tmp_path)!r}, "there", model_type))
"""
    env = os.environ | {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, check=True)
    for key in keys:
        trained[key].save(str(tmp_path / "here" / key[0]))
        assert digests(tmp_path / "here" / key[0]) == digests(tmp_path / "there" / key[0])


@pytest.mark.parametrize("key", [("bert", False), ("xlm-roberta", False)])
def test_training_again_writes_the_same_files(trained, key, tmp_path):
    """Also when the tokenizer was used in between; within a process hash tables differ, too."""
    for n in range(3):
        train(key[0], lowercase=key[1]).save(str(tmp_path / str(n)))
    trained[key].save(str(tmp_path / "first"))
    assert len({tuple(sorted(digests(folder).items())) for folder in tmp_path.iterdir()}) == 1


def test_any_algorithm_for_any_family():
    for algorithm in FAMILIES:
        for model_type in ("bert", "roberta"):
            tokenizer = train(model_type, algorithm=algorithm)
            assert tokenizer.hf.convert_ids_to_tokens(range(5)) == (BERT if algorithm == "wordpiece" else ROBERTA)


def test_errors():
    with pytest.raises(UserError, match=r"vocab_size=100 .* need at least 261"):
        train(vocab_size=100)
    with pytest.raises(UserError, match=r"vocab_size=20 is too small: the letters of this text"):
        train("bert", vocab_size=20)
    with pytest.raises(UserError, match=r"vocab_size=20: no Unigram tokenizer of this size can be trained") as error:
        train("albert", vocab_size=20)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"tokenizer.algorithm='words' is not one of auto, bpe, wordpiece, unigram"):
        train(algorithm="words")
    for model_type in ("roberta", "xlm-roberta"):
        with pytest.raises(UserError, match=r"tokenizer.lowercase=True does not go with the \w+ tokenizer of"):
            train(model_type, lowercase=True)
