"""What the experiments of the book share: adapters, comparisons, costs, results tables."""
