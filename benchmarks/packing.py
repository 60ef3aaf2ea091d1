"""How many documents does each packing cut, and how much padding does it leave?

    python benchmarks/packing.py                                                  # docstrings
    python benchmarks/packing.py --files='/usr/share/doc/**' --max_megabytes=40   # every file one document

`isolate` cuts the stream of documents every L tokens. `best_fit` cuts only documents longer than L; what it leaves of a
row is padding, and each piece of a document has a begin token. Documents that fit into L tokens are counted apart,
because the others are cut in any case.
"""

import argparse
import glob
import itertools
import os
import sys
import time

import numpy as np
import pyarrow as pa

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mlm.data import best_fit, packing
from mlm.data.pipeline import first_documents
from mlm.data.sources.source import open_source
from mlm.data.tokenizer import Tokenizer
from mlm.data.train_tokenizer import train_tokenizer


def read_texts(pattern: str, *, max_megabytes: float) -> list[str]:
    """Returns documents in random order: docstrings, or files that are UTF-8."""
    if not pattern:
        texts = list(first_documents(open_source(dataset_name="docstrings"), 1 << 62))
    else:
        texts = []
        for path in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    data = file.read()
                if b"\0" not in data and data.strip():
                    texts.append(data.decode(errors="replace"))
    texts = [texts[n] for n in np.random.default_rng(0).permutation(len(texts))]
    ends = np.cumsum([len(text.encode(errors="replace")) for text in texts])
    return texts[: int(np.searchsorted(ends, max_megabytes * 1e6)) + 1]


def chunks(texts: list[str]) -> list[pa.LargeStringArray]:
    """Returns the texts as the stream packs them, `best_fit.CHUNK_BYTES` at a time."""
    column = pa.array(texts, pa.large_string())
    numbers = np.cumsum([len(text.encode()) for text in texts]) // best_fit.CHUNK_BYTES
    boundaries = [0, *(1 + np.flatnonzero(np.diff(numbers))).tolist(), len(texts)]
    return [column.slice(start, end - start) for start, end in itertools.pairwise(boundaries)]


def measure(parts: list[pa.LargeStringArray], tokenizer: Tokenizer, length: int) -> list[str]:
    """Returns table rows for `isolate` and `best_fit`."""
    ends, num_tokens, num_rows, num_cut, num_padding, seconds = [], 0, 0, 0, 0, 0.0
    for part in parts:
        chunk = packing.pack(part, tokenizer, packing="isolate", max_seq_length=length)
        ends.append(num_tokens + chunk.offsets[1:])
        num_tokens += len(chunk.data)
        start = time.perf_counter()
        rows, pieces = best_fit.pack(
            chunk.data, chunk.offsets, max_seq_length=length, pad_id=tokenizer.pad_id, seed=(0,)
        )
        seconds += time.perf_counter() - start
        num_rows += len(rows)
        num_cut += pieces.num_cut
        num_padding += int((rows == tokenizer.pad_id).sum())
    end_N = np.concatenate(ends)
    start_N = np.concatenate([[0], end_N[:-1]])
    is_cut_N, fits_N = start_N // length != (end_N - 1) // length, end_N - start_N <= length
    overhead = 1 - num_tokens / (num_rows * length)
    return [
        f"| {length} | isolate | {is_cut_N.mean():.1%} | {is_cut_N[fits_N].mean():.1%} | 0.0% | 0.0% | |",
        f"| {length} | best_fit | {num_cut / len(end_N):.1%} | 0.0% | {num_padding / (num_rows * length):.1%} "
        f"| {overhead:.1%} | {num_tokens / seconds / 1e6:.0f} |",
    ]


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default="", help="a glob of files, each one document; default: docstrings")
    parser.add_argument("--max_megabytes", type=float, default=20)
    parser.add_argument("--lengths", default="64,128,512")
    parser.add_argument("--vocab_size", type=int, default=16_384)
    args = parser.parse_args(argv)
    texts = read_texts(args.files, max_megabytes=args.max_megabytes)
    tokenizer = train_tokenizer(iter(texts[:5000]), vocab_size=args.vocab_size, max_seq_length=512)
    parts = chunks(texts)
    sizes = np.concatenate([np.diff(tokenizer.encode(part)[1]) + 2 for part in parts])
    print(
        f"{len(texts)} documents, {sizes.sum() / 1e6:.1f} M tokens; tokens per document: median "
        f"{np.median(sizes):.0f}, mean {sizes.mean():.0f}, longest {sizes.max()}\n\n"
        "| tokens | packing | documents cut | of those that fit | padding | + begin tokens | M tokens per second |\n"
        "|---|---|---|---|---|---|---|"
    )
    for length in map(int, args.lengths.split(",")):
        print("\n".join(measure(parts, tokenizer, length)), flush=True)


if __name__ == "__main__":
    main()
