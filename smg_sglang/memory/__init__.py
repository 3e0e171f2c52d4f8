"""The memory server: host pages, leases, and the client that asks for them."""
