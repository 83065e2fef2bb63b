"""`python -m benchmarks.research late`: lateness, tenants and giants under every policy, beside an older `horizon`."""
