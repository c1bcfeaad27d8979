"""Algorithm 1: the operator contracts, the reference, and the activations they can carry."""
