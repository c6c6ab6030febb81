"""An offline checker of manifests: schemas, what AI pods get wrong, what objects get wrong together, PromQL."""
