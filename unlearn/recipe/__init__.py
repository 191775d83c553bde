"""What the user asks for. No torch here."""
