import proto  # noqa: F401  (before gRPC: it chooses how gRPC polls)
