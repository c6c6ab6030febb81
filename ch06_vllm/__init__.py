"""Chapter 6: inference: a small engine of our own, and real vLLM, served, measured and tuned by the same client."""
