"""What methods cost: time, products, memory, parameters; `lion-fast bench`, docs/benchmarks.md."""
