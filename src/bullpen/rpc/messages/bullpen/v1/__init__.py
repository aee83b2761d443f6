"""Our own service."""
