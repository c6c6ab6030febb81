"""Chapter 7: real SGLang, a router that knows about caches and load, serving on CPUs, and fair comparisons."""
