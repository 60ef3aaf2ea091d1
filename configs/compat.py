"""How config keys have changed since format version 1, so that later versions of the code resume earlier runs.

- A new key: add it to `ADDED_KEYS` with the value that reproduces the behavior of the code without the key. That value
  and the default in `default.py`, which new runs get, may differ. Entries stay forever.
- A renamed key: add it to `RENAMED_KEYS`. Where the old name is in these tables already, write the new one there.
- A removed key: add it to `REMOVED_KEYS` with the value whose behavior the code still has. Runs with that value resume;
  others are refused with the name of the key. Delete it from the other tables.

`tests/test_formats.py` resumes a stored run of format version 1, and fails if a key is missing here.
"""

from typing import Any

# key -> value (lists as tuples).
ADDED_KEYS: dict[str, Any] = {
    # One line per key.
    "data.max_unknown_fraction": 1.0,
    "data.accept_changed_files": False,
}
# old key -> new key.
RENAMED_KEYS: dict[str, str] = {}
# key -> the only value with which a run can be resumed (lists as tuples).
REMOVED_KEYS: dict[str, Any] = {}
