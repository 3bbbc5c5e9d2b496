"""Import torchvision, also where its wheel is linked against CUDA and torch is the CPU-only one.

There `import torchvision` fails with "operator torchvision::nms does not exist", and transformers' models then fail to
import with a misleading message. With the schemas of the two missing operators defined beforehand the import works; the
operators themselves (and `torchvision.io`) stay unusable, models, transforms and data sets work.
"""

import importlib
import sys
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_keep_alive = []  # a library that is garbage-collected takes its schemas with it


def import_torchvision() -> ModuleType:
    """Return the module torchvision. Call it before anything imports torchvision or transformers.

    Raises:
        ImportError: torchvision is not installed; the message has the pip command.

    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError("torchvision is not installed: pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _keep_alive.append(library)
    return importlib.import_module("torchvision")
