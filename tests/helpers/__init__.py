"""What tests of several files share: small models, launches of training and serving, kernels compiled ahead of time."""
