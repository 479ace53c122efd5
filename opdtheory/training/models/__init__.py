"""Language models as the trainer sees them."""
