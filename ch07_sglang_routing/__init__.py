"""SGLang, routing over several engines, and serving on CPUs."""
