"""Examples; `examples.ablation_matrix` is run as a module."""
