"""The engine process: torch lives here, gRPC does not."""
