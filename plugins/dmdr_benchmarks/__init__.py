"""Benchmarks of text-to-image models: preference rewards, distances to real images, prompt following."""
