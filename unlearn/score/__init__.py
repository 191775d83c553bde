"""A model and items give scores; scores give a choice."""
