"""The definition of every operation, straight from its formula: the oracle of the tests, differentiable by autograd."""
