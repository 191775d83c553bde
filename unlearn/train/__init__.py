"""Fine-tuning: where vectors come from."""
