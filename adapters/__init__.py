"""What is learned: LoRA tensors, their files, data and training. Knows no tenant, HTTP, Prometheus or SQL."""
