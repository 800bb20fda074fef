"""Meta-learning over plain tensors: inner and outer loops, algorithms, heads and losses."""
