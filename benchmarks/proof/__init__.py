"""The engine against deadlines on the machine at hand: live, and through a server."""
