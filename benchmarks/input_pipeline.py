"""How much faster is `mlm.data` than the reference's input pipeline, and does it keep up with its tokenizer?

    python benchmarks/input_pipeline.py                     # all tables, some minutes
    python benchmarks/input_pipeline.py --seconds=2 --rounds=1 --tables=speed

The reference is Hugging Face's `run_mlm_flax_stream.py`, told anew from its behaviour: a streaming data set, a batched
map of a fast tokenizer that adds special tokens to every document and marks them, `datasets`' shuffle buffer over
tokenized documents, and, in every step, Python lists grown document by document and cut into rows. Both sides read
the same files with the same tokenizer and give int32 arrays of the same shape. Masking is left out of both: the
reference does it with NumPy in the same loop, ours is done on the device. Our side drops held-out documents besides,
and makes batches ahead in its thread, as in training.

Sides take turns for `--rounds`, and each is given its best round: what else the machine does only slows. Files and
tokenizers are made once, under `--folder`: the docstrings of the installed packages, tens of megabytes.
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

from mlm.data import prefetch, stream
from mlm.data import tokenizer as tokenizer_lib
from mlm.data.sources.source import open_source
from mlm.data.train_tokenizer import train_tokenizer

SHUFFLE = 10_000  # documents, on both sides
FILES = 4
GOALS = {"parquet": 100, "jsonl": 80}
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def write_files(folder: str, *, megabytes: float) -> None:
    """The head of the docstrings as part-*.parquet and part-*.jsonl."""
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
    """A tokenizer of the files: "bpe" (byte-level, 50k), "wordpiece" (30k) or "unigram" (8k: slow to train)."""
    path = os.path.join(folder, kind)
    if not os.path.isdir(path):
        texts = read_texts(folder)
        if kind == "bpe":
            head = iter(texts.to_pylist())
            train_tokenizer(head, vocab_size=50_265, max_seq_length=512).save(path)
        else:
            model, trainer, documents = untrained(kind)
            model.train_from_iterator(texts.slice(0, documents).to_pylist(), trainer)
            named = {f"{role}_token": token for role, token in SPECIAL.items()}
            transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named).save_pretrained(path)
    return tokenizer_lib.load_tokenizer(path, backend=backend)


def untrained(kind: str) -> tuple[tokenizers.Tokenizer, tokenizers.trainers.Trainer, int]:
    """A tokenizer of this kind, its trainer, and how many documents to train on."""
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
    """The stream behind its prefetching thread: a context manager that gives batches."""
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
    return prefetch.Prefetcher(rows_stream, depth=4)


def reference(files: list[str], tokenizer: transformers.PreTrainedTokenizerFast, *, rows: int, length: int) -> Iterator:
    """The reference's batches, int32 [rows, length]."""
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
        # The remainder of the last document is thrown away, as there.
        grown = {name: [] for name in names}
        while len(grown["input_ids"]) < rows * length:
            document = next(documents, None)
            if document is None:
                epoch += 1
                shuffled.set_epoch(epoch)
                documents = iter(shuffled)
                continue
            grown = {name: grown[name] + document[name] for name in names}
        cut = {name: [ids[i : i + length] for i in range(0, rows * length, length)] for name, ids in grown.items()}
        yield {name: np.array(column, np.int32) for name, column in cut.items()}["input_ids"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds to the first batch, tokens a second after it, and those a second of processor time."""

    first: float
    tokens: float
    cpu_tokens: float = 0.0


def measure(batches: Iterator, *, seconds: float, start: float) -> Speed:
    """The speed of an iterator that was made at `start`."""
    next(batches)
    first = before = time.perf_counter()
    tokens, marks = 0, []
    while time.perf_counter() - first < seconds or len(marks) < 2:
        batch = next(batches)
        now = time.perf_counter()
        # Batches come in bursts, a chunk of text at a time: from a wait to a wait is a whole number of them.
        if now - before > 1e-3:
            marks.append((tokens, now, time.process_time()))
        tokens += getattr(batch, "tokens", batch).size
        before = time.perf_counter()
    tokens, wall, cpu = np.subtract(marks[-1], marks[0])
    return Speed(first - start, tokens / wall, tokens / cpu)


def best(rounds: int, *sides: Callable[[], Speed]) -> list[Speed]:
    """Each side's best numbers; sides take turns."""
    results = [[side() for side in sides] for _ in range(rounds)]
    return [
        Speed(min(s.first for s in side), max(s.tokens for s in side), max(s.cpu_tokens for s in side))
        for side in zip(*results, strict=True)
    ]


def compare(folder: str, kind: str, *, rows: int, length: int, seconds: float, rounds: int) -> list[str]:
    """One line of a table against the reference."""
    files = [os.path.join(folder, f"part-{part}.{kind}") for part in range(FILES)]
    held_out = read_texts(folder).slice(0, 1000)

    def our_side() -> Speed:
        tokenizer = load(folder, "bpe")  # Anew: the first batch pays for the check of its backends.
        start = time.perf_counter()
        with ours(files, tokenizer, held_out, rows=rows, length=length) as batches:
            return measure(batches, seconds=seconds, start=start)

    def their_side() -> Speed:
        tokenizer = transformers.AutoTokenizer.from_pretrained(os.path.join(folder, "bpe"))
        start = time.perf_counter()
        return measure(reference(files, tokenizer, rows=rows, length=length), seconds=seconds, start=start)

    mine, theirs = best(rounds, our_side, their_side)
    speeds = f"{theirs.tokens / 1e6:.3f}", f"{mine.tokens / 1e6:.2f}", f"{theirs.first:.2f}", f"{mine.first:.2f}"
    return [f"{kind} {rows} x {length}", *speeds, f"{mine.tokens / theirs.tokens:.0f}"]


def compare_backend(folder: str, kind: str, *, seconds: float, rounds: int) -> list[str]:
    """One line: the whole stream against `encode_batch_fast` on lists of strings that are there already."""
    texts = read_texts(folder).to_pylist()
    files = [os.path.join(folder, f"part-{part}.parquet") for part in range(FILES)]
    tokenizer = load(folder, kind, backend="tokenizers")
    backend = tokenizer.hf.backend_tokenizer

    def our_side() -> Speed:
        start = time.perf_counter()
        with ours(files, tokenizer, pa.array([], pa.large_string()), rows=128, length=128) as batches:
            return measure(batches, seconds=seconds, start=start)

    def their_side(documents: int = 2000) -> Speed:
        start, cpu, tokens, at = time.perf_counter(), time.process_time(), 0, 0
        while time.perf_counter() - start < seconds:
            # Two more a document: begin and end, which our rows hold.
            encodings = backend.encode_batch_fast(texts[at : at + documents], add_special_tokens=False)
            tokens += sum(map(len, encodings)) + 2 * len(encodings)
            at = (at + documents) % len(texts)
        return Speed(0.0, tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu))

    mine, theirs = best(rounds, our_side, their_side)
    shares = mine.tokens / theirs.tokens, mine.cpu_tokens / theirs.cpu_tokens
    return [kind, f"{theirs.tokens / 1e6:.3f}", f"{mine.tokens / 1e6:.3f}", *(f"{share:.0%}" for share in shares)]


