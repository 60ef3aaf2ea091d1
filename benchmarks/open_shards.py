"""What do open shards (`data.interleave_shards`) and parts of files (`data.min_shards`) cost, and what do they gain?

    python benchmarks/open_shards.py                      # both tables, some minutes
    python benchmarks/open_shards.py --network --rate=10  # megabytes per second and connection

The text is docstrings, joined to documents of 2 KB, in 16 files. The first table: CPU seconds of reading alone and of
the complete stream with tokenizer and packing, the smallest of some rounds, and peak memory, each in its own process;
for uncompressed JSON lines also with each file divided into parts.
The second: a local server that waits before each response, as a distant one does, and sends to each connection at a
limited rate; megabytes of text per second of the clock.
"""

import argparse
import http.server
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mlm.data.pipeline import first_documents
from mlm.data.reader import Reader
from mlm.data.shard_assignment import assign_shards
from mlm.data.sources.source import Source, open_source
from mlm.data.stream import RowStream
from mlm.data.tokenizer import load_tokenizer
from mlm.data.train_tokenizer import train_tokenizer

FILES = 16
WINDOW = 10_000
KINDS = ("jsonl.zst", "jsonl", "parquet")
# Values of data.min_shards to compare.
MIN_SHARDS = {"jsonl": (0, 512, 4_096)}


def write_files(folder: str, *, megabytes: float) -> None:
    """Writes the files in both formats, and a tokenizer."""
    if os.path.isdir(os.path.join(folder, "tokenizer")):
        return
    texts = list(first_documents(open_source(dataset_name="docstrings"), 20_000))
    random = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    for number in range(FILES):
        documents, size = [], 0
        while size < megabytes * 1e6:
            documents.append("\n".join(texts[index] for index in random.integers(0, len(texts), 4)))
            size += len(documents[-1])
        urls = [f"https://example.org/{index}" for index in range(len(documents))]
        stem = os.path.join(folder, f"{number:02}.")
        with pa.CompressedOutputStream(stem + "jsonl.zst", "zstd") as compressed, open(stem + "jsonl", "wb") as file:
            for text, url in zip(documents, urls, strict=True):
                line = (json.dumps({"text": text, "url": url}) + "\n").encode()
                compressed.write(line)
                file.write(line)
        pq.write_table(pa.table({"text": documents, "url": urls}), stem + "parquet", row_group_size=1000)
    train_tokenizer(iter(texts[:5000]), vocab_size=8_192, max_seq_length=128).save(os.path.join(folder, "tokenizer"))


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_all(source: Source, open_shards: int) -> int:
    """Reads the source in windows; returns its bytes."""
    slices = assign_shards(source.num_shards, seed=0, epoch=0, shuffled=True, process_index=0, process_count=1)
    reader, size = Reader(source, slices, interleave_shards=open_shards), 0
    while (texts := reader.take(WINDOW)) is not None:
        size += texts.nbytes
    return size


def measure_cpu(
    folder: str, kind: str, open_shards: int, rounds: int, min_shards: int
) -> tuple[int, float, float, float]:
    """Returns the number of shards, CPU seconds to read, CPU seconds of the stream, and peak megabytes."""
    source = open_source(data_files=os.path.join(folder, f"*.{kind}"), min_shards=min_shards)
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer"), cache_dir=None, backend="auto")
    reads, streams = [], []
    for _ in range(rounds):
        start = cpu_seconds()
        read_all(source, open_shards)
        reads.append(cpu_seconds() - start)
        stream = RowStream(
            source,
            tokenizer,
            seed=0,
            max_seq_length=128,
            packing="concatenate",
            shuffle_buffer_size=WINDOW,
            interleave_shards=open_shards,
            batch_rows=256,
        )
        start = cpu_seconds()
        while stream.epoch == 0:
            next(stream)
        streams.append(cpu_seconds() - start)
    return source.num_shards, min(reads), min(streams), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class _Throttled(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder, each connection at `rate` bytes per second after `latency` seconds."""

    protocol_version = "HTTP/1.1"
    folder, rate, latency = "", 1e6, 0.0

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.latency)
        with open(self.folder + self.path, "rb") as file:
            body = file.read()
        size, headers = len(body), {"ETag": '"1"'}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or size), size - 1)
            body, headers["Content-Range"] = body[first : last + 1], f"bytes {first}-{last}/{size}"
        self.send_response(206 if match else 200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        start, block = time.monotonic(), 1 << 16
        for sent in range(0, len(body), block):
            self.wfile.write(body[sent : sent + block])
            time.sleep(max(0.0, start + (sent + block) / self.rate - time.monotonic()))


def measure_network(folder: str, kind: str, open_shards: int, *, rate: float, latency: float) -> float:
    """Returns megabytes of text per second."""
    handler = type("Handler", (_Throttled,), {"folder": folder, "rate": rate, "latency": latency})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    vars(server)["handle_error"] = lambda *_: None  # No traceback when the client closes a connection.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = [f"http://127.0.0.1:{server.server_port}/{number:02}.{kind}" for number in range(FILES)]
    source = open_source(data_files=files)
    start = time.monotonic()
    size = read_all(source, open_shards)
    seconds = time.monotonic() - start
    server.shutdown()
    return size / 1e6 / seconds


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "mlm-open-shards"))
    parser.add_argument("--megabytes", type=float, default=8, help="of text per file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", default="1,4,16")
    parser.add_argument("--cpu", action="store_true", help="the first table only")
    parser.add_argument("--network", action="store_true", help="the second table only")
    parser.add_argument("--rate", type=float, default=2, help="megabytes per second and connection")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds before a response")
    args = parser.parse_args(argv)
    folder = f"{args.folder}-{args.megabytes:g}"
    write_files(folder, megabytes=args.megabytes)
    counts = [int(count) for count in args.shards.split(",")]
    spawn = multiprocessing.get_context("spawn")
    if not args.network:
        print("| files | shards | open shards | CPU s to read | CPU s of the stream | peak MB |")
        print("|---|---|---|---|---|---|")
        rows = ((kind, count, least) for kind in KINDS for least in MIN_SHARDS.get(kind, (0,)) for count in counts)
        for kind, count, least in rows:
            with spawn.Pool(1) as pool:
                shards, *figures = pool.apply(measure_cpu, (folder, kind, count, args.rounds, least))
            read, stream, megabytes = figures
            print(f"| {kind} | {shards} | {count} | {read:.2f} | {stream:.2f} | {megabytes:.0f} |", flush=True)
    if not args.cpu:
        print(f"\n| files, {args.rate:g} MB/s per connection | open shards | MB/s of text |\n|---|---|---|")
        for kind in KINDS:
            for count in counts:
                speed = measure_network(folder, kind, count, rate=args.rate * 1e6, latency=args.latency)
                print(f"| {kind} | {count} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
