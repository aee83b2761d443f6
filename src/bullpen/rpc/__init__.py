"""The gRPC face: inference with the node's instances, by the original's service paths and by our own."""
