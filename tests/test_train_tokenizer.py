"""Trained tokenizers: class and special tokens of the family, reproducible files, the same ids as AutoTokenizer."""

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

from mlm.data.train_tokenizer import train_tokenizer
from mlm.errors import UserError
from mlm.settings import ALGORITHM_FAMILIES
from tests.tiny import sentences

REPO = Path(__file__).parent.parent
# Long enough that the rarest characters are not in the alphabet.
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
# model_type, lowercase -> algorithm, tokenizer class, special tokens by id.
EXPECTED = {
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
    """The tokenizer of each (model_type, lowercase), trained once."""
    return {key: train(key[0], lowercase=key[1]) for key in EXPECTED}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("key", EXPECTED)
def test_auto_tokenizer_gives_the_same_ids_in_a_model_directory(trained, key, tmp_path):
    tokenizer = trained[key]
    algorithm, tokenizer_class, _ = EXPECTED[key]
    tokenizer.save(str(tmp_path))
    # The class that AutoTokenizer loads depends on the config.json of a model beside the tokenizer.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": key[0]}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(auto).__name__ == tokenizer_class
    assert json.loads(auto.backend_tokenizer.to_str())["model"]["type"].lower() == algorithm
    texts = CORPUS[:50] + ODD
    ids, offsets = tokenizer.encode(pa.array(texts))
    for text, (start, stop) in zip(texts, itertools.pairwise(offsets), strict=True):
        text_ids = ids[start:stop].tolist()
        assert auto(text)["input_ids"] == [tokenizer.bos_id, *text_ids, tokenizer.eos_id]
        # Pairs are [CLS] a [SEP] b [SEP]; RoBERTa and its relatives have two separators in the middle.
        separators = [tokenizer.eos_id] * (2 if tokenizer_class[:3] in ("Rob", "XLM", "Cam") else 1)
        first_of_pair = [tokenizer.bos_id, *text_ids, *separators]
        assert auto(text, "the")["input_ids"][: len(first_of_pair)] == first_of_pair


@pytest.mark.parametrize("key", EXPECTED)
def test_special_tokens_are_those_of_the_family(trained, key):
    tokenizer = trained[key]
    special = EXPECTED[key][2]
    assert tokenizer.hf.convert_ids_to_tokens(range(5)) == special
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.num_ids <= SIZE
    assert len(tokenizer.hf) == tokenizer.num_ids
    assert tokenizer.unused_ids == ()
    assert tokenizer.mask_id == 4
    assert tokenizer.pad_id == special.index(tokenizer.hf.pad_token)
    # These models count positions from pad_token_id + 1, and their published tokenizers have pad_token_id=1.
    roberta_like = key[0] in ("roberta", "xlm-roberta", "camembert")
    assert tokenizer.pad_id == (1 if roberta_like else 0)
    assert tokenizer.hf.model_max_length == 64
    # The mask token in a sentence gets its id, and begin and end tokens are added.
    ids = tokenizer.hf(f"the {tokenizer.hf.mask_token} sees")["input_ids"]
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert ids.count(4) == 1


@pytest.mark.parametrize("key", [key for key in EXPECTED if EXPECTED[key][0] != "bpe"])
def test_lowercase_is_as_requested(trained, key):
    hf = trained[key].hf
    assert (hf("THE dog")["input_ids"] == hf("the dog")["input_ids"]) is key[1]
    assert (hf("d\u00e9j\u00e0")["input_ids"] == hf("deja")["input_ids"]) is key[1]


def test_rare_characters_are_left_out_and_words_are_not(trained):
    for key in (("bert", False), ("xlm-roberta", False)):
        vocabulary = trained[key].hf.get_vocab()
        assert "\u2603" not in vocabulary
        assert trained[key].hf("\u2603")["input_ids"].count(trained[key].hf.unk_token_id) == 1
        assert any(word in vocabulary for word in ("river", "\u2581river"))
        assert "\u00e9" in vocabulary or "##\u00e9" in vocabulary


def test_unigram_segments_like_sentencepiece(trained, tmp_path):
    model_path = tmp_path / "m"
    with model_path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, model_type="unigram", vocab_size=SIZE, num_threads=16,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3, control_symbols=["<mask>"], minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    hf = trained["xlm-roberta", False].hf
    for text in CORPUS[:100]:
        assert hf(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


@pytest.mark.slow
def test_another_process_writes_the_same_files(trained, tmp_path):
    """Every process has other hash seeds; this one has fewer cores, too."""
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
    """Hash tables within a process have different seeds, too. The first tokenizer has been used before it is saved."""
    for n in range(3):
        train(key[0], lowercase=key[1]).save(str(tmp_path / str(n)))
    trained[key].save(str(tmp_path / "first"))
    assert len({tuple(sorted(digests(folder).items())) for folder in tmp_path.iterdir()}) == 1


def test_any_algorithm_for_any_family():
    for algorithm in ALGORITHM_FAMILIES:
        for model_type in ("bert", "roberta"):
            tokenizer = train(model_type, algorithm=algorithm)
            assert tokenizer.hf.convert_ids_to_tokens(range(5)) == (BERT if algorithm == "wordpiece" else ROBERTA)


def test_invalid_options_are_errors():
    with pytest.raises(UserError, match=r"vocab_size=100: must be at least 261"):
        train(vocab_size=100)
    with pytest.raises(UserError, match=r"vocab_size=20: must be at least \d+ for this text: its letters"):
        train("bert", vocab_size=20)
    with pytest.raises(UserError, match=r"vocab_size=20: no Unigram tokenizer of this size can be trained") as error:
        train("albert", vocab_size=20)
    assert "\n" not in str(error.value)
    for model_type in ("roberta", "xlm-roberta"):
        with pytest.raises(UserError, match=r"tokenizer.lowercase=True: the \w+ tokenizer of .* has no lowercase form"):
            train(model_type, lowercase=True)
