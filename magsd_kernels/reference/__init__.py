"""Pure PyTorch, any device: the definition of every operation.

Vectorized over the batch, without host synchronization, deterministic. Backward functions are
written out; autograd through the forward functions gives the same.
"""
