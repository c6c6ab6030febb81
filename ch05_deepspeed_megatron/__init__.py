"""Chapter 4: FSDP: models that do not fit, and the memory budget that predicts it."""
