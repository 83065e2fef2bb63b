"""Energy: meters, the ledger of each GPU, receipts. Knows no planner and no worker; imports no torch."""
