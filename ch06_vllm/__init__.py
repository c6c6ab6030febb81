"""Chapter 6: distributed inference: an engine of our own, real vLLM, and one client that measures both."""
