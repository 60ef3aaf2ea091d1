"""The files beside a model that sentence-transformers needs: the vector of a text is the mean over its tokens."""

import json
import os
from typing import Any


def write_files(directory: str, *, hidden_size: int, max_seq_length: int) -> None:
    """Adds the files that `SentenceTransformer(directory)` reads to a model directory.

    The vectors are those of --mode=embed: the mean of the last layer's hidden states over all tokens, begin and end
    tokens included, of a text that is cut to `max_seq_length`. They are not normalized.

    Args:
      directory: a Hugging Face model directory.
      hidden_size: size of the vectors.
      max_seq_length: number of tokens that texts are cut to.
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    # Every mode is named, because the defaults of the library have changed between its versions.
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling: dict[str, Any] = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    pooling |= {f"pooling_mode_{mode}": False for mode in modes}
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        "1_Pooling/config.json": pooling,
    }
    os.makedirs(os.path.join(directory, "1_Pooling"))
    for name, content in files.items():
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
