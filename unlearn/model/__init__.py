"""A name, and the model in memory that it means."""
