"""Ways to run the product: one machine, Docker, Kubernetes."""
