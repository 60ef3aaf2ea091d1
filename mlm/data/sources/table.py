"""A split of a dataset on the Hugging Face hub as columns in memory, for labeled tasks."""

from typing import Any


def load_columns(path: str, config: str | None, split: str) -> dict[str, list[Any]]:
    """Loads a split; class ids become names, or -1 if unknown. Raises the errors of `datasets.load_dataset`."""
    import datasets  # Imported here: it takes a second, which tasks in files need not wait for.

    loaded = datasets.load_dataset(path, config, split=split)
    columns = loaded.to_dict()
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [-1 if value < 0 else feature.int2str(value) for value in columns[name]]
    return columns
