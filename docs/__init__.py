"""Pages that teach, and the scripts that make their figures and the API reference."""
