"""Features that a model has to beat."""
