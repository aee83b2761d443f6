"""The messages of the gRPC face: `.proto` files, and the code that `scripts/make_protos.sh` makes of them."""

from bullpen.rpc.messages.bullpen.bootstrap.v1 import inference_pb2 as bootstrap
from bullpen.rpc.messages.bullpen.v1 import inference_pb2 as v1

__all__ = ["bootstrap", "v1"]
