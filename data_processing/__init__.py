"""From slides to a training corpus: reading, statistics of genes, windows to train on, and phantom tissue."""
