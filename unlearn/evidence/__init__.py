"""Whether it is really forgotten."""
