"""TensorFlow, CLU's metric writers and periodic actions, imported without Keras.

TensorFlow imports Keras, and CLU imports a callback for it: more than 3 s for what nothing here uses. A program that
calls the trainer can still import Keras, before or after this.
"""

import sys
import types
from typing import Any

# A module that is None cannot be imported, which TensorFlow accepts for Keras. CLU needs a name of the other one.
_HIDDEN: dict[str, Any] = {
    "keras": None,
    "tensorboard.plugins.hparams._keras": types.SimpleNamespace(Callback=None),
}
_added = [name for name in _HIDDEN if "keras" not in sys.modules and name not in sys.modules]
sys.modules.update({name: _HIDDEN[name] for name in _added})
try:
    import tensorflow as tf
    from clu import metric_writers, periodic_actions
finally:
    for name in _added:
        del sys.modules[name]

__all__ = ["metric_writers", "periodic_actions", "tf"]
