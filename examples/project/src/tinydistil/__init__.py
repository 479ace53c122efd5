"""A distillation trainer in miniature."""
