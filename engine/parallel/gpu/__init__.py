"""The exchange between GPU workers, over peers' device memory."""
