"""The OpenAI HTTP surface, over the same core as the gRPC API."""