def resident_megabytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(folder: str, kind: str, million_tokens: float) -> tuple[float, float]:
    """(megabytes above the imported libraries at most, by how much the last half's peak passes the first's)."""
    tokenizer_lib.Tokenizer(load(folder, "bpe").hf, name="imports gigatoken")  # Its libraries are imported late.
    imported, peaks = resident_megabytes(), [0.0, 0.0]
    files = [os.path.join(folder, f"part-{part}.{kind}") for part in range(FILES)]
    tokens, wanted = 0, million_tokens * 1e6
    with ours(files, load(folder, "bpe"), read_texts(folder).slice(0, 1000), rows=1024, length=128) as batches:
        while tokens < wanted:
            tokens += next(batches).tokens.size
            half = int(tokens > wanted / 2)
            peaks[half] = max(peaks[half], resident_megabytes() - imported)
    return max(peaks), peaks[1] - peaks[0]


def show(title: str, header: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print(f"\n{title}\n")
    for line in (header, *lines):
        print("   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--megabytes", type=float, default=40.0, help="of text")
    parser.add_argument("--million_tokens", type=float, default=50.0, help="of the memory's measurement")
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "mlm-input-pipeline"))
    parser.add_argument("--tables", default="speed,shapes,backends,memory", help="which, with commas between")
    options = parser.parse_args()
    tables = options.tables.split(",")
    os.makedirs(options.folder, exist_ok=True)
    write_files(options.folder, megabytes=options.megabytes)
    turns = {"seconds": options.seconds, "rounds": options.rounds}
    kinds, ratios = ("parquet", "jsonl"), []
    print(f"{os.cpu_count()} cores, byte-level BPE by {load(options.folder, 'bpe').backend}, best of {options.rounds}")

    header = ["rows", "reference, M tokens/s", "ours", "reference, s to first batch", "ours", "ratio"]
    shapes = {"speed": [(1024, 128)], "shapes": [(128, 128), (256, 512)]}
    for table, title in (("speed", "Against the reference"), ("shapes", "The same, other shapes")):
        if table not in tables:
            continue
        lines = [
            compare(options.folder, kind, rows=rows, length=length, **turns)
            for rows, length in shapes[table]
            for kind in kinds
        ]
        show(title, header, lines)
        goals = [f" (goal {GOALS[line[0].split()[0]]})" if table == "speed" else "" for line in lines]
        ratios += [f"{line[0]}: {line[-1]} times the reference{goal}" for line, goal in zip(lines, goals, strict=True)]
    if "backends" in tables:
        header = ["model", "encode_batch_fast, M tokens/s", "our stream", "share", "share by processor time"]
        lines = [compare_backend(options.folder, kind, **turns) for kind in ("wordpiece", "unigram", "bpe")]
        show("Through `tokenizers` alone, against its own rate", header, lines)
        ratios += [
            f"{line[0]}: {line[-2]} of encode_batch_fast (goal 90%), {line[-1]} by processor time" for line in lines
        ]
    if "memory" in tables:
        lines = []
        for kind in kinds:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak, growth = pool.apply(memory, (options.folder, kind, options.million_tokens))
            lines.append([kind, f"{peak:.0f}", f"{growth:+.0f}"])
            ratios.append(f"{kind}: memory at {peak / 500:.2f} of 500 MB, {growth / peak:+.0%} from first to last half")
        title = f"Memory above the imported libraries over {options.million_tokens:g} million tokens, MB"
        show(title, ["files", "peak", "last half's peak less the first's"], lines)
    print("\n" + "\n".join(ratios))


if __name__ == "__main__":
    main()
