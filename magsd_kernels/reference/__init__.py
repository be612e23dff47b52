"""Pure PyTorch, any device: the definition of every operation.

Vectorised over the batch, without host synchronisation, deterministic. Backward functions are
written out; autograd through the forward functions gives the same.
"""
