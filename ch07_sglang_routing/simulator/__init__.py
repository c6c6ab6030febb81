"""Routing in virtual time: engines (engine), requests (traces), a router in front (run), what differs (compare)."""
