"""Says what is wrong in a cluster, from what its API server knows: causes first, then what follows from them."""
