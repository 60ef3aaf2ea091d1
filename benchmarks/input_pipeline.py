"""How much faster is `mlm.data` than the reference's input pipeline, and does it keep up with its tokenizer?

    python benchmarks/input_pipeline.py                     # all tables, some minutes
    python benchmarks/input_pipeline.py --seconds=2 --rounds=1 --tables=speed

The reference is a reimplementation of the input pipeline of Hugging Face's `run_mlm_flax_stream.py`: a streaming data
set, a batched map of a fast tokenizer that adds special tokens to every document and marks them, `datasets`' shuffle
buffer over tokenized documents, and in every step Python lists that are extended document by document and cut into
rows. Both sides read the same files with the same tokenizer and give int32 arrays of the same shape. Neither masks: the
reference does it with NumPy in the same loop, this code on the device. Our side also drops held-out documents and
prefetches batches in its thread, as in training.

The sides take turns for `--rounds` rounds, and the best round of each counts, because other load on the machine can
only slow it down. Files (docstrings of the installed packages, tens of megabytes) and tokenizers are made once, in
`--folder`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import transformers

from mlm.data import mixture, prefetch, stream
from mlm.data import tokenizer as tokenizer_lib
from mlm.data.sources.source import open_source
from mlm.data.train_tokenizer import train_tokenizer

SHUFFLE = 10_000  # Documents, on both sides.
FILES = 4
GOALS = {"parquet": 100, "jsonl": 80}
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def write_files(folder: str, *, megabytes: float) -> None:
    """Writes the first docstrings to part-*.parquet and part-*.jsonl."""
    if os.path.exists(os.path.join(folder, f"part-{FILES - 1}.jsonl")):
        return
    source = open_source(dataset_name="docstrings")
    texts, size = [], 0
    for shard in range(source.num_shards):
        for column in source.read(shard):
            texts += [text for text in column.to_pylist() if text]
            size += column.nbytes
        if size > megabytes * 1e6:
            break
    for part in range(FILES):
        path = os.path.join(folder, f"part-{part}")
        pq.write_table(pa.table({"text": texts[part::FILES]}), path + ".parquet")
        with open(path + ".jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[part::FILES])


def read_texts(folder: str) -> pa.LargeStringArray:
    tables = [pq.read_table(os.path.join(folder, f"part-{part}.parquet")) for part in range(FILES)]
    return pa.concat_tables(tables)["text"].cast(pa.large_string()).combine_chunks()


def load(folder: str, kind: str, *, backend: str = "auto") -> tokenizer_lib.Tokenizer:
    """Returns a tokenizer trained on the files: "bpe" (byte-level, 50k), "wordpiece" (30k) or "unigram" (8k)."""
    path = os.path.join(folder, kind)
    if not os.path.isdir(path):
        texts = read_texts(folder)
        if kind == "bpe":
            train_tokenizer(iter(texts.to_pylist()), vocab_size=50_265, max_seq_length=512).save(path)
        else:
            model, trainer, documents = untrained(kind)
            model.train_from_iterator(texts.slice(0, documents).to_pylist(), trainer)
            named = {f"{role}_token": token for role, token in SPECIAL.items()}
            transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named).save_pretrained(path)
    return tokenizer_lib.load_tokenizer(path, backend=backend)


def untrained(kind: str) -> tuple[tokenizers.Tokenizer, tokenizers.trainers.Trainer, int]:
    """Returns an untrained tokenizer, its trainer, and the number of documents to train on."""
    options = {"special_tokens": list(SPECIAL.values()), "show_progress": False}
    if kind == "wordpiece":
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=SPECIAL["unk"]))
        model.normalizer = tokenizers.normalizers.BertNormalizer()
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return model, tokenizers.trainers.WordPieceTrainer(vocab_size=30_522, **options), 20_000
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=8_000, unk_token=SPECIAL["unk"], **options)
    return model, trainer, 3_000


def ours(files: list[str], tokenizer: tokenizer_lib.Tokenizer, held_out: pa.Array, *, rows: int, length: int):
    """Returns a prefetcher: a context manager and iterator of batches."""
    rows_stream = stream.RowStream(
        open_source(data_files=tuple(files)),
        tokenizer,
        seed=0,
        max_seq_length=length,
        packing="concatenate",
        shuffle_buffer_size=SHUFFLE,
        batch_rows=rows,
        held_out=held_out,
    )
    batches = mixture.BatchStream({"text": rows_stream}, shapes=[mixture.BatchShape(0, rows, length, {"text": 1.0})])
    return prefetch.Prefetcher(batches, depth=4)


def reference(files: list[str], tokenizer: transformers.PreTrainedTokenizerFast, *, rows: int, length: int) -> Iterator:
    """Yields the reference's batches, int32 [rows, length]."""
    kind = "parquet" if files[0].endswith("parquet") else "json"
    texts = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    tokenized = texts.map(
        lambda batch: tokenizer(batch["text"], return_special_tokens_mask=True),
        batched=True,
        remove_columns=["text"],
    )
    shuffled = tokenized.shuffle(buffer_size=SHUFFLE, seed=0)
    names = ("input_ids", "attention_mask", "special_tokens_mask")
    documents = iter(shuffled)
    epoch = 0
    while True:
        # The remainder of the last document is dropped, as in the original.
        columns = {name: [] for name in names}
        while len(columns["input_ids"]) < rows * length:
            document = next(documents, None)
            if document is None:
                epoch += 1
                shuffled.set_epoch(epoch)
                documents = iter(shuffled)
                continue
            columns = {name: columns[name] + document[name] for name in names}
        cut = {name: [ids[i : i + length] for i in range(0, rows * length, length)] for name, ids in columns.items()}
        yield {name: np.array(column, np.int32) for name, column in cut.items()}["input_ids"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of one side.

    Attributes:
      first_batch: seconds to the first batch.
      tokens: tokens per second after it.
      cpu_tokens: tokens per CPU second after it.
    """

    first_batch: float
    tokens: float
    cpu_tokens: float = 0.0


def measure(batches: Iterator, *, seconds: float, start: float) -> Speed:
    """Returns the speed of an iterator that was created at time `start`."""
    next(batches)
    first = before = time.perf_counter()
    tokens, marks = 0, []
    while time.perf_counter() - first < seconds or len(marks) < 2:
        batch = next(batches)
        now = time.perf_counter()
        # Batches come in bursts, one per chunk of text: measure from the wait for one burst to the wait for another.
        if now - before > 1e-3:
            marks.append((tokens, now, time.process_time()))
        tokens += getattr(batch, "tokens", batch).size
        before = time.perf_counter()
    tokens, wall, cpu = np.subtract(marks[-1], marks[0])
    return Speed(first - start, tokens / wall, tokens / cpu)


def best(rounds: int, *sides: Callable[[], Speed]) -> list[Speed]:
    """Measures the sides in turn; returns the best numbers of each."""
    results = [[side() for side in sides] for _ in range(rounds)]
    return [
        Speed(min(s.first_batch for s in side), max(s.tokens for s in side), max(s.cpu_tokens for s in side))
        for side in zip(*results, strict=True)
    ]


def compare(folder: str, kind: str, *, rows: int, length: int, seconds: float, rounds: int) -> list[str]:
    """Returns one line of a table: this code against the reference."""
    files = [os.path.join(folder, f"part-{part}.{kind}") for part in range(FILES)]
    held_out = read_texts(folder).slice(0, 1000)

    def our_side() -> Speed:
        tokenizer = load(folder, "bpe")  # A new one, because its first batch includes the check of the backends.
        start = time.perf_counter()
        with ours(files, tokenizer, held_out, rows=rows, length=length) as batches:
            return measure(batches, seconds=seconds, start=start)

    def their_side() -> Speed:
        tokenizer = transformers.AutoTokenizer.from_pretrained(os.path.join(folder, "bpe"))
        start = time.perf_counter()
        return measure(reference(files, tokenizer, rows=rows, length=length), seconds=seconds, start=start)

    our_speed, their_speed = best(rounds, our_side, their_side)
    speeds = (
        f"{their_speed.tokens / 1e6:.3f}",
        f"{our_speed.tokens / 1e6:.2f}",
        f"{their_speed.first_batch:.2f}",
        f"{our_speed.first_batch:.2f}",
    )
    return [f"{kind} {rows} x {length}", *speeds, f"{our_speed.tokens / their_speed.tokens:.0f}"]


def compare_backend(folder: str, kind: str, *, seconds: float, rounds: int) -> list[str]:
    """Returns one line: the complete pipeline against `encode_batch_fast` on lists of strings in memory."""
    texts = read_texts(folder).to_pylist()
    files = [os.path.join(folder, f"part-{part}.parquet") for part in range(FILES)]
    tokenizer = load(folder, kind, backend="tokenizers")
    backend = tokenizer.hf.backend_tokenizer

    def our_side() -> Speed:
        start = time.perf_counter()
        with ours(files, tokenizer, pa.array([], pa.large_string()), rows=128, length=128) as batches:
            return measure(batches, seconds=seconds, start=start)

    def their_side(documents: int = 2000) -> Speed:
        start, cpu, tokens, index = time.perf_counter(), time.process_time(), 0, 0
        while time.perf_counter() - start < seconds:
            # Two more per document: the begin and end tokens of our rows.
            encodings = backend.encode_batch_fast(texts[index : index + documents], add_special_tokens=False)
            tokens += sum(map(len, encodings)) + 2 * len(encodings)
            index = (index + documents) % len(texts)
        return Speed(0.0, tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu))

    our_speed, their_speed = best(rounds, our_side, their_side)
    ratio, cpu_ratio = our_speed.tokens / their_speed.tokens, our_speed.cpu_tokens / their_speed.cpu_tokens
    rates = f"{their_speed.tokens / 1e6:.3f}", f"{our_speed.tokens / 1e6:.3f}"
    return [kind, *rates, f"{ratio:.0%}", f"{cpu_ratio:.0%}"]


def resident_megabytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(folder: str, kind: str, million_tokens: float) -> tuple[float, float]:
    """Returns the peak memory above the imported libraries, and the peak of the second half less the first's, in MB."""
    tokenizer_lib.Tokenizer(load(folder, "bpe").hf, name="imports gigatoken")  # It imports its libraries late.
    imported, peaks = resident_megabytes(), [0.0, 0.0]
    files = [os.path.join(folder, f"part-{part}.{kind}") for part in range(FILES)]
    tokens, total = 0, million_tokens * 1e6
    with ours(files, load(folder, "bpe"), read_texts(folder).slice(0, 1000), rows=1024, length=128) as batches:
        while tokens < total:
            tokens += next(batches).tokens.size
            half = int(tokens > total / 2)
            peaks[half] = max(peaks[half], resident_megabytes() - imported)
    return max(peaks), peaks[1] - peaks[0]


def print_table(title: str, header: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print(f"\n{title}\n")
    for line in (header, *lines):
        print("   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per side")
    parser.add_argument("--megabytes", type=float, default=40.0, help="megabytes of text")
    parser.add_argument("--million_tokens", type=float, default=50.0, help="million tokens for the table of memory")
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "mlm-input-pipeline"))
    parser.add_argument("--tables", default="speed,shapes,backends,memory", help="tables to print, separated by commas")
    options = parser.parse_args()
    tables = options.tables.split(",")
    os.makedirs(options.folder, exist_ok=True)
    write_files(options.folder, megabytes=options.megabytes)
    turns = {"seconds": options.seconds, "rounds": options.rounds}
    kinds, ratios = ("parquet", "jsonl"), []
    print(f"{os.cpu_count()} cores, byte-level BPE by {load(options.folder, 'bpe').backend}, best of {options.rounds}")

    header = ["rows", "reference, M tokens/s", "ours", "reference, s to first batch", "ours", "ratio"]
    shapes = {"speed": [(1024, 128)], "shapes": [(128, 128), (256, 512)]}
    for table, title in (("speed", "Against the reference"), ("shapes", "Against the reference, other shapes")):
        if table not in tables:
            continue
        lines = [
            compare(options.folder, kind, rows=rows, length=length, **turns)
            for rows, length in shapes[table]
            for kind in kinds
        ]
        print_table(title, header, lines)
        goals = [f" (goal {GOALS[line[0].split()[0]]})" if table == "speed" else "" for line in lines]
        ratios += [f"{line[0]}: {line[-1]} times the reference{goal}" for line, goal in zip(lines, goals, strict=True)]
    if "backends" in tables:
        header = ["model", "encode_batch_fast, M tokens/s", "our pipeline", "ratio", "ratio per CPU second"]
        lines = [compare_backend(options.folder, kind, **turns) for kind in ("wordpiece", "unigram", "bpe")]
        print_table("With `tokenizers` only, against its own rate", header, lines)
        ratios += [
            f"{line[0]}: {line[-2]} of encode_batch_fast (goal 90%), {line[-1]} per CPU second" for line in lines
        ]
    if "memory" in tables:
        lines = []
        for kind in kinds:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak, growth = pool.apply(memory, (options.folder, kind, options.million_tokens))
            lines.append([kind, f"{peak:.0f}", f"{growth:+.0f}"])
            ratios.append(
                f"{kind}: peak memory {peak / 500:.2f} of 500 MB, {growth / peak:+.0%} from first to second half"
            )
        title = f"Memory above the imported libraries over {options.million_tokens:g} million tokens, MB"
        print_table(title, ["files", "peak", "second half's peak less the first's"], lines)
    print("\n" + "\n".join(ratios))


if __name__ == "__main__":
    main()
