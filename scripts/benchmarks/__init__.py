"""What the benchmarks share: the load generator, the reference stack, payments signed beforehand."""
