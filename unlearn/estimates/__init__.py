"""What a recipe will take, on paper: memory, disk and time."""
