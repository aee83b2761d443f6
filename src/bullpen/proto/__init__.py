"""The messages of the gRPC face: `.proto` files, and the code that `scripts/make_protos.sh` makes of them.

`bootstrap` has those of vllm-bootstrap's service, `v1` our own. protobuf is imported when one of them is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bullpen.proto.bullpen.bootstrap.v1 import inference_pb2 as bootstrap
    from bullpen.proto.bullpen.v1 import inference_pb2 as v1

_MODULES = {
    "bootstrap": "bullpen.proto.bullpen.bootstrap.v1.inference_pb2",
    "v1": "bullpen.proto.bullpen.v1.inference_pb2",
}

__all__ = ["bootstrap", "v1"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = globals()[name] = import_module(_MODULES[name])
    return module
