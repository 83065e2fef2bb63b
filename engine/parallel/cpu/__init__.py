"""The exchange between CPU workers, over shared memory."""
