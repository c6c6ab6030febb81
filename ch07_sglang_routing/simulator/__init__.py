"""Engines in virtual time: physics (engine), requests (traces), a router in front (run), what a difference is worth (compare)."""
