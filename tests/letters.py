"""A tokenizer whose ids are readable."""

import numpy as np


class Letters:
    """The id of a letter is its code point."""

    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, texts):
        words = texts.to_pylist()
        offsets = np.cumsum([0] + [len(word) for word in words]).astype(np.int64)
        return np.array([ord(letter) for word in words for letter in word], np.int32), offsets

    def count_differences(self, texts):
        return 0
