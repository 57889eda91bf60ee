"""What decodes: one quantized base, many adapters, one loop. Knows no HTTP and no metrics library."""
