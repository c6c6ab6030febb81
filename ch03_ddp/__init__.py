"""Chapter 3: DDP in depth: train, scale out, debug, optimise, survive."""
