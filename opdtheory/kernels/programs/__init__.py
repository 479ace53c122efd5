"""Programs for a GPU, in Triton, which comes with torch for GPUs; the modules here need it, and this one does not."""
