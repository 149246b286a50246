"""The gRPC face: bytes in, use cases called, messages and google.rpc.Status out. Decides nothing about money."""
