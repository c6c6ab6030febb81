"""Chapter 2: hardware, networks, and every parallelism strategy from scratch."""
