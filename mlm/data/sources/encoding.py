"""The encoding of a text file, and its bytes in UTF-8."""

import codecs
import io
from typing import Any

import numpy as np
import pyarrow as pa

# Bytes at the start of a file from which its encoding is guessed; as many are read at once.
HEAD_BYTES = 1 << 16
# Byte order mark -> encoding; the marks of UTF-32 begin with those of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Fraction of NUL bytes above which a file without a mark is not UTF-8.
_MAX_NUL_FRACTION = 0.01


class Utf8Stream(io.RawIOBase):
    """The bytes of a text file without byte order mark, in UTF-8: UTF-16 and UTF-32 are decoded.

    Raises:
      ValueError: the file has NUL characters and is neither UTF-16 nor UTF-32.
    """

    def __init__(self, stream: io.IOBase | pa.NativeFile, *, count_quotes: bool = False):
        """Reads the start of a binary stream. `num_quotes` counts double quotes if `count_quotes`."""
        self._stream: Any = stream
        head = stream.read(HEAD_BYTES)
        encoding, mark = find_encoding(head)
        self._decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)(errors="replace")
        self._rest = self._to_utf8(head[len(mark) :])
        self.num_quotes = 0
        self._count_quotes = count_quotes

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Returns `size` bytes, fewer only at the end of the file; all if it is negative."""
        if self._decoder is None and not self._rest and not self._count_quotes:
            return self._stream.read() if size < 0 else self._stream.read(size)  # Without a copy.
        parts, num_bytes = [self._rest], len(self._rest)
        while size < 0 or num_bytes < size:
            block = self._stream.read(HEAD_BYTES if size < 0 else max(size - num_bytes, 1))
            converted = self._to_utf8(block)
            parts.append(converted)
            num_bytes += len(converted)
            if not block:
                break
        data = b"".join(parts)
        end = len(data) if size < 0 else size
        self._rest = data[end:]
        if self._count_quotes:
            self.num_quotes += data.count(b'"', 0, end)
        return data[:end]

    def _to_utf8(self, block: bytes) -> bytes:
        if self._decoder is None:
            return block
        return self._decoder.decode(block, final=not block).encode("utf-8", "replace")


def find_encoding(head: bytes) -> tuple[str, bytes]:
    """Returns the encoding of a file that starts with `head`, and its byte order mark."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding, mark
    nul_fraction = head.count(0) / max(1, len(head))
    if nul_fraction <= _MAX_NUL_FRACTION:
        return "utf-8", b""
    # Characters of most scripts, or at least spaces and line ends, have zeros at fixed positions of each 2 or 4 bytes.
    is_nul = np.frombuffer(head[: len(head) // 4 * 4], np.uint8).reshape(-1, 4) == 0
    for encoding, nul_positions in (
        ("utf-32-le", (2, 3)),
        ("utf-32-be", (0, 1)),
        ("utf-16-le", (1, 3)),
        ("utf-16-be", (0, 2)),
    ):
        others = [position for position in range(4) if position not in nul_positions]
        if encoding.startswith("utf-32"):
            is_match = is_nul[:, nul_positions].mean() > 0.99
        else:
            is_match = is_nul[:, nul_positions].mean() > 20 * is_nul[:, others].mean()
        if is_match:
            return encoding, b""
    raise ValueError(f"{nul_fraction:.0%} of its bytes are NUL; convert it to UTF-8")
