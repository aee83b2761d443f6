"""What tools like grpcurl learn of the services: every message of every method, the original's under its own names.

The original's names are in a pool of their own: in the process's common pool they would keep the original's published
client from being loaded.
"""

from __future__ import annotations

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from bullpen.proto import bootstrap, v1

BOOTSTRAP_PACKAGE = "vllm_bootstrap"
BOOTSTRAP_FILE = "inference.proto"


def pool() -> DescriptorPool:
    """All that is served."""
    files = DescriptorPool()
    for module in (v1, health_pb2, reflection_pb2):
        files.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    files.AddSerializedFile(bootstrap_file().SerializeToString())
    return files


def bootstrap_file() -> FileDescriptorProto:
    """The original's file, made of ours by another package's name."""
    file = FileDescriptorProto()
    file.MergeFromString(bootstrap.DESCRIPTOR.serialized_pb)
    ours, theirs = f".{file.package}.", f".{BOOTSTRAP_PACKAGE}."
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(ours, theirs)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(ours, theirs)
            method.output_type = method.output_type.replace(ours, theirs)
    file.name, file.package = BOOTSTRAP_FILE, BOOTSTRAP_PACKAGE
    return file
