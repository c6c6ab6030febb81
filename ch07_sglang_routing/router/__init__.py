"""A router for LLM inference servers: one address, many engines behind it."""
