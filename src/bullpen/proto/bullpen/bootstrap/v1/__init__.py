"""The service of vllm-bootstrap."""
